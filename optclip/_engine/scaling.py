"""The pipeline for scopes whose groups have several entries: measure, then scale."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optclip import actions
from optclip._engine import group_norms, sharding
from optclip._engine.power_sums import Plan, spread, unpool, widen
from optclip._engine.rule import Limit, apply_rule, keep_where
from optclip._engine.update import (
    Call,
    Outcome,
    Statistics,
    check_order,
    context_of,
)

__all__ = ["cast_output", "factors_of", "scale_groups"]

# A group whose norm exceeds its limit by more than this factor is scaled in two steps,
# since the factor of a single step could be subnormal, and XLA flushes subnormal
# numbers to zero. Beyond FAR * 2**64, the first factor is 2**-126, the smallest normal
# float32, so that the second factor is also normal.
FAR = 2.0**96
SMALLEST = 2.0**-126
# Above this fraction of the largest number, the scale of a norm is treated as constant
# in derivatives.
EDGE = 2.0**-16
# Scales with at most this relative difference are treated as equal. It is much larger
# than the rounding error of float32, which is 2**-24.
TIE = 2.0**-16


def factors_of(action: Any, norm: jax.Array, reduced: jax.Array, limit: Limit):
    """Returns the scale of each group as two factors, whose product may be subnormal.

    A norm that overflows its dtype is replaced by the largest number; ``reduced``, the
    norm times 2**-64, is always accurate. The result of an action does not depend on
    the unit of the norm and its limit, so both are passed in a unit that makes them
    normal numbers.
    """
    reduction = group_norms.REDUCTION
    bound = jnp.maximum(limit.threshold, limit.target)
    far = (bound > 0) & (norm > FAR * bound)
    very_far = far & (reduced > FAR * bound)
    overflowed = norm >= jnp.finfo(norm.dtype).max
    unit = jnp.where(overflowed & ~far, reduction, 1.0)
    # The limit is scaled up, instead of scaling the norm down, because some actions add
    # an ``eps`` to the norm.
    unit = jnp.where(very_far, reduction / SMALLEST, unit).astype(norm.dtype)
    passed_norm = jnp.where(far | overflowed, reduced, norm)
    passed_limit = Limit(limit.threshold * unit, limit.target * unit)
    scale = jnp.asarray(action(passed_norm, passed_limit)).astype(norm.dtype)
    # The derivative with respect to the scale is a sum over the group, which would
    # overflow for entries this large.
    edge = norm > jnp.finfo(norm.dtype).max * EDGE
    scale = jnp.where(edge, lax.stop_gradient(scale), scale)
    first = jnp.where(very_far, SMALLEST, jnp.where(far, reduction, 1.0))
    # If there is no threshold, as during the warm-up of most rules, groups are not
    # changed, regardless of the action.
    scale = jnp.where(limit.threshold == jnp.inf, 1.0, scale).astype(norm.dtype)
    first = jnp.where(scale != 1, first, 1.0)
    return scale, first.astype(norm.dtype)


def _norm_after(norm, reduced, scale, first):
    """Returns the norm of each group after scaling, capped at the largest number.

    It is computed from the norm before scaling, without another pass over the updates.
    """
    largest = jnp.finfo(norm.dtype).max
    from_reduced = jnp.minimum(reduced * scale / group_norms.REDUCTION, largest)
    plain = jnp.where(norm >= largest, from_reduced, norm * scale)
    # The order of the products matters, since ``first * scale`` may be subnormal.
    return jnp.where(
        first == 1, plain, reduced * (first / group_norms.REDUCTION) * scale
    )


def _for_leaves(parts: Sequence[tuple], call: Call) -> list[tuple[jax.Array, ...]]:
    """Returns the parts of each leaf, in shapes that broadcast against it."""
    layout = call.cut.layout
    if layout.scalar:
        return [tuple(part[0] for part in parts)] * len(layout.axes)
    each = unpool(parts, call.cut.plan)
    if layout.groups is not None:
        return each
    pairs = zip(each, layout.axes, strict=True)
    return [tuple(spread(v, axes) for v in values) for values, axes in pairs]


@functools.partial(jax.jit, static_argnames=("policy",))
def _scaled(x, scale, first, zeroed=None, *, policy):
    """Returns one leaf times its factors, in float32 or wider, not yet rounded."""
    y = widen(x)
    real = jnp.finfo(y.dtype).dtype
    if policy == "drop":
        y = jnp.where(jnp.isfinite(y), y, jnp.zeros_like(y))
    scale = jnp.minimum(scale, jnp.finfo(real).max)  # the scale's dtype may be wider
    # If the scale is 1, the leaf is selected instead of multiplied, since a product
    # would flush subnormal numbers.
    product = (y * first.astype(real)) * scale.astype(real)
    y = jnp.where(scale == 1, y, product)
    return y if zeroed is None else jnp.where(zeroed, jnp.zeros_like(y), y)


def cast_output(y: jax.Array, like: jax.Array, update_dtype: Any) -> jax.Array:
    """Casts ``y`` to the dtype of ``like``, or to ``update_dtype`` if it is wider."""
    dtype = like.dtype
    if update_dtype is not None and jnp.issubdtype(dtype, jnp.floating):
        if jnp.finfo(dtype).bits < jnp.finfo(update_dtype).bits:
            dtype = jnp.dtype(update_dtype)
    y = y.astype(dtype)
    if getattr(like, "weak_type", False) and dtype == like.dtype:
        y = like.at[...].set(y)  # keeps the weak type of ``like``
    return y


class _Scaling(NamedTuple):
    """How the groups of one array of norms are scaled.

    Attributes:
        limit: The thresholds and targets of the groups.
        scale: The second factor; 1 if the norm is non-finite.
        first: The first factor, as in `factors_of`.
        zeroed: Whether each group is set to zero; None if the ``nonfinite`` policy
            never does so.
        norm_after: The norms of the groups after scaling.
    """

    limit: Limit
    scale: jax.Array
    first: jax.Array
    zeroed: jax.Array | None
    norm_after: jax.Array


def scale_groups(call: Call, rule_state: tuple) -> Outcome:
    """Runs the rule on each array of norms and scales each leaf."""
    options, cut, leaves = call.options, call.cut, call.found.leaves
    shapes = call.cut.shapes
    norms = [n.reshape(s) for n, s in zip(call.measured.norm, shapes, strict=True)]
    reduced = [n.reshape(s) for n, s in zip(call.measured.reduced, shapes, strict=True)]
    bads = [~jnp.isfinite(n) for n in norms]
    safe = [jnp.where(b, 0.0, n) for b, n in zip(bads, norms, strict=True)]
    tree_norm = group_norms.total(safe, cut)
    skipped = call.bad & (options.nonfinite == "skip")

    new_state, results = [], []
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
        zeroed = {"zero": bad, "skip": jnp.broadcast_to(skipped, bad.shape)}.get(
            options.nonfinite
        )
        scale = jnp.where(bad, 1.0, scale)
        norm_after = _norm_after(norm, reduced[k], scale, first)
        norm_after = jnp.where(bad, norms[k], norm_after)
        if zeroed is not None:
            norm_after = jnp.where(zeroed, 0.0, norm_after)
        first = jnp.where(bad, 1.0, first)
        results.append(_Scaling(limit, scale, first, zeroed, norm_after))

    columns = zip(*((r.scale, r.first, r.zeroed) for r in results), strict=True)
    parts = [column for column in columns if column[0] is not None]
    # Without the barrier, XLA on a CPU would share one widened copy of the leaves
    # between measuring and scaling, and write it to memory. With the barrier, XLA fuses
    # the scaling into the optimizer update.
    leaves, parts = sharding.kept_apart_on_cpu((list(leaves), parts))
    factors = _for_leaves(parts, call)
    new = [
        cast_output(
            _scaled(x, *factor, policy=options.nonfinite),
            call.found.leaves[i],
            options.update_dtype,
        )
        for i, (x, factor) in enumerate(zip(leaves, factors, strict=True))
    ]
    limits = [r.limit for r in results]
    total = [r.scale * r.first for r in results]
    statistics = None
    if options.record:
        statistics = Statistics(
            before=group_norms.total(norms, cut),
            after=group_norms.total([r.norm_after for r in results], cut),
            **_summary(safe, limits, total, cut.plan, options.action),
        )
    return Outcome(
        leaves=new,
        rule_state=tuple(new_state),
        statistics=statistics,
        group_stats=(tuple(norms), tuple(li.threshold for li in limits), tuple(total)),
    )


def _summary(norms: list, limits: list, scales: list, plan: Plan, action: Any) -> dict:
    """Returns the smallest scale, its threshold, and the fraction of clipped groups."""
    sharded_over = plan.per_array
    every = list(zip(norms, limits, scales, sharded_over, strict=True))

    def least(x, names):
        low = jnp.min(x, initial=jnp.inf)
        return lax.pmin(low, names) if names else low

    smallest = jnp.min(jnp.stack([least(s, a) for _, _, s, a in every]))
    # Several groups may share the smallest scale, as during warm-up. Rounding, which
    # differs between machines, would decide which of them is the smallest, so the
    # smallest of their thresholds is used.
    last = smallest + TIE * smallest
    thresholds = [
        least(jnp.where(s <= last, li.threshold, jnp.inf), a) for _, li, s, a in every
    ]
    # With an ``eps``, `rescale` also clips norms just below the threshold.
    padded = getattr(action, "func", None) is actions.rescale
    over, count = 0.0, 0
    for norm, limit, scale, names in every:
        clipped = norm > limit.threshold
        if padded:
            clipped |= scale < 1
        number = jnp.sum(clipped).astype(jnp.float32)
        over = over + (lax.psum(number, names) if names else number)
        count += norm.size * group_norms.devices_along(names)
    return {
        "threshold": jnp.min(jnp.stack(thresholds)),
        "scale": smallest,
        "clipped": over / max(count, 1),
    }
