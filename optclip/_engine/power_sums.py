"""Sums of powers over the leaves of a pytree, right whatever the size of the entries.

The square of a float32 overflows from 2**64 on and is lost below 2**-63. So the sum of
squares is taken of the entries as they are, of the entries scaled down and of the
entries scaled up, and of each group the sum is used that can be trusted:

* On an accelerator all three are taken in one pass, without a condition: arithmetic
  costs nothing beside reading memory, and a condition makes the host wait.
* On a CPU the first is taken alone. Only where that one fails, entries are scaled and
  read once more: there it is the arithmetic that costs.

On an accelerator the same sums tell of non-finite entries. NaN comes through every sum
of squares, and what the sum of the entries scaled up does with an infinity is free to
choose, since that sum is never used where there is one: it keeps the sign.

First comes how leaves are read: which ones together, and in which order.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optclip._engine import sharding
from optclip._engine.grouping import Arrays, Groups, SliceGroups
from optclip._engine.numerics import usable_unit

__all__ = [
    "COLUMNS",
    "CPU",
    "GPU",
    "TPU",
    "Arrays",
    "Form",
    "Plan",
    "PowerSums",
    "bucket_order",
    "chosen",
    "power_sums",
    "range_of",
    "read",
    "reordered",
    "scaled",
    "segments",
    "spread",
    "unpool",
    "wide_dtype",
    "widen",
]


# Leaves up to this size, if this many are alike, are stacked to be read together: so a
# program with a thousand leaves is quick to compile. This many at most, since XLA
# compiles longer stacks slowly, and no more bytes than this at a time, or this share.
SMALL_BYTES, MANY_ALIKE, MOST_SMALL = 2**16, 8, 64
ROOM_BYTES, ROOM_SHARE = 2**20, 1 / 256
# On a GPU, a stack of this many leaves takes one kernel in place of one per leaf. XLA
# fuses a stack of large leaves into the sums. A stack of small ones, such as 64 x 64,
# it writes out: that moves more bytes, by a fraction of the kernels. Of a longer stack
# it makes several kernels, which read the leaves again.
MOST_STACKED = 16
# A kernel on a GPU has room for the addresses of so many results; for more of them, XLA
# makes a kernel for each.
MOST_HANDED_OUT = 64


class Plan(NamedTuple):
    """What to measure; hashable, so that one trace serves every call alike.

    Attributes:
        order: The norm's order: a float of at least 1, or inf.
        axes: Per leaf, the axes that a group runs over; all of them for whole leaves.
        groups: Which leaves, or slices of leaves, share a norm.
        names: Per leaf, the mesh axes that its sums are added up over.
        drop: Whether entries that are not finite are left out.
        sharded_over: Per leaf, the mesh axes that its slices are sharded over; empty
            for whole leaves.
        roles: Per leaf, its path without numbers. Under `jax.jit` a leaf does not tell
            how it is sharded, and XLA would move leaves to stack them with others that
            are sharded differently: what has one role in several layers is sharded
            alike. Empty if there are no paths.
    """

    order: float
    axes: tuple[tuple[int, ...], ...]
    groups: Groups
    names: tuple[tuple[str, ...], ...]
    drop: bool = False
    sharded_over: tuple[tuple[str, ...], ...] = ()
    roles: tuple[str, ...] = ()

    @property
    def in_slices(self) -> bool:
        """Whether leaves are split into slices."""
        return isinstance(self.groups, SliceGroups)

    @property
    def per_array(self) -> list[tuple[str, ...]]:
        """The mesh axes that groups are sharded over, for each array of norms."""
        if not isinstance(self.groups, SliceGroups):
            return [()]
        empty = ((),) * len(self.axes)
        sharded = self.sharded_over or empty
        return [sharded[bucket[0]] for bucket in self.groups.buckets]

    def trailing(self, leaves: Sequence[jax.Array]) -> bool:
        """Returns whether groups run over the last axes of leaves, in memory a row."""
        pairs = zip(self.axes, leaves, strict=True)
        return all(
            tuple(sorted(axes)) == tuple(range(x.ndim - len(axes), x.ndim))
            for axes, x in pairs
        )

    @property
    def everywhere(self) -> tuple[tuple[str, ...], ...]:
        """Per leaf, the mesh axes that it is sharded over."""
        if not self.sharded_over:
            return self.names
        return tuple(n + a for n, a in zip(self.names, self.sharded_over, strict=True))


def wide_dtype(x: jax.Array) -> Any:
    """Returns the dtype that ``x`` is measured in: real, float32 or float64."""
    info = jnp.finfo(x.dtype)
    return info.dtype if info.bits >= 32 else jnp.dtype(jnp.float32)


def widen(x: jax.Array) -> jax.Array:
    """Returns ``x`` in the dtype that products are taken in: float32 or wider."""
    return x if jnp.iscomplexobj(x) else x.astype(wide_dtype(x))


def spread(values: jax.Array, axes: Sequence[int]) -> jax.Array:
    """Gives ``values``, one a group, the rank of the leaf that was summed over axes."""
    return jnp.expand_dims(values, tuple(axes)) if values.ndim else values


def unpool(parts: Sequence[Arrays], plan: Plan) -> list[tuple[jax.Array, ...]]:
    """Returns what belongs to each leaf of each of ``parts``, laid out like norms."""
    places = plan.groups.rows

    def looked_up(parts):
        # XLA compiles a kernel for each place that it slices at, unless the place is a
        # number that it can't know: then all leaves of one shape share a kernel.
        at = lambda row: lax.optimization_barrier(np.int32(row))  # noqa: E731
        return [
            tuple(
                lax.dynamic_index_in_dim(p[k], at(row), keepdims=False) for p in parts
            )
            for k, row in places
        ]

    def sliced(parts):
        if plan.in_slices:
            return [tuple(p[k][row] for p in parts) for k, row in places]
        # What reads one array for all leaves, XLA takes together, in kernels that are
        # slow to compile. So one kernel hands each leaf its own; without the maximum,
        # which changes nothing, it would be one kernel for each slice.
        (own,) = {p[0].dtype for p in parts if p[0].dtype != bool}
        table = jnp.stack([p[0].astype(own) for p in parts], axis=-1)
        each: list[jax.Array] = []
        for start in range(0, len(places), MOST_HANDED_OUT):
            rows = [row for _, row in places[start : start + MOST_HANDED_OUT]]
            part = table
            if len(rows) < len(places):
                part = sharding.kept_apart(table[np.asarray(rows)])
                rows = list(range(len(rows)))
            values = [jnp.maximum(part[row], 0.0) for row in rows]
            each += sharding.kept_apart(values)
        return [
            tuple(v.astype(p[0].dtype) for v, p in zip(row, parts, strict=True))
            for row in each
        ]

    return lax.platform_dependent(tuple(parts), cpu=looked_up, default=sliced)


def _alike(leaves: Sequence[jax.Array], plan: Plan) -> list[list[int]]:
    """Returns the numbers of the leaves, those of one kind and mesh axes together."""
    alike: dict[Any, dict[str, list[int]]] = {}
    for i, x in enumerate(leaves):
        by_role = alike.setdefault((plan.names[i], jax.typeof(x)), {})
        by_role.setdefault(_role(i, plan), []).append(i)
    runs = [alike[key] for key in sorted(alike, key=lambda key: key[0])]
    return [[i for at in by_role.values() for i in at] for by_role in runs]


def _role(i: int, plan: Plan) -> str:
    return plan.roles[i] if plan.roles else ""


def bucket_order(leaves: Sequence[jax.Array], plan: Plan) -> list[int]:
    """Returns the order of leaves that `read` wants, which reorders nothing."""
    if isinstance(plan.groups, SliceGroups):
        return [i for bucket in plan.groups.buckets for i in bucket]
    return [i for at in _alike(leaves, plan) for i in at]


def reordered(plan: Plan, order: list[int]) -> Plan:
    """Returns the plan of the leaves in another order."""
    take = lambda each: tuple(each[i] for i in order) if each else ()  # noqa: E731
    return plan._replace(
        axes=take(plan.axes),
        groups=plan.groups.reordered(order),
        names=take(plan.names),
        sharded_over=take(plan.sharded_over),
        roles=take(plan.roles),
    )


class Form(NamedTuple):
    """How leaves are read on one kind of device.

    Attributes:
        stack_all: Whether leaves of every size are stacked to be read together, else
            small ones only. XLA fuses a stack into sums over its rows on a GPU, and
            writes it out for other sums, and on other devices.
        one_pass: Whether several sums are taken in one pass. Else stacks are written
            out, and take turns in the same memory.
    """

    stack_all: bool
    one_pass: bool


CPU, GPU, TPU = Form(False, False), Form(True, True), Form(False, True)
# On a GPU, where groups are columns: each sum in a pass of its own.
COLUMNS = Form(False, True)


def _chunks(
    at: Sequence[int], leaves: Sequence[jax.Array], plan: Plan, form: Form, room: float
) -> list[list[int]]:
    """Returns the numbers of leaves of one type in the lots that are read together."""
    x = leaves[at[0]]
    size, step = max(x.size * x.dtype.itemsize, 1), 1
    if form.stack_all and plan.trailing(leaves):
        step = MOST_STACKED
    elif len(at) >= MANY_ALIKE and size <= SMALL_BYTES:
        step = min(int(room // size), MOST_SMALL)
    return [[*at[i : i + step]] for i in range(0, len(at), step)]


class Segment(NamedTuple):
    """Leaves whose sums make one array, in chunks that are read together.

    Attributes:
        leaves: The numbers of the leaves.
        chunks: The same, in lots that are read together.
        names: The mesh axes that sums are added up over.
    """

    leaves: list[int]
    chunks: list[list[int]]
    names: tuple[str, ...]


def segments(leaves: Sequence[jax.Array], plan: Plan, form: Form) -> list[Segment]:
    """Returns the leaves in their `bucket_order`, those of one array together."""
    sizes = [x.size * x.dtype.itemsize for x in leaves]
    room, found = max(ROOM_BYTES, ROOM_SHARE * sum(sizes)), []
    if isinstance(plan.groups, SliceGroups):
        runs = plan.groups.buckets
    else:
        by_names = itertools.groupby(range(len(leaves)), lambda i: plan.names[i])
        runs = [[*run] for _, run in by_names]
    for run in runs:
        chunks = []
        # Sharding is part of the type where JAX knows of it.
        alike = lambda i: (  # noqa: E731
            jax.typeof(leaves[i]),
            _role(i, plan) if form.stack_all else "",
        )
        for _, same in itertools.groupby(run, alike):
            chunks += _chunks([*same], leaves, plan, form, room)
        found.append(Segment([*run], chunks, plan.names[run[0]]))
    return found


def read(
    leaves: Sequence[jax.Array],
    plan: Plan,
    form: Form,
    kernel: Callable,
    most: Sequence[bool] | None = None,
    factors: Arrays | None = None,
) -> list[list[jax.Array]]:
    """Returns what ``kernel`` makes of the leaves: per segment, one array for each.

    Args:
        leaves: The leaves, real, in their `bucket_order`.
        plan: What to measure.
        form: How to read on this kind of device.
        kernel: A function of stacked leaves, the axes to reduce and a factor, which
            returns several sums.
        most: Which of them are maxima over devices; the others are summed up.
        factors: For each leaf what entries are multiplied by, laid out like the sums.
    """
    out, taken = [], {}
    for k, segment in enumerate(segments(leaves, plan, form)):
        rows = []
        for chunk in segment.chunks:
            xs, stacked = [leaves[i] for i in chunk], len(chunk) > 1
            in_turns = not form.one_pass and (stacked or plan.drop)
            if in_turns:
                # Always 1, but XLA can't know: so chunks take turns in the same memory,
                # and only those of one set of mesh axes, since the product varies over
                # all.
                along = sharding.varying(xs[0])
                last = taken.get(along, jnp.zeros([], jnp.float32))
                one = jnp.where(last < 0, 0, 1).astype(xs[0].dtype)
                xs[0] = xs[0] * one
            x = jnp.stack(xs) if stacked else xs[0][None]
            axes = tuple(a + 1 for a in plan.axes[chunk[0]])
            factor = None
            if factors is not None:
                factor = _factor(factors, k, segment, chunk, x.ndim, plan)
            sums = kernel(x, axes, factor)
            rows.append(sums)
            if in_turns:
                taken[along] = sums[0].ravel()[0].astype(jnp.float32)
        out.append(_over_devices(rows, most, segment.names, form))
    return out


def _over_devices(
    rows: list, most: Sequence[bool] | None, names: tuple, form: Form
) -> list:
    """Returns the sums, or maxima, of all chunks, over these mesh axes.

    One concatenation and one collective for all sums: XLA merges the small reductions
    that feed one operation.
    """
    columns: list[Any] = [None] * len(rows[0])
    maxima = [i for i, flag in enumerate(most or ()) if flag]
    sums = [i for i in range(len(columns)) if i not in maxima]
    for reduce, at in ((lax.pmax, maxima), (lax.psum, sums)):
        if not at:
            continue
        each = jnp.concatenate([row[i] for i in at for row in rows])
        whole = each.reshape(len(at), len(each) // len(at), *each.shape[1:])
        whole = reduce(whole, names) if names else whole
        if form.one_pass:
            # Or XLA takes the sum of the sums as one more sum of all entries.
            whole = lax.optimization_barrier(whole)
        for i, column in zip(at, whole, strict=True):
            columns[i] = column
    return columns


def _factor(
    factors: Arrays, k: int, segment: Segment, chunk: list[int], rank: int, plan: Plan
) -> jax.Array:
    """Returns the factors of a chunk, which broadcast against its stacked leaves."""
    if not plan.in_slices:  # a chunk is a run of leaves
        part = lax.slice(factors[0], (chunk[0],), (chunk[-1] + 1,))
        return part.reshape(-1, *(1,) * (rank - 1))
    start = segment.leaves.index(chunk[0])
    part = lax.slice_in_dim(factors[k], start, start + len(chunk))
    return jnp.expand_dims(part, tuple(a + 1 for a in plan.axes[chunk[0]]))


class PowerSums(NamedTuple):
    """The sums of powers of all groups: one array, or one per shape bucket.

    Attributes:
        sums: The sum of |x / unit|**p over each group; for order inf, the maximum. Not
            finite where an entry is not, unless it is dropped, and nowhere else.
        units: A power of two, or for an order other than 1, 2 and inf, any number.
        kinds: bool[leaves, 3]. Whether each leaf holds NaN, +inf, -inf.
    """

    sums: Arrays
    units: Arrays
    kinds: jax.Array


class Range(NamedTuple):
    """Where sums of squares of a dtype can be trusted.

    Attributes:
        high: A sum of at least this may have overflowed.
        low: Below this sum, squares that matter may have been lost.
        down: What entries are scaled by where the sum is too large: 2**32 times the
            square of the largest number still fits.
        up: What entries are scaled by where the sum is too small.
        cap: The largest square of an entry times ``up`` where the sum is below ``low``.
            A sum of 2**60 of these still fits.
    """

    high: float
    low: float
    down: float
    up: float
    cap: float

    @property
    def small(self) -> float:
        """The magnitude of an entry whose square is ``cap`` once it is scaled up."""
        return self.cap**0.5 / self.up


SINGLE = Range(2.0**110, 2.0**-60, 2.0**-80, 2.0**64, 2.0**68)
DOUBLE = Range(2.0**900, 2.0**-900, 2.0**-600, 2.0**560, 2.0**220)


def range_of(dtype: Any) -> Range:
    """Returns the range of sums of squares in a dtype, float32 or float64."""
    return DOUBLE if dtype == jnp.float64 else SINGLE


def _signs(x: jax.Array) -> jax.Array:
    """Returns the infinities of ``x``, and 0 for all else.

    The sum is infinite where infinities of one sign are, and NaN where both are.
    """
    return jnp.where(jnp.abs(x) == jnp.inf, x, jnp.zeros_like(x))


def scaled(x: jax.Array, scale: float) -> jax.Array:
    """Returns ``x`` times a power of two, so that its square is that of the product.

    XLA takes the square of a single number times a constant as x**2 times the square of
    the constant, of which one overflows and one underflows. A select between them keeps
    it from that; what it leaves out is not needed of that sum.
    """
    if x.size != 1:
        return x * scale
    left_out = jnp.abs(x) < 1 if scale < 1 else jnp.abs(x) >= 1
    return jnp.where(left_out, jnp.zeros_like(x), x * scale)


def _term(x: jax.Array, unit: Any, name: str, order: float, drop: bool) -> jax.Array:
    """Returns what is summed up for the sum called ``name``."""
    if name == "nans":
        return (x != x).astype(x.dtype)
    if name == "signs":
        return _signs(x)
    own = range_of(x.dtype)
    if drop:
        x = jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))
    if name == "up":
        square = jnp.square(scaled(x, own.up))
        fits = square < own.cap if x.size != 1 else jnp.abs(x) < own.small
        # In the place of what is too large: infinities, and what can't sum up to one.
        large = jnp.zeros_like(x) if drop else jnp.where(x == x, x * own.down, 0.0)
        return jnp.where(fits, square, large)
    if unit is not None:
        x = x * unit
    if name == "down":
        x = scaled(x, own.down)
    if order == 2.0:
        return jnp.square(x)
    x = jnp.abs(x)
    if order == 1.0:
        return x
    if order == np.inf:
        # Infinity stands for NaN, which an all-reduce of maxima drops.
        return jnp.where(jnp.isnan(x), jnp.inf, x)
    zero = x == 0  # the derivative of 0**p is no number that XLA can see for p < 2
    return jnp.where(zero, 0.0, jnp.where(zero, 1.0, x) ** order)


@functools.partial(jax.jit, static_argnums=(1, 3, 4))
def _sums(x: jax.Array, axes: tuple, factor: Any, names: tuple, how: tuple) -> list:
    """Returns the sums of these names over ``axes``; for order inf, the maximum."""
    order, drop, dtype = how
    x, found = x.astype(dtype or wide_dtype(x)), []
    for name in names:
        term = _term(x, factor, name, order, drop)
        if order == np.inf and name == "plain":
            found.append(jnp.max(term, axis=axes, initial=0.0))
        else:
            found.append(jnp.sum(term, axis=axes))
    return found


def _names(order: float, drop: bool) -> tuple[str, ...]:
    """Returns which sums are needed to be right at every size, and to see every kind.

    "plain" is the sum of |x|**p, "down" and "up" are the same of the entries scaled
    down and up. "up" tells of infinities, but where these are dropped; "signs" does so
    where it can't, and "nans" counts NaN where "plain" does not show it.
    """
    if order == 2.0:
        return ("plain", "down", "up", *(("signs", "nans") if drop else ()))
    scaled = ("down",) if order == 1.0 else ()
    return ("plain", *scaled, "signs", *(("nans",) if drop or order == np.inf else ()))


def _kernel(names: Sequence[str], leaves: Arrays, plan: Plan) -> Callable:
    dtype = None
    if not plan.in_slices:  # one vector of sums
        dtype = functools.reduce(jnp.promote_types, map(wide_dtype, leaves))
    how = (plan.order, plan.drop, dtype)
    return functools.partial(_sums, names=tuple(names), how=how)


def plain_sums(
    leaves: Arrays, plan: Plan, form: Form, factors: Arrays | None = None
) -> Arrays:
    """Returns the sums over groups of |x * factor|**p, or maxima, as they come out."""
    most = plan.order == np.inf
    if factors is not None:
        # Or XLA writes out the one factor of a group in the shape of a leaf.
        factors = sharding.kept_apart(plan.groups.expanded(factors))
    kernel = _kernel(["plain"], leaves, plan)
    found = read(leaves, plan, form, kernel, [most], factors)
    # Or XLA takes the sum of the sums as one more sum of all entries.
    sums = sharding.kept_apart(plan.groups.collected([columns[0] for columns in found]))
    return plan.groups.reduced(sums, most)


def _units(leaves: Arrays, plan: Plan, form: Form) -> Arrays | None:
    """Returns the largest entry of each group, for the orders that need a unit."""
    if plan.order in (1.0, 2.0, np.inf):
        return None
    largest = plain_sums(leaves, plan._replace(order=np.inf), form)
    return tuple(map(usable_unit, largest))


def _inverse(units: Arrays | None) -> Arrays | None:
    return None if units is None else tuple(1 / u for u in units)


def _kinds(nan: jax.Array, signs: jax.Array, across: tuple[str, ...]) -> jax.Array:
    """Returns bool[rows, 3]: whether the groups of a row hold NaN, +inf, -inf."""
    both = signs != signs
    kinds = [nan, both | (signs == jnp.inf), both | (signs == -jnp.inf)]
    kinds = jnp.stack(kinds, axis=-1)
    kinds = jnp.any(kinds, axis=tuple(range(1, kinds.ndim - 1)))
    return _anywhere(kinds, across)


def _anywhere(flags: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """Returns which flags are set on any device along these mesh axes."""
    return lax.pmax(flags.astype(jnp.int32), names) > 0 if names else flags


def _seen(column: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Returns where NaN is, and a sum that is not finite where infinities are."""
    nan = column["nans"] > 0 if "nans" in column else column["plain"] != column["plain"]
    return nan, column["signs" if "signs" in column else "up"]


