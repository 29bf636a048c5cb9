"""`skip_steps`: bad steps leave no trace, spikes are detected, and runs never lock."""

import functools
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip
from optclip import rules

PARAMS = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}


def gradients(size=1.0, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(size * rng.normal(size=p.shape), p.dtype), PARAMS
    )


def of_norm(norm):
    return {
        "kernel": jnp.zeros((3, 2)).at[0, 0].set(norm),
        "bias": jnp.zeros(2),
    }


def poisoned(value, where="bias"):
    bad = gradients()
    bad[where] = bad[where].at[0].set(value)
    return bad


@functools.lru_cache
def jitted(tx):
    return jax.jit(lambda g, s, loss: tx.update(g, s, PARAMS, loss=loss))


def run(tx, norms, losses=None):
    """Returns which steps were skipped, and the last state."""
    step = jitted(tx)
    state, skipped = tx.init(PARAMS), []
    for k, norm in enumerate(norms):
        loss = None if losses is None else jnp.float32(losses[k])
        _, state = step(of_norm(norm), state, loss)
        skipped.append(int(state.skipped_run) > 0)
    return skipped, state


@pytest.mark.parametrize("bad", ["nan", "inf", "spike", "loss"])
def test_bad_step_leaves_no_trace_bitwise(bad):
    optimizer = optax.chain(optclip.zclip(warmup_steps=2), optax.adamw(1e-2))
    tx = optclip.skip_steps(optimizer, when=1e3)
    step = jax.jit(lambda g, s, loss: tx.update(g, s, PARAMS, loss=loss))

    def steps(batches):
        state = tx.init(PARAMS)
        for g, loss in batches:
            out, state = step(g, state, loss)
        return out, state

    good = [(gradients(seed=k), jnp.float32(1)) for k in range(5)]
    worse = {
        "nan": (poisoned(jnp.nan), jnp.float32(1)),
        "inf": (poisoned(-jnp.inf), jnp.float32(1)),
        "spike": (gradients(1e30), jnp.float32(1)),
        "loss": (gradients(), jnp.float32(jnp.nan)),
    }[bad]
    out, without = steps(good)
    again, state = steps([*good[:2], worse, *good[2:]])
    chex.assert_trees_all_equal(out, again)
    chex.assert_trees_all_equal(state.optimizer_state, without.optimizer_state)
    assert int(state.skipped_steps) == 1
    assert int(state.spike_steps) == (bad == "spike")
    zeros, _ = step(worse[0], without, worse[1])
    chex.assert_trees_all_equal(zeros, jax.tree.map(jnp.zeros_like, PARAMS))


@pytest.mark.parametrize("rule", ["log_window_sigma", "window_sigma"])
def test_spikes_are_those_of_the_rule_over_the_last_128_steps_taken(rule):
    rng = np.random.default_rng(0)
    norms = np.exp(0.2 * rng.normal(size=400)).astype(np.float32)
    norms[[150, 200, 201, 300]] *= [3.3, 2.4, 20.0, 8.0]
    history, wanted = [], []
    for n in norms:
        past = np.asarray(history[-128:], np.float64)
        spike = False
        if len(past) >= 64 and rule == "window_sigma":
            spike = n > past.mean() + 6 * past.std(ddof=1)
        elif len(past) >= 64:
            logs = np.log(past)
            spike = np.log(n) > logs.mean() + max(5 * logs.std(), np.log(2))
        wanted.append(bool(spike))
        if not spike:
            history.append(n)
    assert 0 < sum(wanted) < 4
    six = rules.window_sigma(6.0, unbiased=True)
    for when in [None, rules.log_window_sigma()] if "log" in rule else [six]:
        skipped, _ = run(optclip.skip_steps(optax.sgd(1.0), when=when), norms)
        assert skipped == wanted


def test_losses_are_judged_including_negative_ones():
    rng = np.random.default_rng(0)
    for level in (3.0, -3.0):
        losses = level + 0.1 * rng.normal(size=100)
        losses[[80, 90]] = [level + 2, np.nan]
        skipped, state = run(optclip.skip_steps(optax.sgd(1.0)), np.ones(100), losses)
        assert np.flatnonzero(skipped).tolist() == [80, 90]
        assert int(state.spike_steps) == 1
        assert np.isfinite(state.loss_rule_state.recent_norms).all()


