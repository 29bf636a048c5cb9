"""`optclip.diagnose` on small models with one fault each, and on healthy ones."""

import dataclasses
import math

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from optclip.diagnosis import _probe, _rules, _signals, diagnose
from optclip.diagnosis._candidates import Candidate
from optclip.diagnosis._growth import Growth
from optclip.diagnosis.findings import CAUSES, Finding

WIDTH = 16


def batches_of(count=8, size=8, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(size, WIDTH)).astype(np.float32) for _ in range(count)]


def weights_of(layers, gain=1.0, seed=0):
    rng = np.random.default_rng(seed)
    scale = gain * math.sqrt(2 / WIDTH)
    return [
        jnp.asarray(scale * rng.normal(size=(WIDTH, WIDTH)), jnp.float32)
        for _ in range(layers)
    ]


def network(activation=jax.nn.relu, reduce=jnp.mean):
    def loss_fn(params, x):
        target = x[:, ::-1]
        for w in params[:-1]:
            x = activation(x @ w)
        return reduce((x @ params[-1] - target) ** 2)

    return loss_fn


def recurrence(params, x):
    def step(h, _):
        return h @ params[0], None

    return jnp.mean(jax.lax.scan(step, x, None, 40)[0] ** 2)


def in_half(params, x):
    return network()(jax.tree.map(jnp.float16, params), jnp.float16(300 * x)).astype(
        jnp.float32
    )


def spoiled():
    batches = batches_of()
    batches[5] = 1e4 * batches[5]
    return batches


ORTHOGONAL = np.linalg.qr(np.random.default_rng(0).normal(size=(WIDTH, WIDTH)))[0]
CASES = {
    "healthy": (network(), weights_of(4), batches_of(), 0.05),
    "initialization": (network(), weights_of(6, gain=3.0), batches_of(), 1e-9),
    "depth": (network(), weights_of(40, gain=1.19), batches_of(), 1e-9),
    "recurrence": (
        recurrence, [jnp.asarray(1.1 * ORTHOGONAL, jnp.float32)], batches_of(), 1e-6,
    ),
    "activation": (
        network(lambda x: x**2 + x), weights_of(4), batches_of(), 1e-30,
    ),
    "learning_rate": (network(), weights_of(4), batches_of(), 50.0),
    "bad_batch": (network(), weights_of(4), spoiled(), 0.05),
    "overflow": (in_half, weights_of(8, gain=1.5), batches_of(), 1e-3),
    "loss_sum": (network(reduce=jnp.sum), weights_of(4), batches_of(), 1e-5),
    "vanishing": (network(jax.nn.sigmoid), weights_of(12, gain=0.7), batches_of(), 0.1),
}  # fmt: skip


def run(loss_fn, params, batches, rate, **options):
    return diagnose(
        loss_fn, params, batches, optimizer=optax.sgd(rate), progress=False, **options
    )


@pytest.mark.parametrize("cause", CASES)
def test_each_cause_is_named_first(cause):
    found = run(*CASES[cause])
    causes = [finding.cause for finding in found.findings]
    assert causes[:1] == ([] if cause == "healthy" else [cause]), str(found)
    assert found.healthy == (cause == "healthy")
    for finding in found.findings:
        assert finding.cause in CAUSES
        assert "nan" not in str(finding)
        assert finding.title in str(found)


def test_bad_batch_is_reported_by_its_original_index():
    (finding,) = run(*CASES["bad_batch"]).findings
    assert finding.where == ("batch 5",)
    first = finding.remedies[0]
    assert (first.kind, first.amount, first.where) == ("drop_batches", None, ("5",))


def test_scale_weights_remedy_restores_the_expected_weight_scale():
    (finding,) = run(*CASES["initialization"]).findings
    factors = [a.amount for a in finding.remedies if a.kind == "scale_weights"]
    np.testing.assert_allclose(factors, 1 / 3, rtol=0.2)


def test_other_nonfinite_causes_are_named_with_their_operation():
    def loss_fn(params, x):
        return jnp.mean(jnp.log(jnp.square(x @ params[0]) - 1e9))

    (finding,) = run(loss_fn, weights_of(1), batches_of(), 0.1).findings
    assert (finding.cause, finding.basis) == ("not_finite", "measured")
    assert "`log` (a logarithm of zero or of a negative number)" in finding.evidence
    assert "return jnp.mean(jnp.log(jnp.square(" in " ".join(finding.evidence.split())


def test_nonfinite_numbers_without_a_known_operation_are_less_certain(
    monkeypatch,
):
    monkeypatch.setattr(_probe, "origin_of", lambda *args: 1 / 0)

    def loss_fn(params, x):
        return jnp.mean(jnp.log(jnp.square(x @ params[0]) - 1e9))

    (finding,) = run(loss_fn, weights_of(1), batches_of(), 0.1).findings
    assert (finding.cause, finding.basis) == ("not_finite", "eliminated")
    assert "jax_debug_nans" in finding.remedy


