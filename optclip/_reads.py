"""Reading the leaves of a tree: sums of powers, and counts of entries not finite.

Two layouts of the results: *pooled*, one vector with one entry a leaf; and *local*, one
array a leaf, whose shape is that of the axes that are kept.

Many small leaves of one kind are stacked and read by one kernel, which keeps a program
with a thousand leaves quick to compile.
"""

import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

__all__ = [
    "Arrays",
    "Plan",
    "constants",
    "lost_below",
    "read",
    "reading_order",
    "rescue",
    "spread",
    "unpool",
    "usable_unit",
    "wide_dtype",
    "widen",
]

Arrays = tuple[jax.Array, ...]
# Leaves up to this size, if this many are alike, are stacked to be read together; no
# more at a time than this many bytes, or this share of all.
SMALL_BYTES, MANY_ALIKE = 2**16, 8
ROOM_BYTES, ROOM_SHARE = 2**20, 1 / 256


class Plan(NamedTuple):
    """What to measure; hashable, so that one trace serves every call alike.

    Attributes:
        order: The norm's order: a float of at least 1, or inf.
        axes: Per leaf, the axes that a group runs over; all of them if pooled.
        groups: Per leaf, the number of its group; empty if local.
        names: Per leaf, the mesh axes that its sums are added up over.
        drop: Whether entries that are not finite are left out.
        across: Per leaf, the mesh axes that its groups lie along; empty if pooled.
    """

    order: float
    axes: tuple[tuple[int, ...], ...]
    groups: tuple[int, ...]
    names: tuple[tuple[str, ...], ...]
    drop: bool = False
    across: tuple[tuple[str, ...], ...] = ()

    @property
    def everywhere(self) -> tuple[tuple[str, ...], ...]:
        """Per leaf, the mesh axes that it is sharded over."""
        if not self.across:
            return self.names
        return tuple(n + a for n, a in zip(self.names, self.across, strict=True))


def wide_dtype(x: jax.Array) -> Any:
    """Returns the dtype that ``x`` is measured in: real, float32 or float64."""
    info = jnp.finfo(x.dtype)
    return info.dtype if info.bits >= 32 else jnp.dtype(jnp.float32)


def widen(x: jax.Array) -> jax.Array:
    """Returns ``x`` in the dtype that products are taken in: float32 or wider."""
    return x if jnp.iscomplexobj(x) else x.astype(wide_dtype(x))


def usable_unit(length: jax.Array) -> jax.Array:
    """Returns a unit near ``length`` whose inverse is no subnormal number; 1 for 0."""
    known = (length > 0) & (length < jnp.inf)
    return jnp.where(known, jnp.minimum(length, jnp.finfo(length.dtype).max / 16), 1.0)


def lost_below(x: jax.Array) -> float:
    """Returns the sum below which squares of entries of ``x`` may have been lost."""
    if wide_dtype(x) == jnp.float64:
        return 2.0**-900
    # The square of the smallest float16 or float8 is a normal float32.
    return 2.0**-60 if float(jnp.finfo(x.dtype).tiny) < 2.0**-60 else 0.0


def rescue(x: jax.Array) -> float:
    """Returns the power of two that brings entries back whose squares were lost."""
    return 2.0**600 if wide_dtype(x) == jnp.float64 else 2.0**90


def spread(values: jax.Array, axes: Sequence[int]) -> jax.Array:
    """Gives ``values``, one a group, the rank of the leaf that was summed over axes."""
    return jnp.expand_dims(values, tuple(axes)) if values.ndim else values


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _kernel(x: jax.Array, factor: Any, axes: tuple, order: float, drop: bool):
    """Returns the sum of |x * factor|**p over ``axes``; for inf, the maximum."""
    if drop:
        x = jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))
    x = x.astype(wide_dtype(x))
    if factor is not None:
        x = x * factor
    if order == 2.0:
        return jnp.sum(jnp.square(x), axis=axes)
    x = jnp.abs(x)
    if order == 1.0:
        return jnp.sum(x, axis=axes)
    if order == np.inf:
        return jnp.max(x, axis=axes, initial=0.0)
    zero = x == 0  # the derivative of 0**p is no number that XLA can see for p < 2
    powers = jnp.where(zero, 0.0, jnp.where(zero, 1.0, x) ** order)
    return jnp.sum(powers, axis=axes)


