"""Adaptive clips are scale-invariant, except for documented absolute constants.

Scaling the gradients by a factor from 1e-12 to 2**40 scales the updates by the same
factor at every step. Options that are documented as absolute (a bound on the norm, a
floor) are disabled or scaled by the same factor.
"""

import dataclasses
import functools
from collections.abc import Callable

import adaptive
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import registry

import optclip
from optclip import rules, scopes

FACTORS = (2.0**-40, 2.0**40, 1e-12)
SCOPES = {"tree": scopes.tree(), "leaf": scopes.leaf()}


@dataclasses.dataclass(frozen=True)
class Scaled:
    """A transformation as a function of the factor, and how the factor affects it.

    Attributes:
        make: Makes the transformation from (factor, **scope).
        power: Updates are multiplied by the factor to this power.
        scoped: Whether it takes ``scope``.
        hard: Whether it only scales down norms above its threshold.
        error: The tolerance of the results, relative to the largest.
    """

    make: Callable
    power: int = 1
    scoped: bool = True
    hard: bool = True
    error: float = 5e-6


def free(function, **fixed):
    return lambda factor, **options: function(**fixed, **options)


CASES = {
    "adagc": Scaled(free(optclip.adagc, lambda_abs=np.inf, warmup_steps=5)),
    "adagn": Scaled(free(optclip.adagn), power=0, hard=False),
    "adamw_clip": Scaled(free(optclip.adamw_clip), scoped=False),
    "autoclip": Scaled(free(optclip.autoclip, window=20)),
    "autoclip-all": Scaled(free(optclip.autoclip, window=None)),
    "cap_update": Scaled(free(optclip.cap_update, floor=0.0)),
    "dual_ema_clip": Scaled(free(optclip.dual_ema_clip)),
    "ema_sigma_clip": Scaled(free(optclip.ema_sigma_clip)),
    "norm_growth_limiter": Scaled(free(optclip.norm_growth_limiter)),
    "percentile_clip": Scaled(free(optclip.percentile_clip, window=20)),
    # The logarithm of a norm of 1e-12 has one digit less.
    "quantile_clip": Scaled(free(optclip.quantile_clip), error=1e-4),
    "rolling_sigma_clip": Scaled(free(optclip.rolling_sigma_clip, window=16)),
    "spam_clip": Scaled(free(optclip.spam_clip, threshold=3.0), scoped=False),
    "stable_spam_clip": Scaled(free(optclip.stable_spam_clip), scoped=False),
    "trust_ratio_clip": Scaled(free(optclip.trust_ratio_clip)),
    "zclip": Scaled(free(optclip.zclip, warmup_steps=5, max_grad_norm=None)),
    "zclip-mean": Scaled(
        free(optclip.zclip, warmup_steps=5, max_grad_norm=None, clip_option="mean")
    ),
    "zclip-percentile": Scaled(
        free(optclip.zclip, warmup_steps=5, max_grad_norm=None, mode="percentile")
    ),
    "skip_steps": Scaled(
        lambda factor: optclip.skip_steps(
            optax.chain(optclip.zclip(max_grad_norm=None), optax.sgd(1.0))
        ),
        scoped=False,
    ),
    "stabilize": Scaled(
        lambda factor, **scope: optclip.stabilize(optax.adam(0.01, eps=0.0), **scope),
        power=0,
        hard=False,
        error=1e-4,
    ),
    "u_clip": Scaled(
        lambda c: optclip.u_clip(optclip.clip_by_rule(2.0 * c)), scoped=False
    ),
    **{
        f"spectral_clip-{method}": Scaled(
            lambda c, m=method: optclip.spectral_clip(0.7 * c, method=m),
            scoped=False,
            hard=method != "soft",
            error=1e-4 if method == "hardcap" else 1e-5,
        )
        for method in ("svd", "soft", "hardcap")
    },
}
# These use Adam's eps, which is documented as absolute.
ABSOLUTE = {"scale_by_stable_adam"}
# Leaf scope only changes the shape of the norms; these have the most memory.
QUICK = {"adagc", "percentile_clip", "zclip"}
PAIRS = [
    pytest.param(
        name,
        scope,
        marks=pytest.mark.exhaustive if scope == "leaf" and name not in QUICK else (),
        id=f"{name}-{scope}",
    )
    for name, case in CASES.items()
    for scope in (SCOPES if case.scoped else ["own"])
]
BY_PARAMS = {"cap_update", "trust_ratio_clip"}


