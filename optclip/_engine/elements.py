"""The pipeline for element scope: each entry is a group, and clipping is a clamp.

No array of norms or scales is written out. One read finds the largest magnitude of each
leaf, for the telemetry; XLA fuses the clamp into what follows it.
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
from optclip._engine.update import Call, Figures, Options, Outcome, context_of

__all__ = ["clamp_elements", "magnitudes"]


def magnitudes(x: jax.Array) -> jax.Array:
    """Returns |x| of each entry, in float32 or wider."""
    return jnp.abs(widen(x))


def _direction(x: jax.Array) -> jax.Array:
    """Returns numbers of magnitude 1 (or 0) that point where ``x`` does."""
    if not jnp.iscomplexobj(x):
        return jnp.sign(x)
    largest = jnp.maximum(jnp.abs(x.real), jnp.abs(x.imag))
    infinite = jnp.isinf(largest)

    def part(p):
        shrunk = p / jnp.where((largest > 0) & ~infinite, largest, 1.0)
        return jnp.where(infinite, jnp.where(jnp.isinf(p), jnp.sign(p), 0.0), shrunk)

    re, im = part(x.real), part(x.imag)
    size = jnp.hypot(re, im)
    size = jnp.where(size > 0, size, 1.0)
    return lax.complex(re / size, im / size)


def _clamp(x: jax.Array, size: jax.Array, limit: Limit, action: Callable) -> jax.Array:
    """Returns the entries of ``x``, of magnitudes ``size``, within their limits."""
    if limit.low is not None:
        if jnp.iscomplexobj(x):
            raise ValueError(
                "A clip between two values needs real updates, got a complex leaf. "
                "Give one number, which bounds the magnitude."
            )
        low, high = (jnp.asarray(v).astype(x.dtype) for v in (limit.low, limit.target))
        return jnp.clip(x, low, high)
    threshold, target = (jnp.asarray(v).astype(size.dtype) for v in limit[:2])
    if action is actions.rescale and limit.target is limit.threshold:
        if not jnp.iscomplexobj(x):  # what follows comes to the same, with more work
            # Not two comparisons of ``x``: XLA makes a minimum and a maximum of these,
            # which may flush subnormal numbers.
            return jnp.where(jnp.abs(x) > target, jnp.where(x > 0, target, -target), x)
    # A rule never sees an infinite entry, so its target may have nothing to do with it.
    infinite = jnp.isinf(size)
    target = jnp.where(infinite, threshold, target)
    if action is actions.rescale:
        return jnp.where(size > threshold, _direction(x) * target, x)
    # For all other actions an infinite entry is the largest finite one.
    largest = jnp.finfo(size.dtype).max
    size = jnp.minimum(size, largest)
    reduced = size * group_norms.REDUCTION
    scale, first = factors_of(action, size, reduced, Limit(threshold, target))
    bounded = jnp.where(infinite, _direction(x) * largest, x)
    return jnp.where(scale == 1, x, bounded * first * scale)


def _after(
    y: jax.Array, top: jax.Array, limit: Limit, action: Callable, across: Callable
) -> jax.Array:
    """Returns the largest magnitude after the clamp; ``top`` was it before.

    With one limit for all entries it follows from ``top``, without another pass.
    """
    if limit.low is not None or jnp.ndim(limit.threshold) or jnp.ndim(limit.target):
        return _largest(jnp.abs(y), across).astype(top.dtype)
    finite = jnp.minimum(top, jnp.finfo(top.dtype).max)
    after = _clamp(finite, finite, limit, action)
    return jnp.where(jnp.isnan(top), top, after).astype(top.dtype)


def _largest(size: jax.Array, across: Callable) -> jax.Array:
    """Returns the largest magnitude on all devices, NaN if there is one."""
    return largest_of(
        size,
        add=lambda flags: across(jnp.max(flags, initial=0)),
        most=lambda x: across(jnp.max(x, initial=0.0)),
    )


def _past(x: jax.Array, size: jax.Array, limit: Limit) -> jax.Array:
    """Returns which entries are outside of their limits."""
    if limit.low is None:
        return size > limit.threshold
    return (x < limit.low) | (x > limit.target)


def _smallest_factor(
    size: jax.Array, y: jax.Array, past: jax.Array, across: Callable
) -> jax.Array:
    """Returns the smallest |y| / |x| of the clipped entries, 1 if there is none."""
    asked = past & (size > 0) & jnp.isfinite(size)
    share = jnp.abs(y) / jnp.where(asked, size, 1.0)
    least = -across(-jnp.min(jnp.where(asked, share, jnp.inf), initial=jnp.inf))
    return jnp.where(least < jnp.inf, least, 1.0)


def clamp_elements(call: Call, rule_state: tuple) -> Outcome:
    """Runs the rule on the magnitudes of each leaf, and clamps its entries."""
    options, policy = call.options, call.options.nonfinite
    leaves, tree_norm, skipped = list(call.found.leaves), jnp.zeros([]), False
    tops: Any = None
    if call.measured is not None:
        tops = call.measured.norm[0]
        tree_norm = jnp.max(jnp.where(jnp.isfinite(tops), tops, 0.0))
        skipped = call.bad & (policy == "skip")
        # As in `_groups`: or XLA writes out what measuring and clamping share.
        leaves, tops = sharding.kept_apart((leaves, tops))
    new, new_state, seen = [], [], []
    for i, x in enumerate(leaves):
        wide = widen(x)
        size = magnitudes(x)
        bad = ~jnp.isfinite(size)
        across = functools.partial(sharding.most, names=call.cut.plan.names[i])
        context = context_of(call, i, tree_norm)._replace(across=across)
        safe = jnp.where(bad, jnp.zeros_like(size), size)
        rule = call.rules[i]
        limit, after = apply_rule(rule, safe, rule_state[i], context, elements=True)
        new_state.append(keep_where(bad | skipped, rule_state[i], after, across))
        y = _clamp(wide, size, limit, options.action)
        if policy in ("zero", "drop"):
            y = jnp.where(bad, jnp.zeros_like(y), y)
        y = jnp.where(skipped, jnp.zeros_like(y), y) if policy == "skip" else y
        new.append(cast_output(y, call.found.leaves[i], options.update_dtype))
        if options.record:
            seen.append(_seen(wide, size, y, tops[i], limit, skipped, options, across))
    figures = _figures(seen, tops) if options.record else None
    return Outcome(new, tuple(new_state), figures)


def _seen(
    x: jax.Array,
    size: jax.Array,
    y: jax.Array,
    top: jax.Array,
    limit: Limit,
    skipped: Any,
    options: Options,
    across: Callable,
) -> tuple[jax.Array, ...]:
    """Returns (largest magnitude after, threshold, clipped, scale) of one leaf."""
    last = _after(y, top, limit, options.action, across)
    if options.nonfinite in ("zero", "drop"):
        last = jnp.where(jnp.isnan(top), 0.0, last)
    last = jnp.where(skipped, 0.0, last)
    threshold: Any = jnp.asarray(limit.threshold).astype(top.dtype)
    low = jnp.min(threshold, initial=jnp.inf)
    if threshold.ndim == 0 and limit.low is None:
        usable = jnp.isfinite(top) & (top > 0)
        scale = jnp.where(usable, last / jnp.where(usable, top, 1.0), 1.0)
        return last, low, top > threshold, scale
    past = _past(x, size, limit)
    over = across(jnp.any(past).astype(jnp.int32)) > 0
    scale = _smallest_factor(size, y, past, across).astype(top.dtype)
    return last, -across(-low), over, scale


def _figures(seen: list[tuple[jax.Array, ...]], tops: jax.Array) -> Figures:
    afters, thresholds, overs, scales = map(jnp.stack, zip(*seen, strict=True))
    return Figures(
        before=largest_of(tops),
        after=largest_of(afters),
        threshold=jnp.min(thresholds),
        scale=jnp.min(scales),
        clipped=jnp.mean(overs.astype(jnp.float32)),
    )
