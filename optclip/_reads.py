"""Reading the leaves of a tree: sums of powers, and counts of entries not finite.

Two layouts of the results: *pooled*, one vector with one entry a leaf; and *local*, one
array for all leaves of one kind: a row for each leaf, whose shape is that of the axes
that are kept.

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

from optclip import _trees

__all__ = [
    "Arrays",
    "Plan",
    "constants",
    "lost_below",
    "read",
    "reading_order",
    "reordered",
    "rescue",
    "spread",
    "unpool",
    "wide_dtype",
    "widen",
]

Arrays = tuple[jax.Array, ...]
# Leaves up to this size, if this many are alike, are stacked to be read together, this
# many at most (XLA compiles longer stacks slowly); no
# more at a time than this many bytes, or this share of all.
SMALL_BYTES, MANY_ALIKE, MOST = 2**16, 8, 64
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
        kinds: If local, the numbers of the leaves whose norms share an array: those of
            one shape, axes and mesh axes.
    """

    order: float
    axes: tuple[tuple[int, ...], ...]
    groups: tuple[int, ...]
    names: tuple[tuple[str, ...], ...]
    drop: bool = False
    across: tuple[tuple[str, ...], ...] = ()
    kinds: tuple[tuple[int, ...], ...] = ()

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
        # Infinity stands for NaN, which an all-reduce of maxima drops.
        x = jnp.where(jnp.isnan(x), jnp.inf, x)
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
    """Returns what belongs to each leaf.

    XLA compiles a kernel for each place that it slices at, unless the place is a number
    that it can't know: then all leaves of one shape share a kernel.
    """
    each: list[Any] = [None] * len(plan.axes)
    if plan.groups:
        places = {i: (0, group) for i, group in enumerate(plan.groups)}
    else:
        places = {
            i: (k, row)
            for k, kind in enumerate(plan.kinds)
            for row, i in enumerate(kind)
        }
    for i, (k, row) in places.items():
        at = lax.optimization_barrier(np.int32(row))
        each[i] = lax.dynamic_index_in_dim(values[k], at, keepdims=False)
    return each


def constants(values: Sequence[float], like: Arrays, plan: Plan) -> Arrays:
    """Returns one constant a leaf, laid out like the sums ``like``."""
    rows = plan.kinds or (tuple(range(len(values))),)
    made = []
    for array, row in zip(like, rows, strict=True):
        # No array constant: under `lax.cond`, vmapped over an explicitly sharded axis,
        # JAX can't place one.
        same = itertools.groupby(values[i] for i in row)
        runs = [(value, len([*run])) for value, run in same]
        parts = [jnp.full(length, value, array.dtype) for value, length in runs]
        made.append(jnp.concatenate(parts).reshape(-1, *(1,) * (array.ndim - 1)))
    return tuple(made)


def _alike(leaves: Sequence[jax.Array], plan: Plan) -> list[list[int]]:
    """Returns the numbers of the leaves, those of one kind and mesh axes together."""
    alike: dict[Any, list[int]] = {}
    for i, x in enumerate(leaves):
        alike.setdefault((plan.names[i], jax.typeof(x)), []).append(i)
    return [alike[key] for key in sorted(alike, key=lambda key: key[0])]


def reading_order(leaves: Sequence[jax.Array], plan: Plan) -> list[int]:
    """Returns the order of leaves that `read` wants, which reorders nothing."""
    return [i for at in plan.kinds or _alike(leaves, plan) for i in at]


def reordered(plan: Plan, order: list[int]) -> Plan:
    """Returns the plan of the leaves in another order."""
    place = {old: new for new, old in enumerate(order)}
    take = lambda each: tuple(each[i] for i in order) if each else ()  # noqa: E731
    return plan._replace(
        axes=take(plan.axes),
        groups=take(plan.groups),
        names=take(plan.names),
        across=take(plan.across),
        kinds=tuple(tuple(place[i] for i in kind) for kind in plan.kinds),
    )


