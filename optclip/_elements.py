"""The pipeline for element scope: each entry is a group, and clipping is a clamp.

No array of norms or scales is written out. One read finds the largest magnitude of each
leaf, for the telemetry; the clamp itself melts into what follows it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optclip import _measure, _trees, actions
from optclip._engine import Call, Outcome, apply_rule, context_of, finish
from optclip._groups import factors_of
from optclip._numbers import largest_of
from optclip.rules import Limit
from optclip.rules._base import hold

__all__ = ["clamp_elements", "magnitudes"]


def magnitudes(x: jax.Array) -> jax.Array:
    """Returns |x| of each entry, in float32 or wider."""
    return jnp.abs(_measure.widen(x))


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
    # A rule never sees an infinite entry, so its target may have nothing to do with it.
    infinite = jnp.isinf(size)
    target = jnp.where(infinite, threshold, target)
    if action is actions.rescale:
        return jnp.where(size > threshold, _direction(x) * target, x)
    # For all other actions an infinite entry is the largest finite one.
    largest = jnp.finfo(size.dtype).max
    size = jnp.minimum(size, largest)
    reduced = size * _measure.REDUCTION
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
    return -across(-jnp.min(jnp.where(asked, share, 1.0), initial=1.0))


def clamp_elements(call: Call, rule_state: tuple) -> Outcome:
    """Runs the rule on the magnitudes of each leaf, and clamps its entries."""
    options, policy = call.options, call.options.nonfinite
    tops = call.measured.norm[0]
    tree_norm = jnp.max(jnp.where(jnp.isfinite(tops), tops, 0.0))
    skipped = call.bad & (policy == "skip")
    new, new_state, afters, thresholds, overs, scales = [], [], [], [], [], []
    # As in `_groups`: or XLA writes out what measuring and clamping share.
    leaves, tops = _trees.kept_apart((list(call.found.leaves), tops))
    for i, x in enumerate(leaves):
        wide = _measure.widen(x)
        size = magnitudes(x)
        bad = ~jnp.isfinite(size)
        across = functools.partial(_trees.most, names=call.plan.names[i])
        context = context_of(call, i, tree_norm)._replace(across=across)
        safe = jnp.where(bad, jnp.zeros_like(size), size)
        rule = call.rules[i]
        limit, after = apply_rule(rule, safe, rule_state[i], context, elements=True)
        new_state.append(hold(bad | skipped, rule_state[i], after, across))
        y = _clamp(wide, size, limit, options.action)
        if policy in ("zero", "drop"):
            y = jnp.where(bad, jnp.zeros_like(y), y)
        y = jnp.where(skipped, jnp.zeros_like(y), y) if policy == "skip" else y
        new.append(finish(y, call.found.leaves[i], options.update_dtype))
        top = tops[i]
        last = _after(y, top, limit, options.action, across)
        if policy in ("zero", "drop"):
            last = jnp.where(jnp.isnan(top), 0.0, last)
        afters.append(jnp.where(skipped, 0.0, last))
        threshold: Any = jnp.asarray(limit.threshold).astype(tops.dtype)
        low = jnp.min(threshold, initial=jnp.inf)
        if threshold.ndim == 0 and limit.low is None:
            thresholds.append(low)
            overs.append(top > threshold)
            usable = jnp.isfinite(top) & (top > 0)
            scales.append(jnp.where(usable, last / jnp.where(usable, top, 1.0), 1.0))
            continue
        thresholds.append(-across(-low))
        past = _past(wide, size, limit)
        overs.append(across(jnp.any(past).astype(jnp.int32)) > 0)
        scales.append(_smallest_factor(size, y, past, across).astype(tops.dtype))
    return Outcome(
        leaves=new,
        rule_state=tuple(new_state),
        before=largest_of(tops),
        after=largest_of(jnp.stack(afters)),
        threshold=jnp.min(jnp.stack(thresholds)),
        scale=jnp.min(jnp.stack(scales)),
        clipped=jnp.mean(jnp.stack(overs).astype(jnp.float32)),
    )