def signals_of(**changes):
    batch = _probe.Batch(1.0, 1.0, (), ())
    signals = _signals.Signals(
        (batch,) * 8, (), 0, [], None, None, {}, [], trust={1.0: 0.9},
        rehearsals={1.0: [1.0] * 12, 0.1: [1.0] * 12}, starts=[1.0] * 12,
    )  # fmt: skip
    return dataclasses.replace(signals, **changes)


def test_signals_without_a_fault_are_healthy():
    assert _rules.judge(signals_of()) == ()


wild = st.floats(allow_nan=True, allow_infinity=True)


LAYERS = Growth(1.0, 1.0, 20, ("w",), 1.1)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(wild, wild), min_size=1, max_size=8), wild, wild, wild)
def test_nonfinite_signals_are_never_healthy(pairs, relu, wide, scaled):
    batches = tuple(_probe.Batch(loss, abs(norm), (), ()) for loss, norm in pairs)
    outliers = _signals.outliers_of(list(batches))
    signals = signals_of(
        batches=batches, outliers=outliers, relu_norm=relu, wide_norm=wide,
        scaled_norm=scaled, typical=0, depth=LAYERS,
    )  # fmt: skip
    found = _rules.judge(signals)
    if not all(batch.finite for batch in batches):
        assert found
    for finding in found:
        assert "nan" not in finding.evidence


@pytest.mark.parametrize("scaled", [0.0, 1e-30, math.inf, math.nan])
def test_a_gradient_that_overflows_with_other_weights_is_no_evidence(scaled):
    signals = signals_of(depth=LAYERS, scaled_norm=scaled)
    assert signals.by_depth == (scaled < 1)
    assert [f.cause for f in _rules.judge(signals)] == ["depth"] * (scaled < 1)


@pytest.mark.parametrize("losses", [[math.nan] * 3, [1.0, math.inf], [9.0] * 12])
def test_a_rehearsal_that_fails_at_every_rate_has_an_unknown_cause(losses):
    (finding,) = _rules.judge(signals_of(rehearsals={1.0: losses, 0.1: losses}))
    assert finding.cause == "unknown"
    assert finding.headline == "Training fails, and the cause is unknown"
    assert [r.kind for r in finding.remedies] == ["advice"]
    assert "At 0.1 times the learning rate, it ends at" in finding.evidence


def test_learning_rate_is_lowered_only_as_far_as_the_rehearsals_require():
    rising, falling = [1.0] * 8 + [9.0] * 4, [1.0] * 8 + [0.5] * 4
    signals = signals_of(
        trust={1.0: -3.0, 0.1: -2.0, 0.001: 0.9},
        rehearsals={1.0: rising, 0.1: [2.0] * 12, 0.03: falling, 0.01: [0.45] * 12},
    )
    (finding,) = _rules.judge(signals)
    first = finding.remedies[0]
    assert (first.kind, first.amount) == ("scale_learning_rate", 0.03)
    assert finding.evidence.endswith("goes from 1 to 9; with 0.03 of the learning "
                                     "rate, to 0.5.")  # fmt: skip
    none_fall = {1.0: rising, 0.1: [2.0] * 12, 0.03: [3.0] * 12}
    (finding,) = _rules.judge(dataclasses.replace(signals, rehearsals=none_fall))
    assert finding.cause == "unknown"


def test_a_lower_rate_must_win_with_every_order_of_the_batches():
    rising, falling = [1.0] * 8 + [9.0] * 4, [1.0] * 8 + [0.5] * 4
    signals = signals_of(
        rehearsals={1.0: rising, 0.1: falling},
        repeat_starts=[1.0] * 12,
        repeats={1.0: rising, 0.1: falling},
    )
    (finding,) = _rules.judge(signals)
    assert finding.cause == "learning_rate"
    assert "(and with the batches in another order)" in finding.evidence
    once = dataclasses.replace(signals, repeats={1.0: falling, 0.1: falling})
    assert _rules.judge(once) == ()


@pytest.mark.parametrize("cause", ["recurrence", "initialization", "activation"])
def test_growth_over_layers_is_attributed_to_its_cause(monkeypatch, cause):
    def rule_of(cause, benefit):
        finding = Finding(cause, (), "", (), "high")
        return lambda s: Candidate(finding, benefit)

    rules = (rule_of("depth", 9.0), rule_of(cause, 1.0), rule_of("loss_sum", 0.5))
    monkeypatch.setattr(_rules, "RULES", rules)
    assert [f.cause for f in _rules.judge(signals_of())] == [cause, "loss_sum"]
    monkeypatch.setattr(_rules, "RULES", rules[::2])
    assert [f.cause for f in _rules.judge(signals_of())] == ["depth", "loss_sum"]