def _chunks(leaves: Sequence[jax.Array], plan: Plan) -> list[list[int]]:
    """Returns the numbers of the leaves to be read together, kind by kind."""
    sizes = [x.size * x.dtype.itemsize for x in leaves]
    room, chunks = max(ROOM_BYTES, ROOM_SHARE * sum(sizes)), []
    runs = _alike(leaves, plan)
    if not plan.groups:
        by_type = lambda i: jax.typeof(leaves[i])  # noqa: E731
        runs = [
            [*run] for kind in plan.kinds for _, run in itertools.groupby(kind, by_type)
        ]
    for at in runs:
        size = max(sizes[at[0]], 1)
        many = len(at) >= MANY_ALIKE and size <= SMALL_BYTES
        step = min(int(room // size), MOST) if many else 1
        chunks += [at[i : i + step] for i in range(0, len(at), step)]
    return chunks


def _factor(each: Arrays, chunk: list[int], rank: int, plan: Plan) -> jax.Array:
    """Returns the factors of a chunk, which broadcast against its stacked leaves."""
    if plan.groups:  # a chunk is a run of leaves
        part = lax.slice(each[0], (chunk[0],), (chunk[-1] + 1,))
        return part.reshape(-1, *(1,) * (rank - 1))
    at = next(k for k, kind in enumerate(plan.kinds) if chunk[0] in kind)
    start = plan.kinds[at].index(chunk[0])
    part = lax.slice_in_dim(each[at], start, start + len(chunk))
    return jnp.expand_dims(part, tuple(a + 1 for a in plan.axes[chunk[0]]))


def read(
    leaves: Sequence[jax.Array], factors: Sequence[Any], plan: Plan, count: bool = False
) -> tuple[list[Arrays], Any]:
    """Returns the sums of powers, one set for each of ``factors``, and the counts.

    Args:
        leaves: The leaves, real, in their `reading_order`.
        factors: For each set, what entries are multiplied by: None for 1, or a factor
            for each group, laid out like the sums.
        plan: What to measure.
        count: Whether to count bad entries.

    Returns:
        For each of ``factors`` the sums, laid out as ``plan`` says; and, or None,
        int32[leaves, 3] with the numbers of entries that are NaN, +inf and -inf.
    """
    chunks, columns = _chunks(leaves, plan), []
    taken: dict[Any, jax.Array] = {}
    alone = len(factors) == 1 and not count
    for chunk in chunks:
        xs, stacked = [leaves[i] for i in chunk], len(chunk) > 1
        if stacked or plan.drop:
            # Always 1, but XLA can't know: so chunks take turns in the same memory, and
            # only those of one set of mesh axes, since the product varies over all.
            along = _trees.varying(xs[0])
            last = taken.get(along, jnp.zeros([], jnp.float32))
            one = jnp.where(last < 0, 0, 1).astype(xs[0].dtype)
            xs[0] = xs[0] * one
        x = jnp.stack(xs) if stacked else xs[0][None]
        axes = tuple(a + 1 for a in plan.axes[chunk[0]])
        sums = []
        for each in factors:
            factor = None if each is None else _factor(each, chunk, x.ndim, plan)
            # Or XLA writes out what sums share: a widened leaf, a broadcast factor.
            y, factor = (x, factor) if alone else lax.optimization_barrier((x, factor))
            sums.append(_kernel(y, factor, axes, plan.order, plan.drop))
        if count:
            sums.append(_bad_entries(x, tuple(range(1, x.ndim))))
        if stacked or plan.drop:
            taken[along] = sums[0].ravel()[0].astype(jnp.float32)
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
    reduce = lax.pmax if plan.order == np.inf else lax.psum

    def joined(row, kind):
        names = plan.names[kind[0]]
        own = [r for r, at in zip(row, chunks, strict=True) if at[0] in kind]
        part = jnp.concatenate(own)
        return reduce(part, names) if names else part

    return [tuple(joined(row, kind) for kind in plan.kinds) for row in rows], counts