def sequence(kind):
    """Returns 48 gradients, varying or constant, both with spikes."""
    rng = np.random.default_rng(4)
    size = np.exp(0.3 * rng.normal(size=48)) if kind == "moving" else np.ones(48)
    size[[20, 33, 34]] *= 40
    if kind == "constant":
        size[28] *= 1 + 2.0**-22  # above the others by rounding only
    way = {"b": rng.normal(size=(48, 3)), "w": rng.normal(size=(48, 4, 3))}
    if kind == "constant":
        way = {k: np.broadcast_to(x[:1], x.shape) for k, x in way.items()}
    shaped = {k: size.reshape(-1, *[1] * (x.ndim - 1)) * x for k, x in way.items()}
    return {k: x.astype(np.float32) for k, x in shaped.items()}


def params(factor):
    rng = np.random.default_rng(5)
    shapes = {"b": (3,), "w": (4, 3)}
    return {k: jnp.asarray(factor * rng.normal(size=s), "f") for k, s in shapes.items()}


@functools.cache
def runner(name, scope):
    """Returns a jitted (factor, gradients, params) -> (updates, states)."""
    options = {} if scope == "own" else {"scope": SCOPES[scope]}

    @jax.jit
    def run(factor, grads, params):
        tx = CASES[name].make(factor, **options)
        first = CASES[name].make(1.0, **options).init(params)

        def step(state, grad):
            out, state = tx.update(grad, state, params)
            return state, (out, state)

        return jax.lax.scan(step, first, grads)[1]

    return run


def followed(name, scope, grads, factor):
    grads = {k: np.float32(factor) * x for k, x in grads.items()}
    by = factor if name in BY_PARAMS else 1.0
    return jax.device_get(runner(name, scope)(np.float32(factor), grads, params(by)))


@pytest.mark.parametrize("kind", ["moving", "constant"])
@pytest.mark.parametrize(("name", "scope"), PAIRS)
def test_scaling_the_gradients_scales_the_updates(name, scope, kind):
    grads = sequence(kind)
    wanted, _ = followed(name, scope, grads, 1.0)
    assert any(np.any(wanted[k] != grads[k]) for k in grads), "nothing was clipped"
    for factor in FACTORS:
        got, _ = followed(name, scope, grads, factor)
        by = np.float64(np.float32(factor)) ** CASES[name].power
        error = CASES[name].error
        for key, x in got.items():
            np.testing.assert_allclose(
                x.astype(np.float64) / by, wanted[key], rtol=error, atol=error
            )


@pytest.mark.parametrize("size", [1e-12, 1e-7, 1.0, 1e12])
@pytest.mark.parametrize(
    "name",
    ["dual_ema_clip", "ema_sigma_clip", "rolling_sigma_clip", "zclip", "zclip-mean",
     "zclip-percentile", "skip_steps"],
)  # fmt: skip
def test_rounding_error_above_a_constant_history_is_not_a_spike(name, size):
    scope = "tree" if CASES[name].scoped else "own"
    grads = sequence("constant")
    scaled = {k: np.float32(size) * x for k, x in grads.items()}
    out, _ = followed(name, scope, grads, size)
    sign = -1 if name == "skip_steps" else 1
    for key, x in out.items():
        for step in (*range(20), 28):
            np.testing.assert_array_equal(sign * x[step], scaled[key][step])
        if name != "skip_steps":  # has no spikes in its first 64 steps
            assert np.all(np.abs(x[20]) < 0.5 * np.abs(scaled[key][20]))


