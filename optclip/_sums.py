"""Sums of powers over the leaves of a tree, trusted at every size of their entries.

A sum of squares is taken in float32 or wider, in one pass. Only where a sum left the
range in which it can be trusted, or is not finite, the leaves are read again with care:
scaled by powers of two, their bad entries counted. So the usual step costs one read of
the gradients, and the step on which they explode is measured all the same.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optclip import _trees
from optclip._numbers import usable_unit
from optclip._reads import (
    Arrays,
    Plan,
    constants,
    lost_below,
    read,
    rescue,
    wide_dtype,
)

__all__ = ["power_sums"]


def _anywhere(flags: Sequence[jax.Array], plan: Plan) -> jax.Array:
    """Returns whether a flag is set, on any device that takes part."""
    flag = functools.reduce(jnp.logical_or, [jnp.any(f) for f in flags])
    names = tuple(sorted({a for n in plan.everywhere for a in n}))
    if names and not plan.groups:  # else every device has the same sums anyway
        flag = lax.pmax(flag.astype(jnp.int32), names) > 0
    return flag


def _apart(leaves: Arrays, plan: Plan) -> tuple[str, ...]:
    """Returns the mesh axes along which each device has sums of its own."""
    pairs = zip(leaves, plan.everywhere, strict=True)
    own = {n for x, names in pairs for n in _trees.varying(x) if n not in names}
    return tuple(sorted(own))


def _floors(leaves: Sequence[jax.Array], like: Arrays, plan: Plan) -> Arrays:
    lost = [lost_below(x) if plan.order == 2.0 else 0.0 for x in leaves]
    return constants(lost, like, plan)


def _under(sums: Arrays, floors: Arrays, plan: Plan) -> list[jax.Array]:
    """Returns where entries may have been lost, and matter to the total of a group."""
    if plan.groups and len(set(plan.groups)) == 1:
        sums = (jnp.broadcast_to(jnp.sum(sums[0]), sums[0].shape),)
    elif plan.groups and len(set(plan.groups)) < len(plan.groups):
        at = np.asarray(plan.groups)
        sums = (jax.ops.segment_sum(sums[0], at, at.max() + 1)[at],)
    return [s < f for s, f in zip(sums, floors, strict=True)]


def _with_nan(leaves: Arrays, sums: Arrays, entries: jax.Array, plan: Plan) -> Arrays:
    """Returns the maxima of groups, NaN for those that hold a NaN.

    A maximum over shards loses NaN, so `read` counts it as infinity; sums keep it.
    """
    if plan.groups:
        return (jnp.where(entries[:, 0] > 0, jnp.nan, sums[0]),)
    masks = tuple(jnp.isnan(x).astype(wide_dtype(x)) for x in leaves)
    (counts,), _ = read(masks, [None], plan._replace(order=1.0))
    return tuple(
        jnp.where(count > 0, jnp.nan, s) for count, s in zip(counts, sums, strict=True)
    )


def _with_care(leaves: Arrays, sums: Arrays, units: Arrays, plan: Plan):
    """Returns sums, units and counts, right whatever the leaves hold."""
    if plan.drop:
        (sums,), _ = read(leaves, [tuple(1 / u for u in units)], plan)
    if plan.order not in (1.0, 2.0):
        entries = read(leaves, [], plan, count=True)[1]
        if plan.order == np.inf and not plan.drop:
            sums = _with_nan(leaves, sums, entries, plan)
        return sums, units, entries
    under = _under(sums, _floors(leaves, sums, plan), plan)
    rescues = constants([rescue(x) for x in leaves], sums, plan)
    factors = tuple(
        jnp.where(s < jnp.inf, jnp.where(u, r, 1.0), 1 / r).astype(s.dtype)
        for s, u, r in zip(sums, under, rescues, strict=True)
    )
    (sums,), entries = read(leaves, [factors], plan, count=True)
    return sums, tuple(1 / f for f in factors), entries


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def power_sums(leaves: Arrays, plan: Plan) -> tuple[Arrays, Arrays, jax.Array]:
    """Returns sums of p-th powers, the unit of each, and the counts of bad entries.

    The norm is ``sum ** (1 / p) * unit``; with order inf, ``sum`` is the maximum. A sum
    is non-finite only where a leaf is, and derivatives flow through the sums alone. The
    counts are int32[leaves, 3]: how many entries are NaN, +inf, -inf.
    """
    units: Arrays | None = None
    seeing = plan._replace(drop=False)  # else nothing would tell of bad entries
    if plan.order not in (1.0, 2.0, np.inf):
        ((*largest,), _) = read(leaves, [None], plan._replace(order=np.inf))
        units = tuple(map(usable_unit, largest[0]))
    inverse = None if units is None else tuple(1 / u for u in units)
    (sums,), _ = read(leaves, [inverse], seeing)
    flags = [~(s < jnp.inf) for s in sums]
    flags += _under(sums, _floors(leaves, sums, plan), plan)
    # Constants are made in the branches: under `jax.vmap` over an explicitly sharded
    # axis, JAX can't place those that a branch takes from outside.
    ones = lambda s: _trees.spread_over(jnp.ones_like(s), _trees.varying(s))  # noqa: E731
    used = lambda: units or tuple(map(ones, sums))  # noqa: E731
    none = lambda: _trees.spread_over(  # noqa: E731
        jnp.zeros((len(leaves), 3), jnp.int32), _apart(leaves, plan)
    )
    return lax.cond(
        _anywhere(flags, plan),
        lambda: _with_care(leaves, sums, used(), plan),
        lambda: (sums, used(), none()),
    )


@power_sums.defjvp
def _power_sums_jvp(plan, primals, tangents):
    (leaves,), (dots,) = primals, tangents
    sums, units, entries = power_sums(leaves, plan)
    factors = tuple(1 / u for u in units)
    summed = functools.partial(read, factors=[factors], plan=plan)
    _, sum_dots = jax.jvp(lambda xs: summed(xs)[0][0], (leaves,), (dots,))
    no_counts = np.zeros(entries.shape, jax.dtypes.float0)
    return (sums, units, entries), (
        sum_dots,
        tuple(jnp.zeros_like(u) for u in units),
        no_counts,
    )
