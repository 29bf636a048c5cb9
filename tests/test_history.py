"""What the logs of a run show: each kind of fact, reading, and the report."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip
from optclip.diagnosis import __main__ as command
from optclip.diagnosis import _history_facts as facts
from optclip.diagnosis._leading_leaf import leaf_columns
from optclip.diagnosis._timeline import timeline_of
from optclip.diagnosis._trouble import trouble_of
from optclip.diagnosis.facts import FACTS, HistoryFact
from optclip.diagnosis.findings import Diagnosis

NAN = float("nan")
FIRST = 29_700  # the step of the first row
N = 400


def series(seed=0, n=N):
    """Returns the norms and losses of a run without any trouble."""
    rng = np.random.default_rng(seed)
    return 2.0 * 10 ** (0.05 * rng.normal(size=n)), 2.3 + 0.05 * rng.normal(size=n)


def logs(norm=None, loss=None, every=1, **columns):
    """Returns a mapping of arrays; the place 300 is step 30,000 if all are logged."""
    healthy = series()
    columns["norm"] = healthy[0] if norm is None else norm
    columns["loss"] = healthy[1] if loss is None else loss
    return {"step": FIRST + every * np.arange(len(columns["norm"])), **columns}


def found(source):
    """Returns the facts by kind."""
    facts_found = facts.facts_of(timeline_of(source))
    kinds = [fact.kind for fact in facts_found]
    assert kinds == sorted(set(kinds), key=list(FACTS).index), "once each, in order"
    return {fact.kind: fact for fact in facts_found}


def changed(values, places, factor):
    values = values.copy()
    values[places] = values[places] * factor
    return values


SPIKE = logs(changed(series()[0], 300, 500.0), changed(series()[1], slice(300, 303), 2))
OVERFLOW = logs(
    np.where(
        np.arange(N) < 310, series()[0] * 10 ** np.maximum(np.arange(N) - 299, 0.0), NAN
    ),
    np.where(np.arange(N) < 310, series()[1], NAN),
)
SUDDEN = logs(*(np.where(np.arange(N) < 300, x, NAN) for x in series()))
GROWTH = logs(changed(series()[0], slice(250, N), 10 ** np.linspace(0, 3, N - 250)))


def lost():
    loss = series()[1]
    loss[:50] = np.linspace(11.0, 2.3, 50)
    loss[300:] = 7.0
    return logs(loss=loss)


def kinds(source):
    return set(found(source))


# --- one kind each --------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_nothing_stands_out_in_a_healthy_run(seed):
    norm, loss = series(seed, 1000)
    decay = np.exp(-np.arange(1000) / 60)
    for run in [
        logs(norm, loss),
        logs(norm * (1 + 9 * decay), loss + 9 * decay),
        logs(norm * (1.01 - decay), loss + 9 * decay),  # the norm warms up
        logs(changed(norm, slice(0, 40), 0.01), loss),
        logs(norm, -loss),
    ]:
        (fact,) = facts.facts_of(timeline_of(run))
        assert fact.kind == "steady"
        assert fact.steps == (29_700, 30_699)


def test_spike_has_its_step_and_size():
    fact = facts.spike(timeline_of(SPIKE))
    assert fact.steps == (30_000, 30_002)
    assert fact.leaf is None
    size = SPIKE["norm"][300] / np.median(SPIKE["norm"][200:300])
    assert f"At step 30,000, the norm was {SPIKE['norm'][300]:.3g}" in fact.evidence
    (times,) = re.findall(r"([\d.]+) times its median", fact.evidence)
    assert float(times) == pytest.approx(size, rel=0.01)
    assert f"the loss was {SPIKE['loss'][300]:.3g} (median before: 2.3" in fact.evidence
    assert "At step 30,003 it was typical again." in fact.evidence
    assert kinds(SPIKE) == {"spike", "checkpoint"}
    assert facts.spike(timeline_of(logs())) is None


def test_spike_of_the_loss_alone_needs_no_norms():
    run = logs()
    del run["norm"]
    assert set(found(run)) == {"steady"}
    run["loss"] = changed(run["loss"], 300, 1.5)
    fact = found(run)["spike"]
    assert fact.steps == (30_000,)
    assert "norm" not in fact.evidence
    assert "typical loss" in found(run)["checkpoint"].evidence


def test_largest_of_several_spikes_is_described_and_the_others_listed():
    norm = changed(changed(series()[0], [150, 250], 30.0), 200, 900.0)
    fact = found(logs(norm))["spike"]
    assert fact.steps == (29_900,)
    assert "It is the largest spike (others: 29,850, 29,950)." in fact.evidence


def test_spike_at_the_end_of_the_logs_has_not_returned():
    fact = found(logs(changed(series()[0], slice(N - 2, N), 500.0)))["spike"]
    assert "The logs end before it is typical again." in fact.evidence


def test_steps_that_were_not_recorded_are_counted_from_the_rows():
    run = logs(SPIKE["norm"], every=100)
    fact = found(run)["spike"]
    assert fact.steps == (59_700,)
    assert "in the 100 recorded steps before" in fact.evidence
    back, first, last = found(run)["checkpoint"].steps
    assert (back, first, last) == (59_600, 59_601, 59_700)
    assert "24 batches by default" in found(run)["checkpoint"].evidence


def test_divergence_below_the_initial_loss():
    fact = facts.divergence(timeline_of(lost()))
    assert fact.steps == (30_000, 30_099)
    assert "the loss stayed at 7 or above. Its median in the 100 steps" in fact.evidence
    assert "spike" not in found(lost())


def test_divergence_above_the_initial_loss_without_a_jump():
    norm, loss = series()
    loss[200:] += np.linspace(0.0, 3.0, 200)
    fact = facts.divergence(timeline_of(logs(norm, loss)))
    assert 29_900 < fact.steps[0] < 30_000
    assert f"It began at {loss[0]:.3g}." in fact.evidence


def test_no_divergence_if_only_the_first_loss_was_low():
    norm, loss = series()
    loss[0] = loss.min() - 0.01
    assert facts.divergence(timeline_of(logs(norm, loss))) is None


def test_nan_without_a_warning():
    fact = facts.nonfinite(timeline_of(SUDDEN))
    assert (fact.kind, fact.steps) == ("nan_without_warning", (30_000,))
    assert "recorded before it, 29,999, was typical: the norm was" in fact.evidence
    assert found(SUDDEN)["divergence"].steps == (30_000, 30_099)
    assert "no step is finite" in found(SUDDEN)["divergence"].evidence


def test_nan_after_the_norm_has_grown():
    fact = facts.nonfinite(timeline_of(OVERFLOW))
    assert (fact.kind, fact.steps) == ("nan_after_growth", (30_009, 30_010))
    assert "e+10 times its median" in fact.evidence
    assert "Step 30,010 is not finite." in fact.evidence


def test_nan_after_slow_growth_has_a_warning():
    norm, loss = GROWTH["norm"].copy(), series()[1]
    norm[390:] = loss[390:] = NAN
    assert kinds(logs(norm, loss)) == {
        "divergence",
        "nan_after_growth",
        "growth",
        "checkpoint",
    }


def test_single_nan_is_no_divergence():
    loss = series()[1]
    loss[300] = NAN
    run = found(logs(loss=loss))
    assert set(run) == {"nan_without_warning", "checkpoint"}
    assert "before the non-finite step is 29,999" in run["checkpoint"].evidence


def test_run_that_is_never_finite_has_no_step_to_go_back_to():
    run = found(logs(np.full(20, NAN), np.full(20, NAN)))
    assert "the first in the logs" in run["nan_without_warning"].evidence
    assert "use the initial parameters" in run["checkpoint"].evidence


def test_growth_over_many_steps():
    fact = facts.growth(timeline_of(GROWTH))
    first, last = fact.steps
    assert 29_900 <= first <= 29_960  # it grows from 29,950
    assert last == 30_099
    (factor,) = re.findall(r"by a factor of ([\d.e+]+),", fact.evidence)
    assert 500 < float(factor) < 2000
    assert kinds(GROWTH) == {"growth", "checkpoint"}
    (back, first, last) = found(GROWTH)["checkpoint"].steps
    assert (back, first, last) == (fact.steps[0], 30_076, 30_099)


@pytest.mark.parametrize("run", [logs(), SPIKE, SUDDEN, lost()])
def test_jump_is_not_growth(run):
    assert facts.growth(timeline_of(run)) is None
    norm = changed(series()[0], slice(200, N), 30.0)
    assert facts.growth(timeline_of(logs(norm))) is None


def test_slow_growth_after_a_warm_up():
    norm = changed(series()[0], slice(0, 40), 0.01)
    norm[200:] *= 10 ** np.linspace(0.0, 0.8, N - 200)  # no step is far above
    assert kinds(logs(norm)) == {"growth", "checkpoint"}


def test_spike_after_a_level_shift_is_relative_to_the_new_level():
    norm = changed(series()[0], slice(150, N), 30.0)
    norm[380] *= 500.0
    fact = found(logs(norm))["spike"]
    assert fact.steps == (30_080,)
    (times,) = re.findall(r"([\d.]+) times its median", fact.evidence)
    assert float(times) == pytest.approx(500, rel=0.2)


def test_norm_that_stays_at_another_level():
    run = logs(changed(series()[0], slice(200, N), 30.0))
    fact = facts.level_shift(timeline_of(run))
    assert fact.steps[0] == 29_900
    (factor,) = re.findall(r"a factor of ([\d.]+),", fact.evidence)
    assert 25 < float(factor) < 35
    assert kinds(run) == {"level_shift", "checkpoint"}


def leaves(**norms):
    """Returns a run with a spike and these norms of leaves."""
    columns = {f"blocks/{name}/norm": norm for name, norm in norms.items()}
    return logs(changed(series()[0], 300, 500.0), **columns)


def leaf_fact(run):
    timeline = timeline_of(run)
    return facts.leaf(timeline, trouble_of(timeline))


def test_leaf_that_rises_first_leads():
    norm = series()[0]
    run = leaves(
        a=changed(norm, 300, 500.0), b=changed(norm, slice(295, 301), 50.0), c=norm
    )
    fact = leaf_fact(run)
    assert (fact.kind, fact.leaf, fact.steps) == ("leading_leaf", "blocks/b", (29_995,))
    assert "rises first, at step 29,995, 5 steps before `blocks/a`" in fact.evidence
    back = found(run)["checkpoint"]
    assert back.steps[0] == 29_994
    assert "before the rise of `blocks/b` is 29,994" in back.evidence


@pytest.mark.parametrize("convert", [float, np.float32, np.asarray])
def test_leaf_that_rises_most_leads(convert):
    norm = series()[0]
    run = leaves(a=changed(norm, 300, 20.0), b=changed(norm, 300, 500.0), c=norm)
    fact = leaf_fact([{k: convert(v) for k, v in row.items()} for row in rows_of(run)])
    assert (fact.kind, fact.leaf, fact.steps) == ("leading_leaf", "blocks/b", (30_000,))
    assert "rises most: at step 30,000, at which 2 of 3 leaves rise" in fact.evidence


def test_leaves_that_rise_together_have_no_leader():
    norm = series()[0]
    fact = leaf_fact(
        leaves(a=changed(norm, 300, 400.0), b=changed(norm, 300, 500.0), c=norm)
    )
    assert (fact.kind, fact.leaf) == ("several_leaves", None)
    assert "2 of 3 leaves rise first: `blocks/a`, `blocks/b`" in fact.evidence
    both = leaves(a=changed(norm, 300, 400.0), b=changed(norm, 300, 500.0))
    assert leaf_fact(both).evidence == "At step 30,000, all 2 leaves rise."


def test_leaf_that_is_first_not_finite_leads():
    norm, loss = series()
    norm[300:] = loss[300:] = NAN
    late = series()[0]
    late[302:] = NAN
    run = logs(norm, loss, **{"a/norm": norm, "b/norm": late, "c/norm": late})
    fact = leaf_fact(run)
    assert (fact.leaf, fact.steps) == ("a", (30_000,))
    assert "not finite" in fact.evidence


def test_leaf_that_grows_leads():
    norm = series()[0]
    run = GROWTH | {"a/norm": norm, "b/norm": GROWTH["norm"], "c/norm": norm}
    assert leaf_fact(run).leaf == "b"


def test_leaf_that_rose_and_fell_long_before_does_not_lead():
    norm = series()[0]
    early = changed(norm, 280, 90.0)
    assert leaf_fact(leaves(a=changed(norm, 300, 500.0), b=early, c=norm)).leaf == (
        "blocks/a"
    )
    assert leaf_fact(leaves(a=early, b=norm)) is None
    assert leaf_fact(leaves(a=changed(norm, 300, 500.0))) is None  # the only leaf


def test_clipping_on_nearly_all_steps():
    run = SPIKE | {"threshold": np.full(N, 1.0)}
    fact = facts.clipping(timeline_of(run), 300)
    assert fact.steps == (29_900, 29_999)
    assert fact.evidence.startswith("100 of the 100 steps from 29,900 to 29,999 were")
    assert "the median threshold is 1, and the median norm 1.92" in fact.evidence
    assert "clipping" in found(run)
    half = SPIKE | {"threshold": np.full(N, 2.0)}
    assert "clipping" not in found(half)


def test_skipped_steps():
    skipped = np.zeros(N, int)
    skipped[[300, 301, 350]] = 1
    run = SPIKE | {"skip/skipped_steps": np.cumsum(skipped)}
    fact = facts.skipping(timeline_of(run))
    assert fact.steps == (30_000, 30_050)
    assert fact.evidence == (
        "3 of 400 steps were skipped, the first at step 30,000 and the last at step "
        "30,050; at most 2 in a row."
    )
    assert "The step was skipped." in found(run)["spike"].evidence


def test_last_typical_step_is_before_the_ramp_to_a_spike():
    norm = changed(series()[0], slice(290, 300), np.linspace(2.5, 8.0, 10))
    norm[300] *= 500.0
    fact = found(logs(norm))["checkpoint"]
    assert fact.steps == (29_989, 29_990, 30_000)
    assert fact.evidence == (
        "The last step with a typical norm before the spike is 29,989: use a "
        "checkpoint from that step or earlier, and the batches of steps 29,990 to "
        "30,000."
    )


def test_batches_include_typical_ones_before_the_spike():
    assert found(logs(changed(series()[0], 300, 500.0)))["checkpoint"].steps == (
        29_999,
        29_993,
        30_000,
    )


# --- reading --------------------------------------------------------------------------


def rows_of(columns):
    rows = zip(*(np.asarray(x).tolist() for x in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def test_paths_rows_and_arrays_give_the_same_facts(tmp_path):
    rows = rows_of(OVERFLOW)
    null = [{k: None if v != v else v for k, v in row.items()} for row in rows]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(map(json.dumps, null)), encoding="utf-8")
    expected = found(OVERFLOW)
    for source in (rows, null, iter(rows), path, str(path), tmp_path):
        assert found(source) == expected


def test_leaves_are_read_as_optclip_writes_them():
    chain = optax.chain(
        optclip.record_norms(),
        optclip.clip_by_leaf_norm(1.0),
        optclip.clip_by_global_norm(1.0),
        optax.adam(1e-3),
    )
    params = {"enc": {"w": jnp.ones(3)}, "b": jnp.ones(2)}
    tx = optclip.skip_steps(chain)
    state = tx.init(params)
    _, state = tx.update(params, state, params, loss=1.0)
    row = optclip.metrics(state) | optclip.leaf_metrics(state, params)
    assert leaf_columns([row]) == {"enc/w": "enc/w/norm_before", "b": "b/norm_before"}
    prefixed = optclip.metrics(state, "critic") | optclip.leaf_metrics(
        state, params, "leaf"
    )
    assert set(leaf_columns([prefixed])) == {"leaf/enc/w", "leaf/b"}
    assert leaf_columns([{"clip/norm_before": 1.0, "norm": 2.0}]) == {}


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (5, TypeError, r"`logs` must be the path of a log .*got int"),
        (b"metrics.jsonl", TypeError, r"`logs` must be the path .*got bytes"),
        ([{"norm": 1.0}, 2.0], TypeError, r"one dict per step, got a float in it"),
        (["norm"], TypeError, r"one dict per step, got a str in it"),
        ("", ValueError, r"`logs` must be a path, got an empty one"),
        ("no-such-folder", ValueError, r"`logs`: no-such-folder does not exist"),
        ([], ValueError, r"`logs`: The list has no rows"),
        ({"norm": []}, ValueError, r"`logs`: The mapping has no rows"),
        (
            [{"step": 1, "accuracy": 0.5}],
            ValueError,
            r"`logs`: The list has no gradient norm and no loss: none of skip/norm, .*",
        ),
        ({"norm": [1.0, -1.0]}, ValueError, r"`logs`: .*'norm' must be a norm"),
        (
            {"norm": [1.0], "loss": [1.0, 2.0]},
            ValueError,
            r"`logs`: .*one entry a step",
        ),
    ],
)
def test_mistaken_logs_raise_an_error(source, error, message):
    with pytest.raises(error, match=message):
        ask(logs=source)


def test_data_frame_is_named_in_the_error():
    class Frame:
        """A data frame iterates over the names of its columns."""

        def __iter__(self):
            return iter(["norm"])

        def to_dict(self):
            raise AssertionError

    with pytest.raises(TypeError, match=r"pass `frame.to_dict\(\"list\"\)`"):
        timeline_of(Frame())


# --- the report -----------------------------------------------------------------------

PARAMS = {"a": 0.5 * jnp.eye(8), "b": 0.5 * jnp.eye(8)}
BATCHES = list(np.random.default_rng(1).normal(size=(5, 8, 8)).astype(np.float32))


def loss_fn(params, batch):
    return jnp.mean((jnp.tanh(batch @ params["a"]) @ params["b"] - batch) ** 2)


def ask(**options):
    return optclip.diagnose(
        loss_fn,
        PARAMS,
        BATCHES,
        optimizer=optax.sgd(0.01),
        progress=False,
        **options,
    )


def test_diagnosis_has_the_history_but_the_same_findings(tmp_path):
    without, diagnosis = ask(), ask(logs=SPIKE)
    assert without.history == ()
    assert "What the run shows" not in str(without)
    assert diagnosis.findings == without.findings
    assert diagnosis.healthy == without.healthy
    assert diagnosis.history == tuple(found(SPIKE).values())
    text = str(diagnosis)
    assert "\n\nWhat the run shows:\n  A spike. At step 30,000, the norm was" in text
    assert max(map(len, text.splitlines())) <= 80
    assert jax.tree.leaves(diagnosis.signals["batch_losses"])


def test_page_has_the_history(tmp_path):
    pytest.importorskip("matplotlib")
    given = (HistoryFact("spike", (3,), "a<b", "The norm of `a<b` was 3."),)
    heading, spike = "<h2>What the run shows</h2>", "At step 30,000, the norm was"
    cases = [
        (SPIKE, Diagnosis((), {}, (), given), [heading, "<code>a&lt;b</code> was 3."]),
        (SPIKE, Diagnosis((), {}), [heading, spike]),
        (SPIKE, None, [heading, spike]),
        (logs(), None, []),
    ]
    for run, diagnosis, expected in cases:
        _, page = optclip.diagnosis.write_report(
            run, diagnosis=diagnosis, output=tmp_path
        )
        text = page.read_text(encoding="utf-8")
        every = [heading, spike, "<code>a&lt;b</code> was 3."]
        assert [words for words in every if words in text] == expected


def test_command_prints_what_the_run_shows(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(map(json.dumps, rows_of(SPIKE))), encoding="utf-8")
    assert command.main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "What the run shows:\n  A spike. At step 30,000, the norm was" in out
    assert "  Where to go back to. The last step with a typical norm" in out


def test_other_runs_in_the_logs_are_named():
    rows = [row | {"run": "a", "seed": 0} for row in rows_of(SPIKE)]
    rows += [row | {"run": "b", "seed": 1} for row in rows_of(SUDDEN)]
    timeline = timeline_of(rows)
    assert (timeline.run.name, timeline.others) == ("b", "a, seed 0")
    assert "the other runs in the logs: a, seed 0" in ask(logs=rows).not_seen


def test_fact_is_frozen_and_names_its_kind():
    fact = HistoryFact("spike", (3,), None, "It rose.")
    assert fact.title == "A spike"
    assert str(fact) == "  A spike. It rose."
    with pytest.raises(dataclasses.FrozenInstanceError):
        fact.kind = "growth"
