"""Which causes are named after their remedies were tried: no model is run here."""

import dataclasses
import math
import pathlib

import pytest

from benchmarks.diagnosis import calibrate
from optclip.diagnosis import _rules
from optclip.diagnosis._calibration import RIGHT, probability
from optclip.diagnosis._candidates import Candidate
from optclip.diagnosis._probe import Batch
from optclip.diagnosis._rehearsals import Rehearsal, Run
from optclip.diagnosis._signals import Signals
from optclip.diagnosis.findings import Finding, Remedy

RISES, FALLS, LITTLE = 9.0, 0.5, 0.95
SCALE = Remedy("scale_weights", 0.5, ("w",), "Multiply by 0.5.")
RATE = Remedy("scale_learning_rate", 0.1, advice="Lower it.")
NORMALIZE = Remedy("normalize", advice="Normalize.")


def signals(end=LITTLE, **changes):
    batch = Batch(1.0, 1.0, (), ())
    made = Signals(
        (batch,) * 8, (), 0, [], None, None, {}, [], trust={1.0: 0.9},
        rehearsals={1.0: [end] * 12, 0.1: [end] * 12}, starts=[1.0] * 12,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def rehearsal(end):
    return Rehearsal((Run([1.0] * 4, [end] * 12),) * 2)


class Trials:
    """The outcome of each kind of remedy, in place of rehearsals."""

    scales = factors = ()
    ramp = 40

    def __init__(self, base, long=LITTLE, slow=LITTLE, **ends):
        self.base = rehearsal(base)
        self.ends = ends
        self.longs = {1.0: rehearsal(long), 0.1: rehearsal(slow)}

    def of(self, *remedies):
        end = self.ends.get("_and_".join(remedy.kind for remedy in remedies))
        return None if end is None else rehearsal(end)

    def long(self, part=1.0):
        return self.longs[part]


def proposing(monkeypatch, *candidates):
    rules = [lambda s, c=c: c for c in candidates]
    monkeypatch.setattr(_rules, "RULES", rules)


def candidate(cause, benefit, *remedies, suspected=False):
    return Candidate(Finding(cause, (), "", remedies, "high"), benefit, suspected)


@pytest.mark.parametrize(("base", "after", "basis", "kinds"), [
    (RISES, FALLS, "works", ["scale_weights", "normalize"]),
    (LITTLE, 0.3, "helps", ["scale_weights", "normalize"]),
    (LITTLE, LITTLE, "measured", ["scale_weights", "normalize"]),
    (RISES, RISES, "fails", ["normalize"]),
    (RISES, math.inf, "fails", ["normalize"]),
    (RISES, None, "measured", ["scale_weights", "normalize"]),
])  # fmt: skip
def test_remedies_that_were_tried_in_vain_are_left_out(
    monkeypatch, base, after, basis, kinds
):
    proposing(monkeypatch, candidate("initialization", 2.0, SCALE, NORMALIZE))
    (found,) = _rules.judge(signals(base), Trials(base, scale_weights=after))
    assert found.basis == basis
    assert [r.kind for r in found.remedies] == kinds
    tried = [r.tried for r in found.remedies if r.tried]
    assert len(tried) == (basis in ("works", "helps"))
    assert found.probability == probability(basis)


def test_a_suspected_cause_is_named_only_if_its_remedy_works(monkeypatch):
    suspect = candidate("input_scale", 2.0, SCALE, suspected=True)
    for base, after, causes in (
        (RISES, FALLS, ["input_scale"]), (RISES, RISES, ["unknown"]),
        (LITTLE, 0.9, []), (RISES, None, ["unknown"]),
    ):  # fmt: skip
        proposing(monkeypatch, suspect)
        found = _rules.judge(signals(base), Trials(base, scale_weights=after))
        assert [f.cause for f in found] == causes, (base, after)


def test_the_smallest_change_that_is_enough_is_recommended(monkeypatch):
    amounts = [Remedy("divide_factor", a, advice="x") for a in (10.0, 100.0, 1000.0)]
    proposing(monkeypatch, candidate("loss_scale", 3.0, *amounts, suspected=True))

    class Larger(Trials):
        def of(self, remedy):
            return rehearsal(FALLS if remedy.amount >= 100 else RISES)

    (found,) = _rules.judge(signals(RISES), Larger(RISES))
    assert [r.amount for r in found.remedies] == [100.0]


def test_the_rate_is_innocent_if_the_model_trains_with_it(monkeypatch):
    rate = candidate("learning_rate", 0.9, RATE)
    weights = candidate("initialization", 0.6, SCALE)
    proposing(monkeypatch, rate, weights)
    for after, causes in (
        (FALLS, ["initialization"]), (RISES, ["learning_rate", "initialization"]),
    ):  # fmt: skip
        found = _rules.judge(signals(RISES), Trials(RISES, scale_weights=after))
        assert [f.cause for f in found] == causes


def test_two_faults_are_found_if_both_remedies_are_needed(monkeypatch):
    rate = candidate("learning_rate", 0.9, RATE)
    proposing(monkeypatch, rate, candidate("initialization", 3.0, SCALE))
    for both, causes in (
        (0.3, ["initialization", "learning_rate"]),
        (0.9, ["learning_rate", "initialization"]),
    ):
        trials = Trials(
            RISES, scale_weights=RISES, scale_learning_rate=LITTLE,
            scale_weights_and_scale_learning_rate=both,
        )  # fmt: skip
        found = _rules.judge(signals(RISES), trials)
        assert [f.cause for f in found] == causes
        weights = next(f for f in found if f.cause == "initialization")
        kinds = [r.kind for r in weights.remedies]
        assert kinds == (["scale_weights"] if both < 0.5 else [])
        if both < 0.5:
            assert "at 0.1 of the learning rate" in weights.remedies[0].tried


@pytest.mark.parametrize(("warm", "long", "slow", "cause"), [
    (0.3, RISES, 0.6, "warm_up"), (0.3, 0.9, 0.6, "warm_up"),
    (0.7, RISES, 0.6, "learning_rate"), (0.3, 0.35, 0.6, "learning_rate"),
    (RISES, RISES, RISES, "learning_rate"), (None, RISES, 0.6, "learning_rate"),
])  # fmt: skip
def test_a_warm_up_must_win_against_lower_rates(monkeypatch, warm, long, slow, cause):
    proposing(monkeypatch, candidate("learning_rate", 0.9, RATE))
    trials = Trials(RISES, long, slow, warm_up=warm)
    (found,) = _rules.judge(signals(RISES), trials)
    assert found.cause == cause
    (begun,) = _rules.judge(signals(RISES, begun=True), trials)
    assert begun.cause == "learning_rate"


def test_what_was_proven_comes_first_and_a_bad_batch_before_all(monkeypatch):
    proposing(
        monkeypatch,
        candidate("vanishing", 4.0),
        candidate("input_scale", 2.0, SCALE, suspected=True),
        candidate("bad_batch", math.inf, SCALE),
    )
    found = _rules.judge(signals(RISES), Trials(RISES, scale_weights=FALLS))
    assert [f.cause for f in found] == ["bad_batch", "input_scale", "vanishing"]


def test_the_counts_are_those_of_the_benchmark():
    folder = pathlib.Path(calibrate.__file__).parents[1] / "results"
    assert calibrate.counts(calibrate.read(folder)) == RIGHT


def test_the_probability_is_that_of_the_counts():
    for basis, (right, total) in RIGHT.items():
        assert 0 <= right <= total
        assert probability(basis) == (right + 1) / (total + 2)
    assert math.isnan(probability(""))


def test_the_confidence_is_a_word_for_the_probability(monkeypatch):
    finding = Finding("depth", (), "", (), "high", "measured")
    for share, word in ((0.9, "high"), (0.89, "medium"), (0.6, "medium"), (0.5, "low")):
        monkeypatch.setattr(
            "optclip.diagnosis.findings.probability", lambda basis, p=share: p
        )
        assert finding.confidence == word
        assert f"(severity: high; probability: {share:.0%})" in finding.headline
