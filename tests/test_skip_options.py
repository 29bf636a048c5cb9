"""Separate rules for norm and loss, masks, and saturated counters."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip
from optclip import rules, scopes

PARAMS = {"train": jnp.ones(2), "frozen": {"a": jnp.ones(3), "b": jnp.ones(1)}}
MAX = np.iinfo(np.int32).max


def of_norm(norm, frozen=1.0):
    return {
        "train": jnp.array([0.6, 0.8]) * norm,
        "frozen": {"a": jnp.full(3, frozen), "b": jnp.full(1, frozen)},
    }


def run(tx, norms, losses):
    step = jax.jit(lambda g, s, loss: tx.update(g, s, PARAMS, loss=loss))
    state, skipped = tx.init(PARAMS), []
    for norm, loss in zip(norms, losses, strict=True):
        _, state = step(of_norm(norm, 0.0), state, jnp.float32(loss))
        skipped.append(int(state.skipped_run) > 0)
    return skipped, state


# --- rules for norm and loss apart ----------------------------------------------------


@pytest.mark.parametrize("bound", [7, -1.0, jnp.float32(7)])
def test_bound_on_the_loss_alone(bound):
    tx = optclip.skip_steps(optax.sgd(1.0), when=jnp.inf, when_loss=bound)
    low, high = (6.9, 7.1) if bound > 0 else (-1.1, -0.9)
    norms, losses = [1.0, 1e30, 1.0, 1.0], [low, low, high, np.nan]
    skipped, state = run(tx, norms, losses)
    assert skipped == [False, False, True, True]
    assert float(optclip.metrics(state)["skip/loss_threshold"]) == bound
    assert int(state.spike_steps) == 1


def test_schedule_bounds_the_loss_and_a_nan_schedule_skips_every_step():
    def when_loss(step):
        return jnp.where(step == 2, jnp.nan, 10.0 - step)

    tx = optclip.skip_steps(optax.sgd(1.0), when=jnp.inf, when_loss=when_loss)
    skipped, state = run(tx, [1.0] * 5, [9.5, 9.5, -9.5, 6.5, 6.5])
    assert skipped == [False, True, True, False, True]
    assert np.isfinite(state.skip_loss_above)


def test_norm_and_loss_can_have_separate_rules():
    tx = optclip.skip_steps(
        optax.sgd(1.0), when=10.0,
        when_loss=rules.window_sigma(6.0, window=8, unbiased=True),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    norms, losses = np.ones(40), -3 + 0.1 * rng.normal(size=40)
    norms[20], losses[30] = 11, -1
    skipped, state = run(tx, norms, losses)
    assert np.flatnonzero(skipped).tolist() == [20, 30]
    assert state.norm_rule_state == state.offered_norms == ()


def test_rule_for_the_norm_does_not_judge_the_loss():
    rule = rules.window_sigma(6.0, window=8)
    tx = optclip.skip_steps(optax.sgd(1.0), when=rule)
    losses = np.r_[np.ones(20), 1e6, -1e6, np.inf, 1.0]
    skipped, state = run(tx, np.ones(24), losses)
    assert np.flatnonzero(skipped).tolist() == [22]
    assert state.loss_rule_state == ()


def test_only_the_rule_that_lost_its_values_restarts():
    tx = optclip.skip_steps(optax.sgd(1.0), max_similar=None, max_consecutive=4)
    rng = np.random.default_rng(0)
    norms, losses = np.exp(0.1 * rng.normal(size=100)), 1 + 0.1 * rng.normal(size=100)
    losses[80:] += 50
    skipped, state = run(tx, norms, losses)
    assert np.flatnonzero(skipped).tolist() == [80, 81, 82, 83]
    assert int(state.loss_rule_state.recorded) == 16
    assert int(state.norm_rule_state.recorded) == 96


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (lambda: rules.window_percentile(90.0), "window_percentile"),
        (lambda: rules.log_window_sigma(), "log_window_sigma"),
        (lambda: rules.constant(7.0), "constant"),
    ],
)
def test_norm_rule_raises_an_error_for_the_loss(rule, name):
    message = rf"`when_loss` must be .*negative, got `{name}`, .*window_sigma`.*signed"
    with pytest.raises(ValueError, match=message):
        optclip.skip_steps(optax.sgd(1.0), when_loss=rule())


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"when_loss": np.nan}, ValueError, "`when_loss` must be other than NaN"),
        ({"when_loss": "high"}, TypeError, "`when_loss` must be a number"),
        ({"when_loss": True}, TypeError, "`when_loss` must be a number"),
        ({"max_similar": 0}, ValueError, "`max_similar` must be an int >= 1"),
        ({"max_similar": jnp.int32(3)}, ValueError, 'static_args=."max_similar",'),
    ],
)
def test_invalid_options_raise_errors_that_list_allowed_values(options, kind, message):
    with pytest.raises(kind, match=message):
        optclip.skip_steps(optax.sgd(1.0), **options)


def test_inject_hyperparams_changes_the_loss_bound():
    def make(bound):
        return optclip.skip_steps(optax.sgd(1.0), when=jnp.inf, when_loss=bound)

    tx = optax.inject_hyperparams(make)(bound=2.0)
    step = jax.jit(lambda s, loss: tx.update(of_norm(1.0), s, PARAMS, loss=loss))
    _, state = step(tx.init(PARAMS), 3.0)
    assert int(optclip.metrics(state)["skip/in_a_row"]) == 1
    state.hyperparams["bound"] = jnp.float32(5.0)
    _, state = step(state, 3.0)
    assert int(optclip.metrics(state)["skip/in_a_row"]) == 0


# --- masks ----------------------------------------------------------------------------

TRAINED = {"train": True, "frozen": False}
BY_NAME = optax.partition(
    {"train": optax.adam(0.1), "frozen": optax.set_to_zero()},
    {"train": "train", "frozen": "frozen"},
)
WRAPPERS = {
    "skip_steps": lambda **o: optclip.skip_steps(BY_NAME, when=10.0, **o),
    "stabilize": lambda **o: optclip.stabilize(BY_NAME, **o),
    "stabilize-leaf": lambda **o: optclip.stabilize(
        BY_NAME, scope=scopes.leaf(), **o
    ),
}  # fmt: skip
MASKS = {
    "prefix": TRAINED,
    "leaves": {"train": True, "frozen": {"a": np.bool_(False), "b": False}},
    "function": lambda tree: {k: k == "train" for k in tree},
}


@pytest.mark.parametrize(
    ("wrapper", "mask"),
    [("stabilize-leaf", "prefix"),
     ("stabilize", "function"), *(("skip_steps", m) for m in MASKS)],
)  # fmt: skip
def test_masked_out_leaves_neither_skip_nor_change_a_step(wrapper, mask):
    tx = WRAPPERS[wrapper](mask=MASKS[mask])
    step = jax.jit(lambda g, s: tx.update(g, s, PARAMS))
    outs = []
    for frozen in (1.0, jnp.nan, -jnp.inf, 1e30):
        state = tx.init(PARAMS)
        for norm in (1.0, 2.0, 0.5):
            out, state = step(of_norm(norm, frozen), state)
        assert bool(optclip.step_taken(state))
        outs.append((out, state.optimizer_state))
    assert float(jnp.max(jnp.abs(outs[0][0]["train"]))) > 0
    for other in outs[1:]:
        chex.assert_trees_all_equal(other, outs[0])
    chex.assert_tree_all_finite(outs)
    _, state = step(of_norm(jnp.nan), state)
    assert not bool(optclip.step_taken(state))
    chex.assert_trees_all_equal(state.optimizer_state, outs[-1][1])


@pytest.mark.parametrize("wrapper", ["skip_steps", "stabilize"])
def test_masked_out_gradients_reach_the_optimizer_unchanged(wrapper):
    make = getattr(optclip, wrapper)
    options = {} if wrapper == "skip_steps" else {"max_ratio": 1e-3}
    tx = make(optax.sgd(1.0), mask=TRAINED, **options)
    out, _ = jax.jit(tx.update)(of_norm(1.0, 1e6), tx.init(PARAMS), PARAMS)
    chex.assert_trees_all_equal(out["frozen"], {"a": jnp.full(3, -1e6),
                                                "b": jnp.full(1, -1e6)})  # fmt: skip


def test_without_a_mask_a_frozen_nan_skips_the_step():
    tx = WRAPPERS["skip_steps"]()
    _, state = jax.jit(tx.update)(of_norm(1.0, jnp.nan), tx.init(PARAMS), PARAMS)
    assert not bool(optclip.step_taken(state))


@pytest.mark.parametrize("wrapper", ["skip_steps", "stabilize"])
def test_nonfinite_leaves_and_metrics_cover_only_masked_in_leaves(wrapper):
    tx = WRAPPERS[wrapper](mask=TRAINED)
    state = tx.init(PARAMS)
    _, state = jax.jit(tx.update)(of_norm(jnp.nan, jnp.nan), state, PARAMS)
    assert [c.path for c in optclip.nonfinite_leaves(state, PARAMS)] == ["train"]


@pytest.mark.parametrize("mask", [False, {"train": False, "frozen": False}])
def test_empty_mask_does_not_change_the_optimizer(mask):
    tx = optclip.skip_steps(optax.sgd(1.0), mask=mask)
    out, state = jax.jit(tx.update)(of_norm(jnp.nan), tx.init(PARAMS), PARAMS)
    assert np.isnan(out["train"]).all()
    assert int(state.skipped_steps) == 0


@pytest.mark.parametrize("wrapper", ["skip_steps", "stabilize"])
@pytest.mark.parametrize(
    ("mask", "kind", "message"),
    [
        ({"train": 1, "frozen": 0}, TypeError, "`mask` must be a pytree of booleans"),
        ("train", TypeError, "`mask` must be .*got a leaf 'train' of type str"),
        ({}, TypeError, "`mask` must contain at least one boolean"),
        (lambda tree: {"train": "yes"}, TypeError, "got a leaf 'yes' of type str"),
        ({"train": True}, ValueError, "`mask` must have the structure of the updates"),
        ({"train": [True, False], "frozen": False}, ValueError, "`mask` must have the"),
    ],
)
def test_invalid_mask_raises_an_error_that_says_what_is_allowed(
    wrapper, mask, kind, message
):
    with pytest.raises(kind, match=message):
        WRAPPERS[wrapper](mask=mask).init(PARAMS)


@pytest.mark.parametrize("wrapper", ["skip_steps", "stabilize"])
def test_mask_in_shard_map_with_specs_of_all_leaves(wrapper):
    if jax.device_count() < 4:
        pytest.skip("needs four devices")
    spec, whole = jax.sharding.PartitionSpec("x"), jax.sharding.PartitionSpec()
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((4,), ("x",), axis_types=(auto,), devices=jax.devices()[:4])
    specs = {"train": spec, "frozen": {"a": spec, "b": whole}}
    params = {"train": jnp.ones(8), "frozen": {"a": jnp.ones(8), "b": jnp.ones(1)}}
    tx = WRAPPERS[wrapper](mask=TRAINED, axis_name=specs)

    def step(grads, params):
        out, state = tx.update(grads, tx.init(params), params)
        return out, optclip.step_taken(state)

    run = jax.jit(jax.shard_map(
        step, mesh=mesh, in_specs=(specs, specs), out_specs=(specs, whole),
        check_vma=False,
    ))  # fmt: skip
    for at in ("train", "frozen"):
        grads = jax.tree.map(jnp.ones_like, params)
        leaf = grads["train"] if at == "train" else grads["frozen"]["a"]
        bad = leaf.at[5].set(jnp.nan)
        grads = grads | ({"train": bad} if at == "train" else
                         {"frozen": grads["frozen"] | {"a": bad}})  # fmt: skip
        out, taken = run(grads, params)
        assert bool(taken) == (at == "frozen")
        assert np.all((out["train"] != 0) == (at == "frozen"))
        chex.assert_tree_all_finite(out)


# --- the end of the counters, and strict modes ----------------------------------------


def counters_at_their_end(state):
    def end(x):
        whole = x.dtype == jnp.int32 and x.ndim == 0
        return jnp.full_like(x, MAX) if whole else x

    kept = {k: getattr(state, k) for k in ("optimizer_state", "last_bad")}
    own = state._replace(recent_since=jnp.float32(-1), **dict.fromkeys(kept, ()))
    ended = jax.tree.map(end, own)
    return ended._replace(recent_since=jnp.int32(-1), **kept)


def test_bad_steps_are_still_recorded_after_counters_saturate():
    tx = optclip.skip_steps(optax.sgd(1.0), when=10.0, keep_last=2)
    step = jax.jit(lambda g, s: tx.update(g, s, PARAMS))
    state = counters_at_their_end(tx.init(PARAMS))
    for norm in (20.0, 1.0, 30.0, jnp.nan, 40.0):
        _, state = step(of_norm(norm, 0.0), state)
        counters = state._replace(nonfinite=state.nonfinite._replace(leaf_code=()))
        for x in jax.tree.leaves(counters):
            assert x.dtype != jnp.int32 or np.min(x) >= -1
    metrics = optclip.metrics(state)
    for key in ("steps", "skipped_steps", "spike_steps", "nonfinite_steps"):
        assert int(metrics[f"skip/{key}"]) == MAX
    assert int(metrics["skip/in_a_row"]) == 3
    np.testing.assert_allclose(metrics["skip/recent_fraction"], 4 / 512)
    assert int(metrics["skip/recent_since"]) == MAX
    state = state._replace(nonfinite=tx.init(PARAMS).nonfinite)
    assert [c.norm for c in optclip.nonfinite_leaves(state, PARAMS)][:1] == [40.0]
    np.testing.assert_array_equal(state.last_bad.bad_norm, [40.0, np.nan])


def test_count_of_consecutive_skipped_steps_saturates():
    tx = optclip.skip_steps(optax.sgd(1.0))
    state = tx.init(PARAMS)._replace(skipped_run=jnp.int32(MAX))
    _, state = jax.jit(tx.update)(of_norm(jnp.nan), state, PARAMS)
    assert int(state.skipped_run) == MAX
    assert not bool(optclip.step_taken(state))


def test_decisions_do_not_change_after_counters_saturate():
    """At the int32 maximum, the rule's window and the similar-norm count still move."""
    tx = optclip.skip_steps(optax.sgd(1.0))
    rng = np.random.default_rng(0)
    norms = np.exp(0.2 * rng.normal(size=700)).astype(np.float32)
    more = norms[::-1].copy()
    norms[200::7] *= 20
    more[50::20] *= 1e6

    @jax.jit
    def skips(state, norms):
        def step(state, norm):
            _, state = tx.update(of_norm(norm, 0.0), state, PARAMS)
            return state, state.skipped_run > 0

        return jax.lax.scan(step, state, norms)

    state, _ = skips(tx.init(PARAMS), norms)
    old = counters_at_their_end(state)
    phase = int(state.norm_rule_state.recorded) % 128
    old = old._replace(norm_rule_state=old.norm_rule_state._replace(
        recorded=jnp.int32(MAX - (MAX - phase) % 128)))  # fmt: skip
    young, old = skips(state, more)[1], skips(old, more)[1]
    assert int(jnp.sum(young)) > 0
    np.testing.assert_array_equal(young, old)


