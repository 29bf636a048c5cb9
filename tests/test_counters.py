"""Every counter at its maximum, and every statistic at the largest float32."""

import functools

import adaptive
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import registry

import optclip
from optclip import rules

LAST = 2**31 - 1
# An offset that is a multiple of every ring's length, and far from the maximum.
EARLIER = 840 * 10**6
NO_COUNTERS = {"leaf_code", "group_of_leaf", "nonfinite_kinds", "bad_leaf",
               "bad_kinds", "recent_since", "recent_skips"}  # fmt: skip
# Statistics with the magnitude of a norm.
NORMS = {"carry", "ema_maximum", "ema_norm", "fast_ema", "first_moment", "mean_norm",
         "recent_norms", "root_moment", "second_root", "slow_ema", "spread_norm",
         "stable_mu", "stable_nu"}  # fmt: skip
PARAMS = adaptive.params()
EXTRA = {
    "spam_clip-reset": lambda: optclip.spam_clip(5.0, warmup_steps=2, reset_every=7),
    "adamw_clip-short": lambda: optclip.adamw_clip(1.5, decay=0.9),
}
FIXED = [f"fixed:{name}" for name in registry.CASES]
QUICK = {f"fixed:{n}" for n in ("clip", "clip-layer", "clip-element", "record_norms")}
NAMES = [*adaptive.ADAPTIVE, *EXTRA, *FIXED]
# Other files test the counters of step skipping.


def build(name):
    if name in EXTRA:
        return EXTRA[name]()
    if name.startswith("fixed:"):
        return registry.CASES[name.removeprefix("fixed:")].make(1.0)
    return adaptive.build(name)


def field(path):
    """Returns the name of the innermost field of a state on a path."""
    names = [k.name for k in path if isinstance(k, jax.tree_util.GetAttrKey)]
    return names[-1] if names else ""


def is_counter(path, x):
    return x.dtype == jnp.int32 and field(path) not in NO_COUNTERS


def counters_at(state, value):
    return jax.tree_util.tree_map_with_path(
        lambda p, x: jnp.full_like(x, value) if is_counter(p, x) else x, state
    )


def norms_at(state, value):
    return jax.tree_util.tree_map_with_path(
        lambda p, x: jnp.full_like(x, value) if set(names(p)) & NORMS else x, state
    )


def names(path):
    return [k.name for k in path if isinstance(k, jax.tree_util.GetAttrKey)]


def stream(steps, seed=0):
    sizes = adaptive.norms(seed, zeros=False)[:steps]
    each = [adaptive.gradients(seed + i, float(s)) for i, s in enumerate(sizes)]
    return jax.tree.map(lambda *x: np.stack(x), *each)


STREAM = stream(20)


@functools.cache
def runner(name):
    """Returns a jitted (state, gradients) -> (last state, updates), over 20 steps."""
    tx = build(name)

    def step(state, grad):
        out, state = tx.update(grad, state, PARAMS)
        return state, out

    return jax.jit(lambda state, grads: jax.lax.scan(step, state, grads))


@functools.cache
def warmed(name):
    """Returns the state after 20 steps."""
    return runner(name)(build(name).init(PARAMS), STREAM)[0]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow) if n in FIXED and n not in QUICK else n
        for n in NAMES
    ],
)
def test_transformations_keep_working_when_counters_saturate(name):
    for start in (LAST, LAST - 1):
        long_ago = counters_at(warmed(name), start - EARLIER)
        _, wanted = runner(name)(long_ago, STREAM)
        after, got = runner(name)(counters_at(warmed(name), start), STREAM)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            assert np.all(np.isfinite(x))
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)
        flat, _ = jax.tree_util.tree_flatten_with_path(after)
        for path, x in flat:
            assert not (is_counter(path, x) and np.any(x < 0)), names(path)
        for key, value in optclip.metrics(after).items():
            if key.endswith("_fraction"):
                assert 0 <= value <= 1
            if key.endswith("steps"):
                assert value >= 0


REMEMBERING = [n for n in adaptive.ADAPTIVE if n not in ("skip_steps", "stabilize")]


@pytest.mark.parametrize("name", REMEMBERING)
def test_statistics_at_the_largest_float32_do_not_give_nan(name):
    largest = float(np.finfo(np.float32).max)
    state = norms_at(warmed(name), largest)
    after, out = runner(name)(state, STREAM)
    for tree in (after, out):
        for x in jax.tree.leaves(tree):
            assert np.all(np.isfinite(x) | (x == np.inf))
    memory = getattr(after, "rule_state", after)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(memory))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(out))