def test_bad_loss_blames_no_leaf_and_may_be_passed_as_value():
    tx = optclip.skip_steps(optax.sgd(1.0), when=10.0)
    out, state = tx.update(of_norm(1.0), tx.init(PARAMS), PARAMS, value=jnp.nan)
    chex.assert_trees_all_equal(out, jax.tree.map(jnp.zeros_like, PARAMS))
    (culprit,) = optclip.nonfinite_leaves(state, PARAMS)
    assert culprit.path is None
    assert culprit.norm == 1
    assert np.isnan(culprit.loss)


def test_number_bounds_the_norm_and_not_the_loss():
    losses, norms = [50.0] * 4, [1.0, 9.0, 11.0, 1.0]
    skipped, _ = run(optclip.skip_steps(optax.sgd(1.0), when=10.0), norms, losses)
    assert skipped == [False, False, True, False]


@pytest.mark.parametrize(
    "when", [rules.constant(10.0), rules.schedule(lambda step: 10.0), rules.dual_ema(),
             rules.ema_sigma(6.0), rules.smoothed_norm(), rules.previous_norm(3.0)],
)  # fmt: skip
def test_rules_that_are_made_for_norms_do_not_judge_the_loss(when):
    tx = optclip.skip_steps(optax.sgd(1.0), when=when)
    losses = np.linspace(50.0, -50.0, 40)
    skipped, _ = run(tx, np.ones(40), losses)
    alone, state = run(tx, np.ones(40))
    assert skipped == alone
    assert state.loss_rule_state == ()


def test_user_defined_rule_judges_the_loss_if_it_opts_in():
    def below(norm, state, context):
        return rules.Limit(jnp.float32(5.0), jnp.float32(5.0)), state

    rule = rules.Rule(lambda norm: (), below, "below", signed=True)
    tx = optclip.skip_steps(optax.sgd(1.0), when=jnp.inf, when_loss=rule)
    skipped, _ = run(tx, np.ones(3), [-1.0, 6.0, 1.0])
    assert skipped == [False, True, False]


def test_state_of_numpy_arrays_works_without_jit():
    tx = optclip.skip_steps(optax.adam(1e-2))
    state = jax.device_get(tx.init(PARAMS))
    _, state = tx.update(poisoned(jnp.nan), state, PARAMS, loss=1.0)
    assert int(state.skipped_steps) == 1


def test_nested_skip_steps_are_both_reported():
    inner = optclip.skip_steps(optax.sgd(1.0), when=1.0)
    around = optax.MultiSteps(inner, 1).gradient_transformation()
    tx = optclip.skip_steps(around, when=jnp.inf)
    _, state = tx.update(of_norm(5.0), tx.init(PARAMS), PARAMS)
    metrics = optclip.metrics(state)
    assert int(metrics["skip/skipped_steps"]) == 0
    assert int(metrics["skip_2/skipped_steps"]) == 1
    assert [c.path for c in optclip.nonfinite_leaves(state, PARAMS)] == ["kernel"]


def test_loss_in_float8_is_a_number():
    tx = optclip.skip_steps(optax.sgd(1.0))
    loss = jnp.float8_e4m3fn(3)
    _, state = tx.update(of_norm(1.0), tx.init(PARAMS), PARAMS, loss=loss)
    assert int(state.skipped_steps) == 0
    assert float(state.offered_loss) == 3


def test_infinite_bound_skips_only_nonfinite_steps():
    tx = optclip.skip_steps(optax.sgd(1.0), when=jnp.inf)
    skipped, _ = run(tx, [1.0, 3e38, np.nan, 1.0, np.inf, 0.0])
    assert skipped == [False, False, True, False, True, False]


