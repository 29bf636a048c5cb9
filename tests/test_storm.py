"""Rules recover from two thousand bad steps during three hundred good ones.

``FACTORS`` states how close the threshold then is to that of a rule that saw only the
good steps, and after how many of them.
"""

import functools

import adaptive
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optclip
from optclip import rules

# Name: (rule, within this factor, after this many clean steps).
FACTORS = {
    "ema_ratio": (rules.ema_ratio(1.05, decay=0.98), 1.5, 300),
    "ema_ratio-warmup": (
        rules.ema_ratio(1.05, decay=0.98, warmup_steps=20, warmup_threshold=1.0),
        2.5,
        300,
    ),
    "previous_norm": (rules.previous_norm(1.01), 3.0, 300),
    "ema_zscore": (rules.ema_zscore(), 1.5, 250),
    "ema_sigma": (rules.ema_sigma(first_cap=np.inf), 2.0, 300),
    "dual_ema": (rules.dual_ema(escape_steps=50), 1.2, 300),
    "window_percentile": (rules.window_percentile(10.0, window=100), 1.001, 100),
    "window_percentile-rank": (
        rules.window_percentile(10.0, window=100, by_rank=True), 1.001, 200,
    ),
    "window_sigma": (rules.window_sigma(window=64), 1.001, 128),
    "log_window_sigma": (rules.log_window_sigma(window=64), 1.001, 128),
    "geometric_quantile": (rules.geometric_quantile(), 1.3, 300),
    "log_histogram_percentile": (
        rules.log_histogram_percentile(50.0, forgetting=0.02), 1.2, 300,
    ),
    "smoothed_norm": (rules.smoothed_norm(), 1.001, 100),
}  # fmt: skip
# For comparison: a rule that locks, and one that does not.
OTHERS = {
    "ema_sigma-original": (rules.ema_sigma(escape_steps=None),),
    "ema_sigma-capped": (rules.ema_sigma(first_cap=1.0),),
}
# The length of every history is a multiple of this, so one program suffices.
AT_A_TIME = 100


def storm(seed=0, steps=2000):
    """Returns norms: NaN, inf, 1e30, 0, tiny ones, and long constant stretches."""
    rng = np.random.default_rng(seed)
    values = np.exp(0.3 * rng.normal(size=steps))
    kinds = [np.nan, np.inf, -np.inf, 1e30, 1e-30, 0.0, 1e6]
    at = rng.choice(steps, steps // 4, replace=False)
    values[at] = rng.choice(kinds, at.size)
    for start in range(100, steps, 400):
        values[start : start + 60] = 2.0
    values[:3] = np.nan, 0.0, 1e6  # also a bad start
    return values.astype(np.float32)


def clean(seed=1, steps=300):
    rng = np.random.default_rng(seed)
    return np.exp(0.3 * rng.normal(size=steps)).astype(np.float32)


@functools.cache
def runner(name):
    """Returns a clip by this rule, and a compiled run over `AT_A_TIME` norms."""
    tx = optclip.clip_by_rule((FACTORS | OTHERS)[name][0], nonfinite="zero")

    def step(state, n):
        _, state = tx.update(jnp.stack([0.6 * n, 0.8 * n]), state)
        finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(state.rule_state)]
        return state, (state.threshold, jnp.all(jnp.stack(finite)))

    return tx, jax.jit(lambda s, x: jax.lax.scan(step, s, x))