def test_small_loss_increase_near_zero_is_not_a_finding():
    signals = signals_of(
        begun=True, starts=[0.02] * 12, empty_loss=2.3,
        rehearsals={1.0: [0.02] * 8 + [0.1] * 4, 0.1: [0.02] * 12},
    )  # fmt: skip
    assert _rules.judge(signals) == ()
    for changes in (
        {"empty_loss": 0.2},
        {"empty_loss": 0.01},
        {"empty_loss": math.nan},
    ):
        (finding,) = _rules.judge(dataclasses.replace(signals, **changes))
        assert finding.cause == "learning_rate"


def test_steps_that_make_progress_are_not_too_large():
    signals = signals_of(
        trust={1.0: 0.3, 0.1: 0.95}, rehearsals={1.0: [0.5] * 12, 0.1: [0.9] * 12}
    )
    assert _rules.judge(signals) == ()
    # The full rate wins by less than noise, or not at all.
    for end, causes in ((0.85, []), (0.9, []), (1.05, ["learning_rate"])):
        tried = {1.0: [end] * 12, 0.1: [0.9] * 12}
        found = _rules.judge(dataclasses.replace(signals, rehearsals=tried))
        assert [f.cause for f in found] == causes, end


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(WIDTH)(x))
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        return nn.Dense(WIDTH)(x)


def linen():
    model = Linen()
    key = jax.random.key(0)
    variables = model.init(key, batches_of()[0], train=False)

    def loss_fn(params, x):
        given = {**variables, "params": params}
        y, updated = model.apply(given, x, rngs={"dropout": key}, mutable="batch_stats")
        return jnp.mean((y - x) ** 2), updated

    return loss_fn, variables["params"], True


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(nnx.relu(self.norm(self.first(x)))))


def in_nnx():
    return lambda model, x: jnp.mean((model(x) - x) ** 2), Nnx(nnx.Rngs(0)), False


def in_equinox():
    model = eqx.nn.MLP(WIDTH, WIDTH, WIDTH, 2, key=jax.random.key(0))
    return lambda m, x: jnp.mean((jax.vmap(m)(x) - x) ** 2), model, False


@pytest.mark.parametrize("make", [linen, in_nnx, in_equinox])
def test_models_with_dropout_and_batch_statistics(make):
    loss_fn, params, has_aux = make()
    found = run(loss_fn, params, batches_of(), 0.05, has_aux=has_aux)
    assert found.healthy, str(found)
    leaves = [s.leaf for s in found.signals["sites"] if s.kind == "matmul"]
    assert len(leaves) == (3 if make is in_equinox else 2)


def test_nnx_model_is_not_modified():
    loss_fn, model, _ = in_nnx()
    before = jax.tree.map(jnp.array, nnx.state(model))
    run(loss_fn, model, batches_of(), 0.05)
    after = nnx.state(model)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert jnp.array_equal(old, new)


def test_diagnosis_continues_if_the_program_cannot_be_analyzed(monkeypatch):
    def fail(*_):
        raise AttributeError("no `eqns`")

    monkeypatch.setattr(_probe, "tapped", fail)
    found = run(*CASES["loss_sum"])
    assert [f.cause for f in found.findings] == ["loss_sum"]
    assert any("could not be read with JAX" in words for words in found.not_seen)
    healthy = run(*CASES["healthy"])
    assert healthy.healthy
    assert "Not seen: where the signal grows" in str(healthy)


def test_few_batches_and_progress(capsys):
    loss_fn, params, batches, rate = CASES["healthy"]
    found = diagnose(loss_fn, params, batches[:2], optimizer=optax.sgd(rate))
    assert any("4 batches or more" in words for words in found.not_seen)
    assert "gradients of 2 batches" in capsys.readouterr().err
    found = run(loss_fn, params, iter(batches), rate, max_batches=4)
    assert any("after the first 4" in words for words in found.not_seen)


def test_errors():
    loss_fn, params, batches, rate = CASES["healthy"]
    with pytest.raises(ValueError, match="`batches` is empty"):
        run(loss_fn, params, [], rate)
    with pytest.raises(ValueError, match="`params` has no leaf"):
        run(loss_fn, {"n": 1}, batches, rate)
    with pytest.raises(ValueError, match="must return a real scalar"):
        run(lambda p, x: x @ p[0], params, batches, rate)
    with pytest.raises(ValueError, match="give `has_aux=True`"):
        run(lambda p, x: (loss_fn(p, x), x), params, batches, rate)
    with pytest.raises(
        ValueError, match="`rehearsal_steps` must be an int >= 8, got 7"
    ):
        run(loss_fn, params, batches, rate, rehearsal_steps=7)
    with pytest.raises(TypeError, match="optimizer"):
        diagnose(loss_fn, params, batches, optimizer=0.1)