@pytest.mark.parametrize(
    "when",
    [None, rules.window_sigma(6.0), rules.ema_zscore(6.0),
     rules.ema_sigma(6.0, first_cap=jnp.inf), rules.ema_ratio(2.0, decay=0.9),
     rules.previous_norm(3.0), rules.geometric_quantile(0.9)],
)  # fmt: skip
def test_lasting_increase_is_accepted_unscaled_after_max_consecutive_steps(when):
    rng = np.random.default_rng(1)
    norms = np.exp(0.1 * rng.normal(size=260)).astype(np.float32)
    tx = optclip.skip_steps(optax.sgd(1.0), when=when, max_consecutive=5)
    for shift in (1e2, 1e8):
        skipped, _ = run(tx, [*norms[:150], *shift * norms[150:]])
        assert all(skipped[150:155])
        assert not any(skipped[155:160])
        assert sum(skipped[160:]) < 10


@pytest.mark.parametrize("when", [2.0, rules.previous_norm(2.0)])
def test_spikes_are_skipped_indefinitely_without_a_limit(when):
    tx = optclip.skip_steps(
        optax.sgd(1.0), when=when, max_consecutive=None, max_similar=None
    )
    assert run(tx, [1.0] + [3.0] * 30)[0] == [False] + [True] * 30


def test_number_is_a_permanent_bound():
    tx = optclip.skip_steps(optax.sgd(1.0), when=2.0, max_consecutive=3)
    assert run(tx, [1.0] + [3.0] * 30)[0] == [False] + [True] * 30


@pytest.mark.parametrize("bound", [np.nan, -1.0])
def test_nan_or_negative_bound_is_treated_as_zero(bound):
    tx = optclip.skip_steps(optax.sgd(1.0), when=lambda step: jnp.float32(bound))
    assert run(tx, [1.0, 0.0])[0] == [True, False]


def test_nonfinite_steps_are_never_taken_and_reset_nothing():
    rule = rules.previous_norm(2.0)
    tx = optclip.skip_steps(optax.sgd(1.0), when=rule, max_consecutive=3)
    norms = [1.0, 3.0, np.nan, 3.0, np.nan, np.inf, np.nan, 3.0, 3.0, np.nan, 9.0, 9.0]
    skipped, state = run(tx, norms)
    assert np.flatnonzero(~np.array(skipped)).tolist() == [0, 8]
    assert int(state.nonfinite.nonfinite_steps) == 5


def test_constant_norms_and_losses_do_not_lock_the_run():
    tx = optclip.skip_steps(optax.sgd(1.0), max_consecutive=None)
    step = jax.jit(lambda g, s, loss: tx.update(g, s, PARAMS, loss=loss))

    @jax.jit
    def all_steps(norm):
        def one(state, _):
            _, state = step(of_norm(norm), state, norm)
            return state, None

        return jax.lax.scan(one, tx.init(PARAMS), None, length=100)[0].skipped_steps

    rng = np.random.default_rng(0)
    for norm in [1.0, 1000.3, *np.exp(rng.uniform(-50, 50, 60)).astype(np.float32)]:
        assert int(all_steps(jnp.float32(norm))) == 0, norm


@pytest.mark.parametrize("size", [1e6, 1e-30, 1e30])
def test_first_norm_of_any_size_does_not_lock_the_run(size):
    tx = optclip.skip_steps(optax.sgd(1.0), max_consecutive=5)
    skipped, _ = run(tx, [size] + [1.0] * 150)
    assert sum(skipped) <= 5


def test_skipping_is_scale_invariant_unless_a_floor_is_given():
    norms = [*(1e-9 * (1 + 0.1 * (np.arange(100) % 3))), 1e-7, 1e-5]
    skipped, _ = run(optclip.skip_steps(optax.sgd(1.0)), norms)
    assert np.flatnonzero(skipped).tolist() == [100, 101]
    rule = rules.window_sigma(6.0, unbiased=True, floor=1e-6)
    skipped, _ = run(optclip.skip_steps(optax.sgd(1.0), when=rule), norms)
    assert np.flatnonzero(skipped).tolist() == [101]


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1.0, 1e30])
def test_default_does_not_depend_on_the_scale_of_the_norms(scale):
    norms = [*(scale * (1 + 0.1 * (np.arange(100) % 3))), 3 * scale, 1.9 * scale]
    skipped, _ = run(optclip.skip_steps(optax.sgd(1.0)), norms)
    assert np.flatnonzero(skipped).tolist() == [100]


