"""The pipeline for scopes whose groups have many entries: measure, then rescale."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optclip import actions
from optclip._engine import group_norms, sharding
from optclip._engine.power_sums import Plan, spread, unpool, widen
from optclip._engine.rule import Limit, apply_rule, keep_where
from optclip._engine.update import (
    Call,
    Figures,
    Outcome,
    check_order,
    context_of,
)

__all__ = ["cast_output", "factors_of", "scale_groups"]

# A norm this many times its limit is scaled in two steps: the factor of one step would
# be subnormal, and XLA flushes subnormal numbers to zero. Beyond FAR * 2**64 the first
# step is 2**-126, the smallest normal float32, so that the second stays normal too.
FAR = 2.0**96
SMALLEST = 2.0**-126
# From this share of the largest number on, a scale counts as constant in derivatives.
EDGE = 2.0**-16
# Scales this near to the smallest, relative to it, differ from it by rounding only.
TIE = 2.0**-16


def factors_of(action: Any, norm: jax.Array, reduced: jax.Array, limit: Limit):
    """Returns the scale of each group as two factors, whose product may be subnormal.

    A norm larger than its dtype can hold reads as the largest number; ``reduced`` is
    2**-64 times the norm and always right. An action does not depend on the unit, so it
    is given a norm and its limit in a unit in which both are normal numbers.
    """
    reduction = group_norms.REDUCTION
    bound = jnp.maximum(limit.threshold, limit.target)
    far = (bound > 0) & (norm > FAR * bound)
    very_far = far & (reduced > FAR * bound)
    overflowed = norm >= jnp.finfo(norm.dtype).max
    unit = jnp.where(overflowed & ~far, reduction, 1.0)
    # The limit up, and not the norm down, where an action adds an epsilon to the norm.
    unit = jnp.where(very_far, reduction / SMALLEST, unit).astype(norm.dtype)
    length = jnp.where(far | overflowed, reduced, norm)
    near = Limit(limit.threshold * unit, limit.target * unit)
    scale = jnp.asarray(action(length, near)).astype(norm.dtype)
    # The derivative by the scale is the group itself, whose sum would overflow here.
    edge = norm > jnp.finfo(norm.dtype).max * EDGE
    scale = jnp.where(edge, lax.stop_gradient(scale), scale)
    first = jnp.where(very_far, SMALLEST, jnp.where(far, reduction, 1.0))
    # Without a threshold, as in the first steps of most rules, no action does anything.
    scale = jnp.where(limit.threshold == jnp.inf, 1.0, scale).astype(norm.dtype)
    first = jnp.where(scale != 1, first, 1.0)
    return scale, first.astype(norm.dtype)


def _length_after(norm, reduced, scale, first):
    """Returns the norm of each group once it is scaled, or the largest number.

    It follows from what was measured: the updates need not be measured once more.
    """
    largest = jnp.finfo(norm.dtype).max
    long = jnp.minimum(reduced * scale / group_norms.REDUCTION, largest)
    plain = jnp.where(norm >= largest, long, norm * scale)
    # The second factor first: `first` and `scale` together may be subnormal.
    return jnp.where(
        first == 1, plain, reduced * (first / group_norms.REDUCTION) * scale
    )


def _for_leaves(parts: Sequence[tuple], call: Call) -> list[tuple[jax.Array, ...]]:
    """Returns what belongs to each leaf, in shapes that broadcast against it."""
    layout = call.cut.layout
    if layout.scalar:
        return [tuple(part[0] for part in parts)] * len(layout.axes)
    each = unpool(parts, call.cut.plan)
    if layout.groups is not None:
        return each
    pairs = zip(each, layout.axes, strict=True)
    return [tuple(spread(v, axes) for v in own) for own, axes in pairs]


@functools.partial(jax.jit, static_argnames=("policy",))
def _scaled(x, scale, first, dead=None, *, policy):
    """Returns one leaf times its factors, in float32 or wider, not yet rounded."""
    y = widen(x)
    real = jnp.finfo(y.dtype).dtype
    if policy == "drop":
        y = jnp.where(jnp.isfinite(y), y, jnp.zeros_like(y))
    scale = jnp.minimum(scale, jnp.finfo(real).max)  # it may be of a wider dtype
    # Chosen where it is 1, not multiplied: that would flush subnormal numbers.
    product = (y * first.astype(real)) * scale.astype(real)
    y = jnp.where(scale == 1, y, product)
    return y if dead is None else jnp.where(dead, jnp.zeros_like(y), y)


def cast_output(y: jax.Array, like: jax.Array, update_dtype: Any) -> jax.Array:
    """Rounds once, to the dtype of ``like`` or to an ``update_dtype`` wider than it."""
    dtype = like.dtype
    if update_dtype is not None and jnp.issubdtype(dtype, jnp.floating):
        if jnp.finfo(dtype).bits < jnp.finfo(update_dtype).bits:
            dtype = jnp.dtype(update_dtype)
    y = y.astype(dtype)
    if getattr(like, "weak_type", False) and dtype == like.dtype:
        y = like.at[...].set(y)  # which keeps the weak type of ``like``
    return y


def scale_groups(call: Call, rule_state: tuple) -> Outcome:
    """Runs the rule on each array of norms, and scales each leaf by what comes out."""
    options, cut, leaves = call.options, call.cut, call.found.leaves
    shapes = call.cut.shapes
    norms = [n.reshape(s) for n, s in zip(call.measured.norm, shapes, strict=True)]
    reduced = [n.reshape(s) for n, s in zip(call.measured.reduced, shapes, strict=True)]
    bads = [~jnp.isfinite(n) for n in norms]
    safe = [jnp.where(b, 0.0, n) for b, n in zip(bads, norms, strict=True)]
    tree_norm = group_norms.total(safe, cut)
    skipped = call.bad & (options.nonfinite == "skip")

    new_state, scales, firsts, deads, afters, limits = [], [], [], [], [], []
    for k, (norm, bad) in enumerate(zip(safe, bads, strict=True)):
        context = context_of(call, k, tree_norm)
        limit, after = apply_rule(call.rules[k], norm, rule_state[k], context)
        check_order(options, limit)
        new_state.append(keep_where(bad | skipped, rule_state[k], after))
        limit = Limit(
            *(
                jnp.broadcast_to(jnp.asarray(v).astype(norm.dtype), norm.shape)
                for v in limit[:2]
            )
        )
        scale, first = factors_of(options.action, norm, reduced[k], limit)
        dead = {"zero": bad, "skip": jnp.broadcast_to(skipped, bad.shape)}.get(
            options.nonfinite
        )
        scales.append(jnp.where(bad, 1.0, scale))
        firsts.append(jnp.where(bad, 1.0, first))
        deads.append(dead)
        limits.append(limit)
        length = _length_after(norm, reduced[k], scales[-1], first)
        length = jnp.where(bad, norms[k], length)
        afters.append(length if dead is None else jnp.where(dead, 0.0, length))

    parts = [tuple(p) for p in (scales, firsts, deads) if p[0] is not None]
    # Without the barrier XLA shares one widened copy of the leaves between measuring
    # and scaling, and writes it out. With it, XLA fuses the scaling into the optimizer
    # update.
    leaves, parts = sharding.kept_apart((list(leaves), parts))
    factors = _for_leaves(parts, call)
    new = [
        cast_output(
            _scaled(x, *factor, policy=options.nonfinite),
            call.found.leaves[i],
            options.update_dtype,
        )
        for i, (x, factor) in enumerate(zip(leaves, factors, strict=True))
    ]
    total = [s * f for s, f in zip(scales, firsts, strict=True)]
    figures = None
    if options.record:
        figures = Figures(
            before=group_norms.total(norms, cut),
            after=group_norms.total(afters, cut),
            **_summary(safe, limits, total, cut.plan, options.action),
        )
    return Outcome(
        leaves=new,
        rule_state=tuple(new_state),
        figures=figures,
        stats=(tuple(norms), tuple(li.threshold for li in limits), tuple(total)),
    )


def _summary(norms: list, limits: list, scales: list, plan: Plan, action: Any) -> dict:
    """Returns the figures of the group that was shortened most, and how many were."""
    across = plan.per_array
    every = list(zip(norms, limits, scales, across, strict=True))

    def least(x, names):
        low = jnp.min(x, initial=jnp.inf)
        return lax.pmin(low, names) if names else low

    chosen = jnp.min(jnp.stack([least(s, a) for _, _, s, a in every]))
    # Of groups that are scaled alike, as in a warm-up, the smallest threshold: which of
    # them rounding puts first would differ from machine to machine.
    last = chosen + TIE * chosen
    thresholds = [
        least(jnp.where(s <= last, li.threshold, jnp.inf), a) for _, li, s, a in every
    ]
    # Hard clipping with an `eps` scales down norms just below the threshold as well.
    padded = getattr(action, "func", None) is actions.rescale
    over, count = 0.0, 0
    for norm, limit, scale, names in every:
        clipped = norm > limit.threshold
        if padded:
            clipped |= scale < 1
        mine = jnp.sum(clipped).astype(jnp.float32)
        over = over + (lax.psum(mine, names) if names else mine)
        count += norm.size * group_norms.devices_along(names)
    return {
        "threshold": jnp.min(jnp.stack(thresholds)),
        "scale": chosen,
        "clipped": over / max(count, 1),
    }