def moved(tx, state, norms):
    """Returns the thresholds of a clip of a single number, and its last state."""

    def step(state, n):
        _, state = tx.update(jnp.reshape(n, (1,)), state)
        return state, state.threshold

    state, seen = jax.jit(lambda s, n: jax.lax.scan(step, s, n))(state, norms)
    return np.asarray(seen), state


WINDOWS = {
    "autoclip": lambda: optclip.autoclip(50.0, window=20),
    "percentile_clip": lambda: optclip.percentile_clip(50.0, window=20),
    "rolling_sigma_clip": lambda: optclip.rolling_sigma_clip(window=20),
}


@pytest.mark.parametrize("start", [LAST, LAST - 1, LAST - 19])
@pytest.mark.parametrize("name", WINDOWS)
def test_windows_keep_moving_after_their_counter_saturates(name, start):
    tx = WINDOWS[name]()
    _, state = moved(tx, tx.init(jnp.zeros(1)), np.full(30, 1.0, "f"))
    seen, after = moved(tx, counters_at(state, start), np.full(41, 100.0, "f"))
    np.testing.assert_allclose(seen[-1], 100.0, rtol=1e-3)
    ring = after.rule_state[0]
    np.testing.assert_array_equal(ring.recent_norms.ravel(), np.full(20, 100.0))
    assert np.all(ring.recorded >= 20)


def test_both_counters_of_a_fraction_saturate_together():
    tx = optclip.clip_by_rule(1.0)
    state = tx.init(jnp.zeros(1))
    state = state._replace(steps=jnp.int32(LAST - 1), clipped_steps=jnp.int32(10))
    seen = []
    for _ in range(3):
        _, state = tx.update(jnp.full(1, 5.0), state)
        seen.append((int(state.steps), int(state.clipped_steps)))
    assert seen == [(LAST, 11)] * 3


def test_schedule_never_gets_a_negative_step():
    tx = optclip.clip_by_rule(lambda step: jnp.where(step < 0, 0.0, 1.0))
    state = tx.init(jnp.zeros(1))
    state = state._replace(steps=jnp.int32(LAST - 1))
    for _ in range(3):
        out, state = tx.update(jnp.full(1, 5.0), state)
        np.testing.assert_array_equal(out, [1.0])


def test_full_histogram_bin_halves_all_counts():
    rule = rules.log_histogram_percentile(50.0)
    context = rules.Context(jnp.int32(0), jnp.float32(1), lambda: jnp.float32(1))
    _, state = rule.update(jnp.float32(1.0), rule.init(jnp.zeros([])), context)
    counts = state.norm_counts.at[500].set(2.0**23 - 1).at[600].set(2.0**22)
    limit, after = rule.update(
        jnp.float32(1.0), state._replace(norm_counts=counts), context
    )
    np.testing.assert_array_equal(after.norm_counts[jnp.array([500, 600])],
                                  [2.0**22, 2.0**21])  # fmt: skip
    np.testing.assert_allclose(limit.threshold, 1.0, rtol=0.06)
    # Every norm still counts: a float32 count of 2**24 would no longer increase.
    _, more = rule.update(jnp.float32(1.0), after, context)
    assert float(more.norm_counts[500]) == 2.0**22 + 1
    full = state._replace(norm_counts=state.norm_counts.at[500].set(2.0**24))
    _, once = rule.update(jnp.float32(1.0), full, context)
    _, twice = rule.update(jnp.float32(1.0), once, context)
    assert float(twice.norm_counts[500]) < 2.0**24


def test_reset_period_is_kept_after_its_counter_saturates():
    # Resets happen at multiples of 10**6. LAST is at the phase LAST % 10**6.
    tx = optclip.clip_by_rule(
        rules.second_moment(1.0, decay=0.5, reset_every=10**6),
        scope=optclip.scopes.element(),
    )
    state = tx.init(jnp.zeros(1))
    for start, resets in ((LAST, False), (LAST - LAST % 10**6 - 1, True)):
        full = jax.tree.map(lambda x: jnp.full_like(x, 2.0), state.rule_state)
        full = full[0]._replace(recorded=jnp.int32(start))
        _, after = tx.update(jnp.ones(1), state._replace(rule_state=(full,)))
        number = int(after.rule_state[0].recorded)
        assert number % 10**6 == (start + 1) % 10**6
        root = float(after.rule_state[0].root_moment[0])
        assert (root < 1) is resets


def test_inject_hyperparams_keeps_an_integer_reset_period():
    tx = optax.inject_hyperparams(optclip.spam_clip)(reset_every=7)
    _, state = tx.update(jnp.ones(3), tx.init(jnp.ones(3)))
    assert state.inner_state.rule_state[0].recorded.dtype == jnp.int32