@pytest.fixture
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.debug_infs(True):
        yield


@pytest.mark.parametrize("make", [
    lambda: optclip.skip_steps(optax.sgd(1.0)),
    lambda: optclip.skip_steps(optax.sgd(1.0), when=10.0, when_loss=-3.0, mask=TRAINED),
    lambda: optclip.stabilize(optax.sgd(1.0), mask=TRAINED),
])  # fmt: skip
def test_strict_promotion_infinities_and_transfers(make, strict):
    del strict
    tx = make()
    step = jax.jit(lambda g, s, loss: tx.update(g, s, PARAMS, loss=loss))
    state = tx.init(PARAMS)
    batches = [(of_norm(n), jnp.float32(-4.0)) for n in (1.0, 50.0, 1.0)]
    with jax.transfer_guard("disallow"):
        for grads, loss in batches:
            _, state = step(grads, state, loss)
            taken = optclip.step_taken(state)
    assert bool(taken)
    for x in jax.tree.leaves(state):
        assert np.isfinite(x).all()


def test_no_threshold_is_infinite_in_the_state_or_the_metrics():
    tx = optclip.skip_steps(optax.sgd(1.0))
    _, state = run(tx, [1.0, 2.0], [1.0, 2.0])
    metrics = optclip.metrics(state)
    largest = jnp.finfo(jnp.float32).max
    assert metrics["skip/threshold"] == metrics["skip/loss_threshold"] == largest
    skip = optclip.skip_steps(optax.sgd(1.0), when=jnp.inf)
    assert run(skip, [1.0], [1.0])[1].skip_above == largest


