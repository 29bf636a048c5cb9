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
    if limit.low is not None:
        if jnp.iscomplexobj(x):
            raise ValueError(
                "A clip between two values needs real updates, got a complex leaf. "
                "Give one number, which bounds the magnitude."
            )
        low, high = (jnp.asarray(v).astype(x.dtype) for v in (limit.low, limit.target))
        return jnp.clip(x, low, high)
    if action is actions.rescale:
        target = jnp.asarray(limit.target).astype(size.dtype)
        return jnp.where(size > limit.threshold, _direction(x) * target, x)
    # An infinite entry is treated as the largest finite one.
    largest = jnp.finfo(size.dtype).max
    scale = action(jnp.minimum(size, largest), limit)
    bounded = jnp.where(jnp.isinf(size), _direction(x) * largest, x)
    return jnp.where(scale == 1, x, bounded * scale)


def _after(
    y: jax.Array, top: jax.Array, limit: Limit, action: Callable, across: Callable
) -> jax.Array:
    """Returns the largest magnitude after the clamp; ``top`` was it before.

    With one limit for all entries it follows from ``top``, without another read.
    """
    if limit.low is not None or jnp.ndim(limit.threshold) or jnp.ndim(limit.target):
        return across(jnp.max(jnp.abs(y), initial=0.0)).astype(top.dtype)
    finite = jnp.minimum(top, jnp.finfo(top.dtype).max)
    if action is actions.rescale:
        after = jnp.where(finite > limit.threshold, limit.target, finite)
    else:
        after = finite * action(finite, limit)
    return jnp.where(jnp.isnan(top), top, after).astype(top.dtype)


def clamp_elements(call: Call, rule_state: tuple) -> Outcome:
    """Runs the rule on the magnitudes of each leaf, and clamps its entries."""
    options, policy = call.options, call.options.nonfinite
    tops = call.measured.norm[0]
    tree_norm = jnp.max(jnp.where(jnp.isfinite(tops), tops, 0.0))
    skipped = call.bad & (policy == "skip")
    new, new_state, afters, thresholds, overs = [], [], [], [], []
    # As in `_groups`: or XLA writes out what measuring and clamping share.
    leaves, tops = _trees.kept_apart((list(call.found.leaves), tops))
    for i, x in enumerate(leaves):
        y = _measure.widen(x)
        size = magnitudes(x)
        bad = ~jnp.isfinite(size)
        across = functools.partial(_trees.most, names=call.plan.names[i])
        context = context_of(call, i, tree_norm)._replace(across=across)
        safe = jnp.where(bad, jnp.zeros_like(size), size)
        limit, after = apply_rule(options.rule, safe, rule_state[i], context)
        new_state.append(hold(bad | skipped, rule_state[i], after, across))
        y = _clamp(y, size, limit, options.action)
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
        one_for_all = threshold.ndim == 0
        thresholds.append(low if one_for_all else -across(-low))
        past = jnp.any(size > threshold).astype(jnp.int32)
        overs.append(top > threshold if one_for_all else across(past) > 0)
    limits = jnp.stack(thresholds)
    before, after = jnp.max(tops), jnp.max(jnp.stack(afters))
    usable = jnp.isfinite(before) & (before > 0)
    return Outcome(
        leaves=new,
        rule_state=tuple(new_state),
        before=before,
        after=after,
        threshold=jnp.min(limits),
        scale=jnp.where(usable, after / jnp.where(usable, before, 1.0), 1.0),
        clipped=jnp.mean(jnp.stack(overs).astype(jnp.float32)),
    )