def chosen(column: dict[str, jax.Array], order: float) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of each group that can be trusted, and its unit."""
    total = plain = column["plain"]
    unit, own = jnp.ones_like(plain), range_of(plain.dtype)
    if "down" in column:
        over = ~(plain < own.high)
        total = jnp.where(over, column["down"], total)
        unit = jnp.where(over, 1 / own.down, unit)
    if order == 2.0:
        under = plain < own.low
        total = jnp.where(under, column["up"], total)
        unit = jnp.where(under, 1 / own.up, unit)
    return total, unit.astype(plain.dtype)


def careful_sums(leaves: Arrays, plan: Plan, form: Form) -> PowerSums:
    """Returns the sums of powers by one pass over the leaves, without a condition."""
    units = _units(leaves, plan, form)
    names = _names(plan.order, plan.drop)
    maxima = [plan.order == np.inf and name == "plain" for name in names]
    factors = (
        None if units is None else plan.groups.expanded(tuple(1 / u for u in units))
    )
    kernel = _kernel(names, leaves, plan)
    found = read(leaves, plan, form, kernel, maxima, factors)
    columns = [plan.groups.collected(list(each)) for each in zip(*found, strict=True)]
    pairs = zip(columns, maxima, strict=True)
    groups = [plan.groups.reduced(column, most) for column, most in pairs]
    sums, units_used, kinds = [], [], []
    for k in range(len(columns[0])):
        column = {name: c[k] for name, c in zip(names, columns, strict=True)}
        group = {name: c[k] for name, c in zip(names, groups, strict=True)}
        total, unit = chosen(group, plan.order)
        if plan.order == np.inf and not plan.drop:
            total = jnp.where(_seen(group)[0], jnp.nan, total)
        across = plan.per_array[k]
        sums.append(total)
        units_used.append(unit)
        kinds.append(_kinds(*_seen(column), across))
    units = tuple(units_used) if units is None else units
    return PowerSums(tuple(sums), units, jnp.concatenate(kinds))


@functools.partial(jax.jit, static_argnums=(1,))
def _counts(x: jax.Array, axes: tuple[int, ...], factor: Any) -> list[jax.Array]:
    """Returns float32[leaves, 3]: how many entries are NaN, +inf, -inf, in one read."""
    del axes, factor
    kinds = (x != x, x == jnp.inf, x == -jnp.inf)
    kinds = tuple(kind.astype(jnp.float32) for kind in kinds)
    # One reduction of three numbers: three reductions would each write out a mask.
    add = lambda a, b: tuple(p + q for p, q in zip(a, b, strict=True))  # noqa: E731
    zeros = (np.float32(0),) * 3
    counts = lax.reduce(kinds, zeros, add, tuple(range(1, x.ndim)))
    return [jnp.stack(counts, axis=-1)]


def _counted_kinds(leaves: Arrays, plan: Plan, form: Form) -> jax.Array:
    """Returns bool[leaves, 3]: whether each leaf holds NaN, +inf, -inf."""
    found = read(leaves, plan, form, _counts)
    kinds = [
        _anywhere(counts > 0, plan.per_array[k] if plan.in_slices else ())
        for k, (counts,) in enumerate(found)
    ]
    return jnp.concatenate(kinds)


def _nan_groups(leaves: Arrays, plan: Plan, form: Form) -> Arrays:
    """Returns whether each group holds a NaN."""
    kernel = _kernel(["nans"], leaves, plan)
    found = read(leaves, plan, form, kernel)
    counts = plan.groups.reduced(
        plan.groups.collected([columns[0] for columns in found])
    )
    return tuple(count > 0 for count in counts)


def reread(
    leaves: Arrays, sums: Arrays, units: Arrays, plan: Plan, form: Form
) -> PowerSums:
    """Returns the sums of powers where plain ones fail: entries are scaled at need.

    Each sum reads the leaves by itself: XLA writes out on a CPU what several share,
    such as a leaf in a wider dtype.
    """
    leaves = sharding.kept_apart(leaves)
    if plan.drop:
        sums = plain_sums(leaves, plan, form, _inverse(units))
    kinds = _counted_kinds(sharding.kept_apart(leaves), plan, form)
    if plan.order == np.inf and not plan.drop:
        nan = _nan_groups(sharding.kept_apart(leaves), plan, form)
        sums = tuple(jnp.where(n, jnp.nan, s) for n, s in zip(nan, sums, strict=True))
    elif plan.order in (1.0, 2.0):
        factors = []
        for s, lost in zip(sums, _lowest(leaves, plan), strict=True):
            own = range_of(s.dtype)
            factor = jnp.where(s < lost, own.up, jnp.where(s < own.high, 1.0, own.down))
            factors.append(factor.astype(s.dtype))
        sums = plain_sums(leaves, plan, form, tuple(factors))
        units = tuple(1 / f for f in factors)
    return PowerSums(sums, units, kinds)


def _lost_below(x: jax.Array) -> float:
    """Returns the sum below which squares of entries of ``x`` may have been lost."""
    low = range_of(wide_dtype(x)).low
    # The square of the smallest float16 or float8 is a normal float32.
    return low if float(jnp.finfo(x.dtype).tiny) < low else 0.0


def _fails(leaves: Arrays, sums: Arrays, plan: Plan) -> jax.Array:
    """Returns whether a plain sum can't be trusted, on any device that takes part."""
    high = [
        range_of(s.dtype).high if plan.order in (1.0, 2.0) else jnp.inf for s in sums
    ]
    flags = [jnp.any(~(s < h)) for s, h in zip(sums, high, strict=True)]
    if plan.order == 2.0:
        pairs = zip(sums, _lowest(leaves, plan), strict=True)
        flags += [jnp.any(s < low) for s, low in pairs]
    flag = functools.reduce(jnp.logical_or, flags)
    names = tuple(sorted({a for n in plan.everywhere for a in n}))
    # Else every device has the same sums anyway.
    return _anywhere(flag, names if plan.in_slices else ())