def test_norm_beyond_float32_is_judged_as_the_largest_float32():
    tx = optclip.skip_steps(optax.sgd(1.0), when=jnp.finfo(jnp.float32).max)
    longest = {"kernel": jnp.full((3, 2), 3e38), "bias": jnp.zeros(2)}
    _, state = jax.jit(tx.update)(longest, tx.init(PARAMS), PARAMS)
    assert optclip.metrics(state)["skip/skipped_steps"] == 0
    tx = optclip.skip_steps(optax.sgd(1.0), when=1e38)
    _, state = jax.jit(tx.update)(longest, tx.init(PARAMS), PARAMS)
    metrics = optclip.metrics(state)
    assert metrics["skip/spike_steps"] == 1
    assert metrics["skip/norm"] == jnp.finfo(jnp.float32).max


def test_metrics_and_nonfinite_leaves_report_the_last_bad_steps():
    tx = optclip.skip_steps(
        optax.chain(optclip.clip_by_global_norm(1.0), optax.sgd(1.0)),
        when=10.0, keep_last=3,
    )  # fmt: skip
    state = tx.init(PARAMS)
    batches = [of_norm(1), of_norm(20), poisoned(jnp.nan), of_norm(30), of_norm(40)]
    for k, g in enumerate(batches):
        _, state = tx.update(g, state, PARAMS, loss=float(k))
    metrics = jax.device_get(optclip.metrics(state))
    assert metrics["skip/steps"] == 5
    assert metrics["skip/skipped_steps"] == 4
    assert metrics["skip/spike_steps"] == 3
    assert metrics["skip/nonfinite_steps"] == 1
    assert metrics["skip/in_a_row"] == 4
    assert metrics["skip/norm"] == 40
    assert metrics["skip/loss"] == 4
    assert metrics["skip/threshold"] == 10
    assert metrics["skip/last_skipped_step"] == 4
    assert metrics["clip/steps"] == 1  # the inner clip never saw the others
    found = optclip.nonfinite_leaves(state, PARAMS)
    assert [(c.path, c.step, c.nan) for c in found] == [
        ("kernel", 4, 0), ("kernel", 3, 0), ("bias", 2, 1)
    ]  # fmt: skip
    assert [c.norm for c in found[:2]] == [40.0, 30.0]
    with pytest.raises(ValueError, match="has no parameter for 2"):
        optclip.nonfinite_leaves(tx.init(PARAMS), {"other": jnp.ones(2)})
    assert [c.loss for c in found] == [4.0, 3.0, 2.0]


def test_works_in_scan_vmap_and_with_a_donated_state():
    tx = optclip.skip_steps(optax.chain(optclip.zclip(), optax.adam(1e-2)), when=50.0)
    grads = [gradients(seed=k) for k in range(6)]
    grads[2], grads[4] = poisoned(jnp.nan), gradients(1e5)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *grads)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(g, state):
        return tx.update(g, state, PARAMS)

    chex.clear_trace_counter()
    state, outs = tx.init(PARAMS), []
    for g in grads:
        out, state = step(g, state)
        outs.append(out)
    scanned, looped = jax.jit(
        lambda s: jax.lax.scan(lambda s, g: tx.update(g, s, PARAMS)[::-1], s, stacked),
        donate_argnums=0,
    )(tx.init(PARAMS))
    chex.assert_trees_all_close(looped, jax.tree.map(lambda *x: jnp.stack(x), *outs))
    chex.assert_trees_all_close(scanned, state)
    assert int(scanned.skipped_steps) == 2
    many = jax.tree.map(lambda x: jnp.stack([x] * 6), tx.init(PARAMS))
    batched, states = jax.jit(jax.vmap(lambda g, s: tx.update(g, s, PARAMS)))(
        stacked, many
    )
    assert states.skipped_steps.tolist() == [0, 0, 1, 0, 1, 0]
    chex.assert_tree_all_finite(batched)


def test_bad_microbatch_is_skipped_around_multi_steps():
    inner = optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation()
    tx = optclip.skip_steps(inner, when=100.0)
    state, outs = tx.init(PARAMS), []
    for g in (of_norm(1.0), poisoned(jnp.inf), of_norm(1e6), of_norm(3.0)):
        out, state = tx.update(g, state, PARAMS)
        outs.append(float(out["kernel"][0, 0]))
    assert outs == [0.0, 0.0, 0.0, -2.0]  # minus the mean of 1 and 3