def thresholds(name, norms, state=None):
    """Returns (thresholds, whether the state was always finite, last state)."""
    tx, run = runner(name)
    state, told = tx.init(jnp.zeros(2)) if state is None else state, []
    for part in np.split(np.float32(norms), len(norms) // AT_A_TIME):
        state, both = run(state, part)
        told.append(both)
    seen, finite = (np.concatenate(each) for each in zip(*told, strict=True))
    return seen, finite, state


@pytest.mark.parametrize("name", FACTORS)
def test_rules_recover_from_a_storm(name):
    _, factor, steps = FACTORS[name]
    fresh, _, _ = thresholds(name, clean())
    for seed in range(2):
        _, finite, state = thresholds(name, storm(seed))
        assert finite.all()
        after, finite, _ = thresholds(name, clean(), state)
        assert finite.all()
        off = np.abs(np.log(after[steps - 1 :] / fresh[steps - 1 :]))
        assert np.max(off) <= np.log(factor), np.exp(np.max(off))


def test_factors_detect_a_rule_that_locks():
    norms = 5 * np.exp(0.3 * np.random.default_rng(0).normal(size=300))
    seen, _, _ = thresholds("ema_sigma-original", norms)
    assert np.all(seen[1:] == 1.0)
    open_, _, _ = thresholds("ema_sigma-capped", norms)
    assert np.all(open_[60:] > 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", FACTORS)
@pytest.mark.parametrize("shift", [1e4, 1e-4])
def test_rules_follow_a_lasting_shift(name, shift):
    """Tests only that rules adapt; docs/methods.md states the number of steps."""
    count = 2500
    rng = np.random.default_rng(4)
    before = np.exp(0.3 * rng.normal(size=300)).astype(np.float32)
    norms = shift * np.exp(0.3 * rng.normal(size=count)).astype(np.float32)
    seen, finite, _ = thresholds(name, np.r_[before, norms])
    assert finite.all()
    fresh, _, _ = thresholds(name, norms)
    off = np.log(seen[-100:] / fresh[-100:])
    assert np.max(np.abs(off)) < np.log(4), np.exp(off)


@pytest.mark.parametrize("name", FACTORS)
def test_rules_recover_from_a_first_norm_of_a_million(name):
    norms = np.r_[1e6, clean()[1:], clean(2), clean(3)]
    seen, finite, _ = thresholds(name, norms)
    assert finite.all()
    assert seen[-1] < 30


@pytest.mark.parametrize("name", FACTORS)
def test_zero_and_constant_histories_do_not_lock_rules(name):
    norms = np.r_[np.zeros(50), np.full(150, 0.5), clean()]
    seen, finite, _ = thresholds(name, norms)
    assert finite.all()
    assert 0.2 < seen[-1] < 20


@pytest.mark.parametrize("name", ["spam_clip", "adamw_clip", "stable_spam_clip"])
def test_element_rules_recover_from_a_storm(name):
    tx = adaptive.build(name)
    norms = np.r_[storm(), clean()]

    def step(state, n):
        out, state = tx.update(jnp.stack([0.6 * n, 0.8 * n]), state)
        leaves = jax.tree.leaves(state.rule_state)
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))
        return state, (out, finite)

    _, (outs, finite) = jax.jit(lambda s, x: jax.lax.scan(step, s, x))(
        tx.init(jnp.zeros(2)), jnp.asarray(norms)
    )
    assert np.all(finite)
    assert np.all(np.linalg.norm(outs[-100:], axis=1) > 0.1)


TINY_FIRST = {
    "quantile_clip": 1500, "adagn": 60, "adagc": 210, "norm_growth_limiter": 210,
    "zclip": 80, "ema_sigma_clip": 60,
}  # fmt: skip


@pytest.mark.parametrize("first", [2e-38, 1e-8, 1e38])
@pytest.mark.parametrize("name", TINY_FIRST)
def test_methods_recover_from_a_first_norm_of_any_size(name, first):
    tx = adaptive.build(name)
    norms = jnp.r_[first, jnp.full(1600, 5.0)]

    def step(state, n):
        out, state = tx.update(jnp.stack([0.6 * n, 0.8 * n]), state)
        return state, jnp.linalg.norm(out)

    _, lengths = jax.jit(lambda s: jax.lax.scan(step, s, norms))(tx.init(jnp.zeros(2)))
    # AdaGN normalizes to about 1; AdaGC's warm-up bounds the norm by 1.
    assert np.all(lengths[TINY_FIRST[name] :] > 0.9), lengths[TINY_FIRST[name] :].min()


def test_derivatives_through_several_steps_are_finite():
    for name in ("zclip", "rolling_sigma_clip", "spam_clip", "adamw_clip"):
        tx = adaptive.build(name)

        def loss(grads, tx=tx):
            _, outs = jax.lax.scan(
                lambda s, g: tx.update(g, s)[::-1], tx.init(grads[0]), grads
            )
            return jnp.sum(outs)

        for value in (0.0, 3.0):
            slope = jax.jit(jax.grad(loss))(jnp.full((6, 3), value))
            chex.assert_tree_all_finite(slope)