@functools.partial(jax.jit, static_argnums=(1,))
def _bad_entries(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns how many entries are NaN, +inf and -inf, in one read."""
    kinds = tuple(k.astype(jnp.int32) for k in (x != x, x == jnp.inf, x == -jnp.inf))
    # One reduction of three numbers: three reductions would each write out a mask.
    add = lambda a, b: tuple(p + q for p, q in zip(a, b, strict=True))  # noqa: E731
    return jnp.stack(lax.reduce(kinds, (np.int32(0),) * 3, add, axes), axis=-1)


def _joined(columns: list, chunks: list[list[int]], plan: Plan) -> jax.Array:
    """Returns one vector of all leaves, in order, added up over their mesh axes."""
    reduce = lax.pmax if plan.order == np.inf else lax.psum
    parts = []
    # One collective for each set of axes, and before leaves of other sets come in: in
    # `jax.shard_map` what is joined with a sharded value counts as sharded.
    names_of = operator.itemgetter(1)
    pairs = [(c, plan.names[at[0]]) for c, at in zip(columns, chunks, strict=True)]
    for names, group in itertools.groupby(pairs, key=names_of):
        part = jnp.concatenate([column for column, _ in group])
        parts.append(reduce(part, names) if names else part)
    return jnp.concatenate(parts)


def unpool(values: Arrays, plan: Plan) -> list[jax.Array]:
    return [values[0][i] for i in range(len(plan.axes))] if plan.groups else [*values]


def constants(values: Sequence[float], like: Arrays, plan: Plan) -> Arrays:
    """Returns one constant a leaf, laid out like the sums ``like``."""
    if plan.groups:
        # No array constant: under `lax.cond`, vmapped over an explicitly sharded axis,
        # JAX can't place one.
        runs = [(value, len([*same])) for value, same in itertools.groupby(values)]
        parts = [jnp.full(length, v, like[0].dtype) for v, length in runs]
        return (jnp.concatenate(parts),)
    return tuple(jnp.asarray(v, s.dtype) for v, s in zip(values, like, strict=True))


def _alike(leaves: Sequence[jax.Array], plan: Plan) -> list[list[int]]:
    """Returns the numbers of the leaves, those of one kind and mesh axes together."""
    alike: dict[Any, list[int]] = {}
    for i, x in enumerate(leaves):
        alike.setdefault((plan.names[i], jax.typeof(x)), []).append(i)
    return [alike[key] for key in sorted(alike, key=lambda key: key[0])]


def reading_order(leaves: Sequence[jax.Array], plan: Plan) -> list[int]:
    """Returns the order of leaves that `read` wants, which reorders nothing."""
    if not plan.groups:
        return [*range(len(leaves))]
    return [i for at in _alike(leaves, plan) for i in at]


def _chunks(leaves: Sequence[jax.Array], plan: Plan) -> list[list[int]]:
    """Returns the numbers of the leaves to be read together."""
    if not plan.groups:
        return [[i] for i in range(len(leaves))]
    sizes = [x.size * x.dtype.itemsize for x in leaves]
    room, chunks = max(ROOM_BYTES, ROOM_SHARE * sum(sizes)), []
    for at in _alike(leaves, plan):
        size = max(sizes[at[0]], 1)
        many = len(at) >= MANY_ALIKE and size <= SMALL_BYTES
        step = int(room // size) if many else 1
        chunks += [at[i : i + step] for i in range(0, len(at), step)]
    return chunks


def read(
    leaves: Sequence[jax.Array], factors: Sequence[Any], plan: Plan, count: bool = False
) -> tuple[list[Arrays], Any]:
    """Returns the sums of powers, one set for each of ``factors``, and the counts.

    Args:
        leaves: The leaves, real; if pooled, in their `reading_order`.
        factors: For each set, what entries are multiplied by: None for 1, or a list of
            one array a leaf that broadcasts against it.
        plan: What to measure.
        count: Whether to count bad entries.

    Returns:
        For each of ``factors`` the sums, laid out as ``plan`` says; and, or None,
        int32[leaves, 3] with the numbers of entries that are NaN, +inf and -inf.
    """
    chunks, columns = _chunks(leaves, plan), []
    taken = jnp.zeros([], jnp.float32)
    alone = len(factors) == 1 and not count
    for chunk in chunks:
        xs, stacked = [leaves[i] for i in chunk], len(chunk) > 1
        if stacked or plan.drop:
            # Always 1, but XLA can't know: so chunks take turns in the same memory.
            one = jnp.where(taken < 0, 0, 1).astype(xs[0].dtype)
            xs = [x * one for x in xs]
        x = jnp.stack(xs) if stacked else xs[0][None]
        axes = tuple(a + 1 for a in plan.axes[chunk[0]])
        sums = []
        for each in factors:
            factor = None
            if each is not None:
                factor = jnp.stack([each[i] for i in chunk])
                factor = factor.reshape(factor.shape + (1,) * (x.ndim - factor.ndim))
            # Or XLA writes out what sums share: a widened leaf, a broadcast factor.
            y, factor = (x, factor) if alone else lax.optimization_barrier((x, factor))
            sums.append(_kernel(y, factor, axes, plan.order, plan.drop))
        if count:
            sums.append(_bad_entries(x, tuple(range(1, x.ndim))))
        if stacked or plan.drop:
            taken = sums[0].ravel()[0].astype(jnp.float32)
        columns.append(sums)
    rows = [list(column) for column in zip(*columns, strict=True)]
    counts = None
    if count:
        whole = plan._replace(order=2.0, names=plan.everywhere)
        counts = _joined(rows.pop(), chunks, whole)
    if plan.groups:
        widest = functools.reduce(jnp.promote_types, map(wide_dtype, leaves))
        wide = [[s.astype(widest) for s in row] for row in rows]
        return [(_joined(row, chunks, plan),) for row in wide], counts
    # Chunks of one leaf each, in order.
    reduce = lax.pmax if plan.order == np.inf else lax.psum
    return [
        tuple(
            reduce(s[0], names) if names else s[0]
            for s, names in zip(row, plan.names, strict=True)
        )
        for row in rows
    ], counts