def test_bad_mean_is_skipped_inside_multi_steps():
    tx = optax.MultiSteps(optclip.skip_steps(optax.sgd(1.0), when=10.0), 2)
    state, outs = tx.init(PARAMS), []
    for n in (1.0, 3.0, 1.0, 99.0, 2.0, 2.0):
        out, state = jax.jit(tx.update)(of_norm(n), state, PARAMS)
        outs.append(float(out["kernel"][0, 0]))
    assert outs == [0.0, -2.0, 0.0, 0.0, 0.0, -2.0]


def test_accumulation_recipe_drops_a_bad_microbatch():
    """The recipe of docs/failures.md: Optax's MultiSteps with a skip function."""
    tx = optax.MultiSteps(
        optax.chain(optclip.clip_by_global_norm(1.5), optax.sgd(1.0)),
        every_k_schedule=2,
        should_skip_update_fn=optax.skip_not_finite,
    )
    state, outs = tx.init(PARAMS), []
    for g in (of_norm(1.0), poisoned(jnp.inf), poisoned(jnp.nan), of_norm(3.0)):
        out, state = jax.jit(tx.update)(g, state, PARAMS)
        outs.append(float(out["kernel"][0, 0]))
    assert outs == [0.0, 0.0, 0.0, -1.5]  # the mean is 2, and the clip sees the mean
    chex.assert_tree_all_finite(state.acc_grads)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.partition(
            {"a": tx, "b": optax.identity()}, {"kernel": "a", "bias": "b"}
        ),
        lambda tx: optax.chain(tx, optax.scale(2.0)),
        lambda tx: optax.masked(tx, {"kernel": True, "bias": False}),
        lambda tx: optax.apply_if_finite(tx, 3),
    ],
)
def test_optax_wrappers_preserve_its_state_structure(wrap):
    tx = wrap(optclip.skip_steps(optax.adam(1e-2)))
    state = tx.init(PARAMS)
    out, after = jax.eval_shape(tx.update, gradients(), state, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(out, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


def test_inject_hyperparams_changes_the_threshold():
    def make(threshold, learning_rate):
        return optclip.skip_steps(optax.sgd(learning_rate), when=threshold)

    tx = optax.inject_hyperparams(make)(threshold=2.0, learning_rate=1.0)
    step = jax.jit(lambda g, s: tx.update(g, s, PARAMS))
    state = tx.init(PARAMS)
    out, state = step(of_norm(3.0), state)
    assert float(out["kernel"][0, 0]) == 0
    state.hyperparams["threshold"] = jnp.float32(5.0)
    out, state = step(of_norm(3.0), state)
    assert float(out["kernel"][0, 0]) == -3


def test_half_precision_gradients_and_wide_parameters():
    grads = jax.tree.map(lambda x: x.astype(jnp.float16), of_norm(300.0))
    tx = optclip.skip_steps(optax.sgd(1e-2))
    state = tx.init(PARAMS)
    out, after = tx.update(grads, state, PARAMS)
    assert float(after.offered_norm) == 300
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    assert out["kernel"].dtype == jnp.float16
    assert float(out["kernel"][0, 0]) == -3


def test_value_reaches_the_optimizer_but_loss_does_not():
    seen = []

    def update(updates, state, params=None, *, value=None):
        seen.append(value)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda _: (), update)
    tx = optclip.skip_steps(inner)
    tx.update(gradients(), tx.init(PARAMS), PARAMS, loss=2.5)
    tx.update(gradients(), tx.init(PARAMS), PARAMS, value=3.5)
    assert seen == [None, 3.5]


def test_empty_partition_group_is_not_an_error():
    tx = optax.partition(
        {"a": optclip.skip_steps(optax.sgd(1.0)), "b": optax.sgd(1.0)},
        {"kernel": "b", "bias": "b"},
    )
    out, state = tx.update(gradients(), tx.init(PARAMS), PARAMS)
    assert float(optclip.metrics(state)["skip/a/steps"]) == 1
    assert float(jnp.sum(jnp.abs(out["kernel"]))) > 0


@pytest.mark.parametrize("mapped", ["pmap", "unchecked", "checked"])
def test_devices_with_different_losses_make_the_same_decision(mapped):
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    losses = jnp.ones(8).at[3].set(jnp.nan)
    name = None if mapped == "checked" else "x"
    tx = optclip.skip_steps(optax.sgd(1.0), loss_axis_name=name)

    def step(loss):
        grads = of_norm(1.0)
        out, state = tx.update(grads, tx.init(PARAMS), PARAMS, loss=loss.reshape(()))
        return out["kernel"][:1, 0] + state.skipped_steps

    if mapped == "pmap":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = jax.pmap(step, axis_name="x")(losses).ravel()
        np.testing.assert_array_equal(got, np.ones(8))
        return
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x" if mapped == "unchecked" else None)
    run = jax.shard_map(
        step, mesh=mesh, in_specs=jax.sharding.PartitionSpec("x"), out_specs=spec,
        check_vma=mapped == "checked",
    )  # fmt: skip
    np.testing.assert_array_equal(
        jax.jit(run)(losses), np.ones(1 if name is None else 8)
    )


def test_older_steps_keep_the_nonfinite_kinds_of_their_worst_leaf():
    tx = optclip.skip_steps(optax.sgd(1.0))
    _, state = tx.update(poisoned(jnp.nan, "bias"), tx.init(PARAMS), PARAMS)
    bad = of_norm(1.0)
    bad["kernel"] = bad["kernel"].at[0].set(-jnp.inf)
    _, state = tx.update(bad, state, PARAMS)
    found = [c[:5] for c in optclip.nonfinite_leaves(state, PARAMS)]
    assert found == [("kernel", 1, False, False, True), ("bias", 0, True, False, False)]


def test_state_dtypes_are_kept_with_x64_if_a_rule_promotes_its_state(x64):
    del x64

    def update(norm, first, context):
        del context
        first = jnp.where(first == 0, norm, first)
        return rules.Limit(10 * first, 10 * first), first

    rule = rules.Rule(jnp.zeros_like, update, "first")
    tx = optclip.skip_steps(optax.sgd(1.0), when=rule)
    params = {"w": jnp.ones(3, jnp.float64)}
    state = tx.init(params)
    _, after = tx.update({"w": jnp.full(3, 1e300)}, state, params, loss=1e39)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    assert int(after.skipped_steps) == 0
    assert np.isfinite(after.offered_norm)


def test_error_messages_are_actionable():
    with pytest.raises(TypeError, match="`optimizer` must be an Optax transformation"):
        optclip.skip_steps(1e-3)
    with pytest.raises(ValueError, match="`max_consecutive` must be an int >= 1"):
        optclip.skip_steps(optax.sgd(1.0), max_consecutive=0)
    with pytest.raises(ValueError, match="`keep_last` must be an int >= 1"):
        optclip.skip_steps(optax.sgd(1.0), keep_last=0)
    with pytest.raises(ValueError, match=r"`when` must be .*, got -1.0"):
        optclip.skip_steps(optax.sgd(1.0), when=-1.0)
    with pytest.raises(TypeError, match="`when`"):
        optclip.skip_steps(optax.sgd(1.0), when="spikes")
    with pytest.raises(TypeError, match=r"`optax\.MultiSteps`: pass what its"):
        optclip.skip_steps(optax.MultiSteps(optax.sgd(1.0), 2))
    tx = optclip.skip_steps(optax.sgd(1.0))
    with pytest.raises(ValueError, match=r"`loss` must be a real scalar, .*\(2,\)"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, loss=jnp.ones(2))
    for loss in ({"loss": 1.0}, (jnp.float32(1), {}), "low"):
        with pytest.raises(ValueError, match="`loss` must be a real scalar, got"):
            tx.update(PARAMS, tx.init(PARAMS), PARAMS, loss=loss)
    with pytest.raises(TypeError, match="`state` must be the `SkipState`"):
        tx.update(PARAMS, optax.EmptyState(), PARAMS)
    by_params = optclip.skip_steps(optax.sgd(1.0), when=rules.relative_to_params(1.0))
    with pytest.raises(ValueError, match="must be rules that do not use the param"):
        by_params.update(PARAMS, by_params.init(PARAMS), PARAMS)
