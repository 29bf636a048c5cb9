"""The pipeline for element scope: each entry is a group, so clipping is a clamp.

Arrays of norms and scales are never written to memory. For the telemetry, one pass over
the updates finds the largest magnitude of each leaf. XLA fuses the clamp into the
operations that use its result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optclip import actions
from optclip._engine import group_norms, sharding
from optclip._engine.numerics import largest_of
from optclip._engine.power_sums import widen
from optclip._engine.rule import Limit, apply_rule, keep_where
from optclip._engine.scaling import cast_output, factors_of
from optclip._engine.update import Call, Options, Outcome, Statistics, context_of

__all__ = ["clamp_elements", "magnitudes"]


def magnitudes(x: jax.Array) -> jax.Array:
    """Returns the magnitude of each entry, in float32 or wider."""
    return jnp.abs(widen(x))


def _sign(x: jax.Array) -> jax.Array:
    """Returns ``x / |x|``, the sign of each entry; 0 for 0, and finite for infinity."""
    if not jnp.iscomplexobj(x):
        return jnp.sign(x)
    largest = jnp.maximum(jnp.abs(x.real), jnp.abs(x.imag))
    infinite = jnp.isinf(largest)

    def part(p):
        shrunk = p / jnp.where((largest > 0) & ~infinite, largest, 1.0)
        return jnp.where(infinite, jnp.where(jnp.isinf(p), jnp.sign(p), 0.0), shrunk)

    re, im = part(x.real), part(x.imag)
    magnitude = jnp.hypot(re, im)
    magnitude = jnp.where(magnitude > 0, magnitude, 1.0)
    return lax.complex(re / magnitude, im / magnitude)


def _clamp(
    x: jax.Array, magnitude: jax.Array, limit: Limit, action: Callable
) -> jax.Array:
    """Returns ``x``, whose magnitudes are ``magnitude``, clipped to its limits."""
    if limit.low is not None:
        if jnp.iscomplexobj(x):
            raise ValueError(
                f"Clipping between two values needs real updates, got a complex leaf "
                f"of dtype {x.dtype}. Give one number instead: it bounds the magnitude."
            )
        low, high = (jnp.asarray(v).astype(x.dtype) for v in (limit.low, limit.target))
        return jnp.clip(x, low, high)
    threshold, target = (jnp.asarray(v).astype(magnitude.dtype) for v in limit[:2])
    if action is actions.rescale and limit.target is limit.threshold:
        if not jnp.iscomplexobj(x):  # the code below is equivalent but slower
            # XLA would turn two comparisons of ``x`` with its bounds into a minimum and
            # a maximum, which may flush subnormal numbers. So only |x| is compared.
            return jnp.where(jnp.abs(x) > target, jnp.where(x > 0, target, -target), x)
    # Rules receive 0 in place of an infinite entry, so the target that they return for
    # it may be unrelated to the threshold.
    infinite = jnp.isinf(magnitude)
    target = jnp.where(infinite, threshold, target)
    if action is actions.rescale:
        return jnp.where(magnitude > threshold, _sign(x) * target, x)
    # All other actions treat an infinite entry as the largest finite number.
    largest = jnp.finfo(magnitude.dtype).max
    magnitude = jnp.minimum(magnitude, largest)
    reduced = magnitude * group_norms.REDUCTION
    scale, first = factors_of(action, magnitude, reduced, Limit(threshold, target))
    bounded = jnp.where(infinite, _sign(x) * largest, x)
    return jnp.where(scale == 1, x, bounded * first * scale)


def _largest_after(
    y: jax.Array,
    top: jax.Array,
    limit: Limit,
    action: Callable,
    max_over_devices: Callable,
) -> jax.Array:
    """Returns the largest magnitude after the clamp, given ``top``, the largest before.

    If all entries share one limit, it is computed from ``top`` without another pass.
    """
    if limit.low is not None or jnp.ndim(limit.threshold) or jnp.ndim(limit.target):
        return _largest(jnp.abs(y), max_over_devices).astype(top.dtype)
    finite = jnp.minimum(top, jnp.finfo(top.dtype).max)
    after = _clamp(finite, finite, limit, action)
    return jnp.where(jnp.isnan(top), top, after).astype(top.dtype)


def _largest(magnitude: jax.Array, max_over_devices: Callable) -> jax.Array:
    """Returns the largest magnitude over all devices, or NaN if there is a NaN."""
    return largest_of(
        magnitude,
        add=lambda flags: max_over_devices(jnp.max(flags, initial=0)),
        most=lambda x: max_over_devices(jnp.max(x, initial=0.0)),
    )


def _exceeds(x: jax.Array, magnitude: jax.Array, limit: Limit) -> jax.Array:
    """Returns a mask of the entries that are outside their limits."""
    if limit.low is None:
        return magnitude > limit.threshold
    return (x < limit.low) | (x > limit.target)


def _smallest_factor(
    magnitude: jax.Array, y: jax.Array, exceeding: jax.Array, max_over_devices: Callable
) -> jax.Array:
    """Returns the smallest |y| / |x| of the clipped entries, or 1 if there are none."""
    usable = exceeding & (magnitude > 0) & jnp.isfinite(magnitude)
    share = jnp.abs(y) / jnp.where(usable, magnitude, 1.0)
    least = -max_over_devices(
        -jnp.min(jnp.where(usable, share, jnp.inf), initial=jnp.inf)
    )
    return jnp.where(least < jnp.inf, least, 1.0)


def clamp_elements(call: Call, rule_state: tuple) -> Outcome:
    """Runs the rule on the magnitudes of each leaf and clamps its entries."""
    options, policy = call.options, call.options.nonfinite
    leaves, tree_norm, skipped = list(call.found.leaves), jnp.zeros([]), False
    tops: Any = None
    if call.measured is not None:
        tops = call.measured.norm[0]
        tree_norm = jnp.max(jnp.where(jnp.isfinite(tops), tops, 0.0))
        skipped = call.bad & (policy == "skip")
        # As in `scale_groups`, without this barrier XLA on a CPU would write the values
        # shared by measuring and clamping to memory.
        leaves, tops = sharding.kept_apart_on_cpu((leaves, tops))
    new, new_state, recorded = [], [], []
    for i, x in enumerate(leaves):
        wide = widen(x)
        magnitude = magnitudes(x)
        bad = ~jnp.isfinite(magnitude)
        max_over_devices = functools.partial(
            sharding.most, names=call.cut.plan.names[i]
        )
        context = context_of(call, i, tree_norm)._replace(across=max_over_devices)
        safe = jnp.where(bad, jnp.zeros_like(magnitude), magnitude)
        rule = call.rules[i]
        limit, after = apply_rule(rule, safe, rule_state[i], context, elements=True)
        new_state.append(
            keep_where(bad | skipped, rule_state[i], after, max_over_devices)
        )
        y = _clamp(wide, magnitude, limit, options.action)
        if policy in ("zero", "drop"):
            y = jnp.where(bad, jnp.zeros_like(y), y)
        y = jnp.where(skipped, jnp.zeros_like(y), y) if policy == "skip" else y
        new.append(cast_output(y, call.found.leaves[i], options.update_dtype))
        if options.record:
            recorded.append(
                _leaf_statistics(
                    wide,
                    magnitude,
                    y,
                    tops[i],
                    limit,
                    skipped,
                    options,
                    max_over_devices,
                )
            )
    statistics = _statistics(recorded, tops) if options.record else None
    return Outcome(new, tuple(new_state), statistics)


def _leaf_statistics(
    x: jax.Array,
    magnitude: jax.Array,
    y: jax.Array,
    top: jax.Array,
    limit: Limit,
    skipped: Any,
    options: Options,
    max_over_devices: Callable,
) -> tuple[jax.Array, ...]:
    """Returns (largest clipped magnitude, threshold, clipped, scale) for one leaf."""
    last = _largest_after(y, top, limit, options.action, max_over_devices)
    if options.nonfinite in ("zero", "drop"):
        last = jnp.where(jnp.isnan(top), 0.0, last)
    last = jnp.where(skipped, 0.0, last)
    threshold: Any = jnp.asarray(limit.threshold).astype(top.dtype)
    low = jnp.min(threshold, initial=jnp.inf)
    if threshold.ndim == 0 and limit.low is None:
        # Division on a GPU is not correctly rounded, so x / x may be below 1.
        usable = jnp.isfinite(top) & (top > 0) & (last != top)
        scale = jnp.where(usable, last / jnp.where(usable, top, 1.0), 1.0)
        return last, low, top > threshold, scale
    exceeding = _exceeds(x, magnitude, limit)
    over = max_over_devices(jnp.any(exceeding).astype(jnp.int32)) > 0
    scale = _smallest_factor(magnitude, y, exceeding, max_over_devices).astype(
        top.dtype
    )
    return last, -max_over_devices(-low), over, scale


def _statistics(leaves: list[tuple[jax.Array, ...]], tops: jax.Array) -> Statistics:
    """Returns the statistics of the whole tree, given those of each leaf."""
    afters, thresholds, overs, scales = map(jnp.stack, zip(*leaves, strict=True))
    return Statistics(
        before=largest_of(tops),
        after=largest_of(afters),
        threshold=jnp.min(thresholds),
        scale=jnp.min(scales),
        clipped=jnp.mean(overs.astype(jnp.float32)),
    )
