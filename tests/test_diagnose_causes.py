"""Causes that are named only after their remedy has been tried, and precision."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip
from optclip.diagnosis import _scales, _trials
from optclip.diagnosis._factors import factors_of
from optclip.diagnosis._limits import LIMITS
from optclip.diagnosis._probe import Knobs, Probe, lost_part
from optclip.diagnosis._rehearsals import Rehearsal, Run, better

RNG = np.random.default_rng(0)
MIX = RNG.normal(size=(6, 2)) / 3


def regression(count=8, scale=1.0, shift=0.0, target=1.0):
    rng = np.random.default_rng(1)
    batches = []
    for _ in range(count):
        x = rng.normal(size=(32, 6))
        y = target * np.tanh(x @ MIX)
        batches.append({"x": jnp.float32(scale * x + shift), "y": jnp.float32(y)})
    return batches


def weights(sizes=(6, 16, 2)):
    rng = np.random.default_rng(2)
    pairs = itertools.pairwise(sizes)
    return [jnp.float32(rng.normal(size=p) / math.sqrt(p[0])) for p in pairs]


def forward(params, x):
    for w in params[:-1]:
        x = jax.nn.gelu(x @ w)
    return x @ params[-1]


def squared(params, batch):
    return jnp.mean((forward(params, batch["x"]) - batch["y"]) ** 2)


def run(loss_fn, batches, optimizer, params=None):
    params = weights() if params is None else params
    return optclip.diagnose(
        loss_fn, params, batches, optimizer=optimizer, progress=False
    )


def only(found):
    assert len(found.findings) == 1, str(found)
    return found.findings[0]


@pytest.mark.parametrize(("changes", "leaf"), [
    ({"scale": 300.0, "shift": 500.0}, "x"), ({"target": 3000.0}, "y"),
])  # fmt: skip
def test_a_leaf_that_is_far_from_unit_scale_is_named(changes, leaf):
    finding = only(run(squared, regression(**changes), optax.sgd(0.05)))
    assert finding.cause == "input_scale"
    assert finding.where == (leaf,)
    assert f"The batch leaf `{leaf}` has a mean of" in finding.evidence
    (remedy,) = finding.remedies
    assert (remedy.kind, remedy.where) == ("standardize", (leaf,))
    assert "In rehearsals of 12 steps, the loss goes from" in remedy.tried
    assert finding.basis == "works"


def test_one_large_column_is_named_by_its_number():
    batches = regression()
    batches = [b | {"x": b["x"].at[:, 4].multiply(1e4)} for b in batches]
    finding = only(run(squared, batches, optax.sgd(0.05)))
    assert finding.cause == "input_scale"
    assert "Column 4 of the batch leaf `x`" in finding.evidence


def test_large_inputs_that_the_model_normalizes_are_not_a_finding():
    def loss_fn(params, batch):
        x = (batch["x"] - 500) / 300
        return squared(params, batch | {"x": x})

    batches = regression(scale=300.0, shift=500.0)
    assert run(loss_fn, batches, optax.sgd(0.05)).healthy


def test_standardized_leaves_have_mean_0_and_deviation_1():
    batches = regression(scale=300.0, shift=500.0)
    constant = [b | {"one": jnp.full(32, 7.0)} for b in batches]
    scales = _scales.scales_of(constant)
    assert [s.path for s in scales] == ["one", "x", "y"]
    made = _scales.standardized(constant, scales[:2])
    rows = np.concatenate([b["x"] for b in made])
    np.testing.assert_allclose(rows.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(rows.std(0), 1, atol=1e-5)
    assert all(np.all(b["one"] == 0) for b in made)
    for before, after in zip(batches, made, strict=True):
        assert np.array_equal(before["y"], after["y"])


def test_labels_are_never_standardized_and_pixels_are():
    batch = {"label": jnp.arange(9), "pixel": jnp.full((9, 4), 200, jnp.uint8)}
    (scale,) = _scales.scales_of([batch, batch])
    assert scale.path == "pixel"
    (made, _) = _scales.standardized([batch, batch], (scale,))
    assert made["pixel"].dtype == jnp.float32
    assert made["label"].dtype == batch["label"].dtype


def test_leaves_that_cannot_be_compared_have_no_scale():
    x, wide = jnp.ones((4, 3)), jnp.ones((4, 5))
    assert _scales.scales_of([{"x": x}, {"x": wide}]) == ()
    assert _scales.scales_of([{"x": x}, {"y": x}]) == ()
    assert _scales.scales_of([{"x": x.at[0, 0].set(jnp.nan)}]) == ()


def test_a_factor_of_a_term_is_named_with_its_line():
    def loss_fn(params, batch):
        penalty = sum(jnp.mean(w**2) for w in params)
        return squared(params, batch) + 5e4 * penalty

    finding = only(run(loss_fn, regression(), optax.sgd(0.05)))
    assert finding.cause == "loss_scale"
    assert "the factor 5e+04 in line" in finding.evidence
    assert "`return squared(params, batch) + 5e4 * penalty`" in finding.evidence
    (remedy,) = finding.remedies
    assert remedy.kind == "divide_factor"
    assert remedy.amount == 100.0  # a tenth is not enough
    assert "has the same effect as a learning rate" in remedy.advice


def test_a_factor_of_the_loss_is_harmless_to_adam():
    def loss_fn(params, batch):
        return 2.0**15 * squared(params, batch)

    assert only(run(loss_fn, regression(), optax.sgd(0.05))).cause == "loss_scale"
    assert run(loss_fn, regression(), optax.adam(1e-3)).healthy


def test_factors_are_products_with_what_does_not_depend_on_the_parameters():
    def loss_fn(params, batch):
        x, level = batch
        y = jax.jit(lambda w: 30.0 * (x @ w))(params) / 0.01
        return jnp.mean(y / level**2) + 0.5 * jnp.sum(params * params)

    batch = (jnp.ones((2, 3)), jnp.array([[0.1], [0.1]]))
    factors = factors_of(loss_fn, jnp.ones((3, 1)), batch)
    sizes = [f.size for f in factors.found]
    np.testing.assert_allclose(sizes, [30.0, 100.0, 100.0, 0.5, 0.5], rtol=1e-5)
    assert [f.weights for f in factors.found] == [False, False, True, False, False]
    assert "y / level**2" in factors.found[2].code
    ones = jnp.ones(len(sizes))
    plain = loss_fn(jnp.ones((3, 1)), batch)
    same = factors.run(jnp.ones((3, 1)), batch, ones)
    np.testing.assert_allclose(same, plain, rtol=1e-6)
    half = factors.run(jnp.ones((3, 1)), batch, ones.at[0].set(0.5))
    np.testing.assert_allclose(half - 1.5, (plain - 1.5) / 2, rtol=1e-6)


def test_updates_that_are_rounded_away_are_counted():
    params = {"a": jnp.ones(4, jnp.bfloat16), "b": jnp.ones(4, jnp.float32)}
    updates = {
        "a": jnp.array([0, 1e-4, 1e-4, 0.1], jnp.bfloat16),
        "b": jnp.full(4, 1e-9, jnp.float32),
    }
    assert lost_part(params, updates) == pytest.approx(2 / 3)
    assert lost_part({"b": params["b"]}, {"b": updates["b"]}) == 0.0


def test_parameters_whose_updates_are_rounded_away_are_named():
    low = jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights())
    finding = only(run(squared, regression(), optax.adam(1e-5), low))
    assert finding.cause == "precision"
    assert "of parameters in bfloat16 are too small to change them" in finding.evidence
    assert run(squared, regression(), optax.adam(1e-5)).healthy


def test_a_sum_in_bfloat16_that_differs_from_float32_is_named():
    def loss_fn(params, batch):
        y = forward(params, batch["x"]).astype(jnp.bfloat16)
        total, _ = jax.lax.scan(lambda s, _: (s + y, None), 0 * y, None, 1500)
        return jnp.mean((total.astype(jnp.float32) / 1500 - batch["y"]) ** 2)

    finding = only(run(loss_fn, regression(), optax.adam(1e-3)))
    assert finding.cause == "precision"
    assert "if the same program runs in float32" in finding.evidence


def test_an_activation_outside_of_its_domain_is_not_a_growing_signal():
    def untaken(x):
        return jnp.where(x > 0, jnp.sqrt(x), 0.0)

    def logarithm(x):
        return jnp.log(x)

    for act in (untaken, logarithm):

        def loss_fn(params, batch, act=act):
            x = batch["x"]
            for w in params[:-1]:
                x = act(x @ w)
            return jnp.mean((x @ params[-1] - batch["y"]) ** 2)

        params = weights((6, 16, 16, 2))
        finding = only(run(loss_fn, regression(), optax.adam(1e-3), params))
        assert (finding.cause, finding.basis) == ("not_finite", "measured")


def rehearsal(starts, ends, empty=math.nan):
    runs = [Run([s] * 4, [s] * 8 + [e] * 4) for s, e in zip(starts, ends, strict=True)]
    return Rehearsal(tuple(runs), empty)


def test_a_change_must_be_better_with_every_order_of_the_batches():
    failing = rehearsal([1.0, 1.0], [9.0, 9.0])
    assert failing.fails
    assert better(rehearsal([1.0, 1.0], [0.9, 0.9]), failing, 2.0)
    assert not better(rehearsal([1.0, 1.0], [0.9, 1.3]), failing, 2.0)
    falling = rehearsal([1.0, 1.0], [0.9, 0.9])
    assert not better(rehearsal([1.0, 1.0], [0.5, 0.5]), falling, 2.0)
    assert better(rehearsal([1.0, 1.0], [0.4, 0.4]), falling, 2.0)
    assert not better(rehearsal([1.0, 1.0], [0.4, 0.5]), falling, 2.0)


def test_a_trained_model_may_get_a_little_worse():
    failing = rehearsal([40.0, 150.0], [math.inf, math.inf], empty=2.3)
    assert better(rehearsal([0.4, 0.2], [0.3, 0.5], empty=2.3), failing, 2.0)
    assert not better(rehearsal([0.4, 0.2], [0.3, 2.5], empty=2.3), failing, 2.0)


def test_losses_in_other_units_are_compared_to_those_of_an_untrained_model():
    large = rehearsal([4e4, 4e4], [3e4, 3e4], empty=2e4)
    assert better(rehearsal([2.0, 2.0], [0.7, 0.7], empty=1.0), large, 2.0)
    assert not better(rehearsal([2.0, 2.0], [0.8, 0.8], empty=1.0), large, 2.0)


def trials_of(loss_fn, optimizer, batches=None):
    params = weights()
    probe = Probe(loss_fn, optax.with_extra_args_support(optimizer), lambda words: None)
    batches = batches or regression()
    probe.read(params, batches[0])
    return _trials.Trials(probe, params, probe.optimizer.init(params), batches, False)


def test_knobs_scale_the_updates_the_loss_and_bound_the_gradient():
    trials = trials_of(squared, optax.sgd(0.5))
    params, batch = trials.params, trials.batches[0]
    grads = jax.grad(squared)(params, batch)
    norm = float(optclip.norms.global_norm(grads))
    cases = [
        (Knobs(update=0.1), 0.05),
        (Knobs(loss=0.1), 0.05),
        (Knobs(bound=norm / 2), 0.25),
        (Knobs(bound=2 * norm), 0.5),
    ]
    for knobs, rate in cases:
        after, *_ = trials.probe._one_step(params, trials.opt_state, batch, knobs)
        for w, g, moved in zip(params, grads, after, strict=True):
            np.testing.assert_allclose(moved, w - rate * g, rtol=1e-5, atol=1e-7)


def test_remedies_that_change_the_program_are_not_tried():
    trials = trials_of(squared, optax.sgd(0.05))
    assert trials.of(optclip.diagnosis.Remedy("normalize")) is None
    assert trials.of(optclip.diagnosis.Remedy("advice")) is None
    tried = trials.of(optclip.diagnosis.Remedy("scale_learning_rate", 0.1))
    again = trials.of(optclip.diagnosis.Remedy("scale_learning_rate", 0.1))
    assert tried is again
    assert len(tried.runs) == 2
    assert all(len(run.losses) == 12 for run in tried.runs)


def test_a_change_that_the_model_does_not_accept_is_not_a_remedy():
    def loss_fn(params, batch):
        assert batch["x"].dtype == jnp.uint8
        return squared(params, batch | {"x": batch["x"].astype(jnp.float32)})

    batches = [b | {"x": jnp.ones((32, 6), jnp.uint8)} for b in regression()]
    trials, said = trials_of(loss_fn, optax.sgd(0.05), batches), []
    trials.probe.show = said.append
    assert trials.of(optclip.diagnosis.Remedy("standardize", None, ("x",))) is None
    assert said[-1].startswith("it can't be tried (AssertionError")


def test_a_remedy_that_was_tried_in_vain_is_left_out():
    # The rate is far too high, and the loss has a factor that does not matter to Adam.
    def loss_fn(params, batch):
        return 1e3 * squared(params, batch)

    found = run(loss_fn, regression(), optax.adam(30.0))
    assert "loss_scale" not in [f.cause for f in found.findings]
    assert found.findings[0].cause == "learning_rate"


def test_limits_are_documented():
    fields = {field.name for field in dataclasses.fields(LIMITS)}
    assert all(f"{name}:" in type(LIMITS).__doc__ for name in fields)


def test_the_loss_is_traced_three_times():
    # Alone, in the gradient with its statistics, and in a step of the optimizer.
    calls = []

    def loss_fn(params, batch):
        calls.append(None)
        return squared(params, batch)

    assert run(loss_fn, regression(), optax.adam(1e-3)).healthy
    assert len(calls) == 3