def _lowest(leaves: Arrays, plan: Plan) -> list[float]:
    """Returns, for each array of sums, that below which entries may have been lost."""
    # Not an array of them: under `lax.cond`, vmapped over an explicitly sharded axis,
    # JAX can't place one.
    lost = [_lost_below(x) if plan.order == 2.0 else 0.0 for x in leaves]
    pairs = zip(plan.groups.rows, lost, strict=True)
    lowest = [0.0] * len(plan.per_array)
    for (array, _), below in pairs:
        lowest[array] = max(lowest[array], below)
    return lowest


def _apart(leaves: Arrays, plan: Plan) -> tuple[str, ...]:
    """Returns the mesh axes along which each device has sums of its own."""
    pairs = zip(leaves, plan.everywhere, strict=True)
    own = {n for x, names in pairs for n in sharding.varying(x) if n not in names}
    return tuple(sorted(own))


def quick_sums(leaves: Arrays, plan: Plan, form: Form) -> PowerSums:
    """Returns plain sums of powers, and those of `reread` where these fail."""
    units = _units(leaves, plan, form)
    seeing = plan._replace(drop=False)  # else nothing would tell of bad entries
    sums = plain_sums(leaves, seeing, form, _inverse(units))
    ones = lambda s: sharding.spread_over(jnp.ones_like(s), sharding.varying(s))  # noqa: E731
    used = lambda: units or tuple(map(ones, sums))  # noqa: E731

    def trusted():
        # Constants are made in the branch: under `jax.vmap` over an explicitly sharded
        # axis, JAX can't place those that a branch takes from outside.
        none = jnp.zeros((len(leaves), 3), bool)
        none = sharding.spread_over(none, _apart(leaves, plan))
        return PowerSums(sums, used(), none)

    return lax.cond(
        _fails(leaves, sums, plan),
        lambda: reread(leaves, sums, used(), plan, form),
        trusted,
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def power_sums(leaves: Arrays, plan: Plan, platform: str | None) -> PowerSums:
    """Returns sums of p-th powers of groups of leaves, in the form for the device.

    The norm is ``sum ** (1 / p) * unit``; with order inf, ``sum`` is the maximum. A sum
    is non-finite only where a leaf is, and derivatives flow through the sums alone.
    ``platform`` is where this runs, or None if that is not known before it is compiled.
    """
    rows = plan.trailing(leaves)
    forms = {
        "cpu": functools.partial(quick_sums, plan=plan, form=CPU),
        "tpu": functools.partial(careful_sums, plan=plan, form=TPU),
        "gpu": functools.partial(careful_sums, plan=plan, form=GPU),
    }
    if not rows:
        # XLA takes no more than two sums over columns in one pass. So the plain sum is
        # taken alone, although the host has to wait for the condition.
        forms["gpu"] = functools.partial(quick_sums, plan=plan, form=COLUMNS)
    if platform in forms:
        return forms[platform](leaves)
    gpu = forms.pop("gpu")  # for CUDA and ROCm
    if rows and segments(leaves, plan, GPU) == segments(leaves, plan, TPU):
        del forms["tpu"]  # no leaves to stack: a GPU reads them as a TPU does
    return lax.platform_dependent(leaves, **forms, default=gpu)


@power_sums.defjvp
def _power_sums_jvp(plan, platform, primals, tangents):
    (leaves,), (dots,) = primals, tangents
    found = power_sums(leaves, plan, platform)
    summed = functools.partial(
        plain_sums, plan=plan, form=CPU, factors=_inverse(found.units)
    )
    _, sum_dots = jax.jvp(summed, (leaves,), (dots,))
    no_kinds: Any = np.zeros(found.kinds.shape, jax.dtypes.float0)
    no_units = tuple(map(jnp.zeros_like, found.units))
    return found, PowerSums(sum_dots, no_units, no_kinds)