@pytest.mark.parametrize("make", [
    lambda: optclip.skip_steps(optax.adam(0.1)),
    lambda: optclip.stabilize(optax.adam(0.1)),
])  # fmt: skip
def test_states_stay_float32_with_x64(make, x64):
    del x64
    tx = make()
    params = jax.tree.map(lambda x: jnp.ones(x.shape, jnp.float64), PARAMS)
    state = tx.init(params)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(grads, state):
        return tx.update(grads, state, params, loss=jnp.float64(1e300))

    chex.clear_trace_counter()
    after = state
    for norm in (1.0, 1e300, jnp.nan, 1.0):
        grads = jax.tree.map(lambda x, n=norm: n * x, params)
        _, after = step(grads, after)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    own = after._replace(optimizer_state=())
    assert {x.dtype.name for x in jax.tree.leaves(own)} <= {"float32", "int32"}


@pytest.mark.parametrize("bad", [jnp.nan, 9.0])
@pytest.mark.parametrize(
    "mask", [False, lambda tree: jax.tree.map(lambda _: False, tree)]
)
def test_loss_is_judged_even_if_no_leaf_is(mask, bad):
    tx = optclip.skip_steps(optax.sgd(1.0), when=jnp.inf, when_loss=5.0, mask=mask)
    grads = {"w": jnp.ones(2)}
    state, update = tx.init(grads), jax.jit(tx.update)
    _, state = update(grads, state, grads, loss=jnp.float32(1.0))
    assert bool(optclip.step_taken(state))
    updates, state = update(grads, state, grads, loss=jnp.float32(bad))
    assert not bool(optclip.step_taken(state))
    np.testing.assert_array_equal(updates["w"], [0.0, 0.0])


def test_nested_wrappers_both_see_a_loss_passed_as_value():
    tx = optclip.skip_steps(optclip.skip_steps(optax.sgd(1.0)), when=100.0)
    grads = {"w": jnp.ones(2)}
    state, update = tx.init(grads), jax.jit(tx.update)
    for i in range(100):
        loss = jnp.float32(1 + 0.01 * (i % 3))
        _, state = update(grads, state, grads, value=loss)
    _, state = update(grads, state, grads, value=jnp.float32(1e6))
    assert not bool(optclip.step_taken(state))