def state_of(states):
    """Returns the scales and clipped fractions of the first clip in a state."""
    is_clip = lambda x: isinstance(x, optclip.states.ClipState)  # noqa: E731
    clips = [s for s in jax.tree.leaves(states, is_leaf=is_clip) if is_clip(s)]
    return clips[0].scale, clips[0].clipped


@pytest.mark.parametrize(
    ("name", "scope"), [pair for pair in PAIRS if CASES[str(pair.values[0])].hard]
)
def test_metrics_of_adaptive_clips_count_every_scaled_step(name, scope):
    for kind in ("moving", "constant"):
        for factor in (1.0, *FACTORS):
            _, states = followed(name, scope, sequence(kind), factor)
            scale, clipped = state_of(states)
            assert np.all(clipped[scale < 1] > 0)
            assert np.any(clipped > 0)


@pytest.mark.parametrize("name", registry.HARD)
def test_metrics_of_fixed_clips_count_every_scaled_step(name):
    updates = registry.normal_tree("f32")
    for size in (1e-7, 1e-6, 0.1, 1.0, 3.0):
        sized = jax.tree.map(lambda x, s=size: x * np.float32(s), updates)
        _, state = registry.run(name, sized, np.inf)
        norm = float(state.norm_before)
        for near in (0.5, 1 - 1e-6, 1.0, 1 + 1e-6, 2.0):
            out, state = registry.run(name, sized, norm * near)
            scale, clipped = (float(x) for x in state_of(state))
            assert clipped > 0 or scale == 1
            if clipped == 0:
                chex.assert_trees_all_equal(jax.device_get(out), sized)


ORIGINALS = {
    "autoclip": (optclip.autoclip, 1e-7),
    "zclip": (functools.partial(optclip.zclip, max_grad_norm=None), 1e-7),
    "adagn": (optclip.adagn, 1e-9),
    "norm_growth_limiter": (optclip.norm_growth_limiter, 1e-9),
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_originals_keep_their_absolute_constants(name):
    make, size = ORIGINALS[name]
    grads = {k: np.float32(size) * x for k, x in sequence("moving").items()}

    def run(tx):
        start = {k: x[0] for k, x in grads.items()}
        return jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(start), grads)

    ours, theirs = (jax.jit(run, static_argnums=0)(make(original=o))[1]
                    for o in (False, True))  # fmt: skip
    assert not np.allclose(ours["w"], theirs["w"], rtol=1e-3, atol=0.0)


def test_rules_are_scale_invariant_at_their_defaults():
    cases = {
        "ema_ratio": rules.ema_ratio(1.5, decay=0.9),
        "previous_norm": rules.previous_norm(),
        "ema_zscore": rules.ema_zscore(warmup_steps=5),
        "ema_sigma": rules.ema_sigma(first_cap=np.inf),
        "dual_ema": rules.dual_ema(),
        "window_percentile": rules.window_percentile(50.0, window=8),
        "window_sigma": rules.window_sigma(window=8),
        "geometric_quantile": rules.geometric_quantile(),
        "log_histogram_percentile": rules.log_histogram_percentile(50.0),
    }
    norms = adaptive.norms(steps=220)[:64]

    def run(rule, norms):
        def step(state, n):
            context = rules.Context(jnp.int32(0), n, lambda: n)
            limit, state = rule.update(n, state, context)
            return state, limit.threshold

        return jax.lax.scan(step, rule.init(jnp.zeros([])), norms)[1]

    for name, rule in cases.items():
        each = jax.jit(functools.partial(run, rule))
        wanted = np.asarray(each(norms), np.float64)
        for factor in FACTORS:
            got = np.asarray(each(np.float32(factor) * norms), np.float64)
            np.testing.assert_allclose(
                got / np.float32(factor), wanted, rtol=5e-5, err_msg=name
            )


def test_every_adaptive_transformation_is_covered():
    named = {name.split("-")[0] for name in CASES} | ABSOLUTE
    assert named == {name.split("-")[0] for name in adaptive.ADAPTIVE}
