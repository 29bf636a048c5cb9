"""Sums of powers over the leaves of a pytree, correct for entries of any magnitude.

In float32, the square of a number overflows above 2**64 and underflows below 2**-63. So
there are three sums of squares: of the entries, of the entries scaled down, and of the
entries scaled up. Each group uses a sum that neither overflowed nor underflowed:

* On an accelerator, all three sums are computed in one pass, without a conditional.
  Arithmetic costs little compared with reading memory, and a conditional makes the host
  wait.
* On a CPU, only the first sum is computed. If it overflowed or underflowed, the entries
  are scaled and summed in another pass, since arithmetic is the bottleneck on a CPU.

On an accelerator, the same sums detect non-finite entries. A NaN makes every sum of
squares NaN. The sum of the entries scaled up is never used if an entry is infinite, so
it can encode the signs of infinities instead.

The first part of this module decides which leaves are reduced by the same kernel, and
in what order.
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


# Leaves of at most SMALL_BYTES are stacked and reduced together if at least MANY_ALIKE
# have the same type, so that a program with a thousand leaves compiles quickly. A stack
# has at most MOST_SMALL leaves, since XLA compiles larger stacks slowly. It takes up at
# most ROOM_BYTES, or ROOM_SHARE of the bytes of all leaves if that is more.
SMALL_BYTES, MANY_ALIKE, MOST_SMALL = 2**16, 8, 64
ROOM_BYTES, ROOM_SHARE = 2**20, 1 / 256
# On a GPU, a stack of up to this many leaves is reduced by one kernel, instead of one
# per leaf. XLA fuses the stacking of large leaves into the sums. It writes stacks of
# small leaves, such as 64 x 64, to memory, which moves more bytes but needs far fewer
# kernels. It splits larger stacks into several kernels that read the leaves again.
MOST_STACKED = 16
# The maximum number of results of one kernel on a GPU. If there are more, XLA generates
# one kernel per result.
MOST_RESULTS = 64


class Plan(NamedTuple):
    """A description of what to measure, hashable so that equal plans share one trace.

    Attributes:
        order: The order of the norm: a float that is at least 1, or inf.
        axes: For each leaf, the axes that a group is summed over; all axes if groups
            consist of whole leaves.
        groups: Which leaves, or slices of leaves, share a norm.
        names: For each leaf, the mesh axes that its sums are reduced over.
        drop: Whether non-finite entries are left out.
        sharded_over: For each leaf, the mesh axes that its slices are sharded over;
            empty if groups consist of whole leaves.
        roles: For each leaf, its path without numbers; empty if there are no paths. On
            a GPU, only leaves with the same role are stacked. Under `jax.jit`, the type
            of a leaf does not include its sharding, and XLA would move leaves between
            devices to stack leaves that are sharded differently. Leaves with the same
            role in different layers typically have the same sharding.
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
        """Returns whether all groups are summed over the last axes, so contiguous."""
        pairs = zip(self.axes, leaves, strict=True)
        return all(
            tuple(sorted(axes)) == tuple(range(x.ndim - len(axes), x.ndim))
            for axes, x in pairs
        )

    @property
    def everywhere(self) -> tuple[tuple[str, ...], ...]:
        """For each leaf, all mesh axes that it is sharded over."""
        if not self.sharded_over:
            return self.names
        return tuple(n + a for n, a in zip(self.names, self.sharded_over, strict=True))


def wide_dtype(x: jax.Array) -> Any:
    """Returns the real dtype that ``x`` is measured in: float32 or float64."""
    info = jnp.finfo(x.dtype)
    return info.dtype if info.bits >= 32 else jnp.dtype(jnp.float32)


def widen(x: jax.Array) -> jax.Array:
    """Returns ``x`` in the dtype that products are computed in: float32 or wider."""
    return x if jnp.iscomplexobj(x) else x.astype(wide_dtype(x))


def spread(values: jax.Array, axes: Sequence[int]) -> jax.Array:
    """Expands ``values``, one per group, to the rank of a leaf summed over ``axes``."""
    return jnp.expand_dims(values, tuple(axes)) if values.ndim else values


def unpool(parts: Sequence[Arrays], plan: Plan) -> list[tuple[jax.Array, ...]]:
    """Returns the slices of ``parts``, which are laid out like norms, for each leaf."""
    places = plan.groups.rows

    def looked_up(parts):
        # XLA compiles a kernel for each constant slice index. It can't see an index
        # behind a barrier, so all leaves of the same shape share a kernel.
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
        # XLA would merge all consumers of one array into kernels that are slow to
        # compile, so one kernel copies out the values of each leaf. The maximum doesn't
        # change any value, but without it XLA would generate one kernel per slice.
        (dtype,) = {p[0].dtype for p in parts if p[0].dtype != bool}
        table = jnp.stack([p[0].astype(dtype) for p in parts], axis=-1)
        each: list[jax.Array] = []
        for start in range(0, len(places), MOST_RESULTS):
            rows = [row for _, row in places[start : start + MOST_RESULTS]]
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
    """Returns the indices of the leaves, grouped by type and mesh axes."""
    alike: dict[Any, dict[str, list[int]]] = {}
    for i, x in enumerate(leaves):
        by_role = alike.setdefault((plan.names[i], jax.typeof(x)), {})
        by_role.setdefault(_role(i, plan), []).append(i)
    runs = [alike[key] for key in sorted(alike, key=lambda key: key[0])]
    return [[i for at in by_role.values() for i in at] for by_role in runs]


def _role(i: int, plan: Plan) -> str:
    return plan.roles[i] if plan.roles else ""


def bucket_order(leaves: Sequence[jax.Array], plan: Plan) -> list[int]:
    """Returns the order of the leaves that `read` requires."""
    if isinstance(plan.groups, SliceGroups):
        return [i for bucket in plan.groups.buckets for i in bucket]
    return [i for at in _alike(leaves, plan) for i in at]


def reordered(plan: Plan, order: list[int]) -> Plan:
    """Returns the plan for the leaves in a different order."""
    take = lambda each: tuple(each[i] for i in order) if each else ()  # noqa: E731
    return plan._replace(
        axes=take(plan.axes),
        groups=plan.groups.reordered(order),
        names=take(plan.names),
        sharded_over=take(plan.sharded_over),
        roles=take(plan.roles),
    )


class Form(NamedTuple):
    """How leaves are reduced on one kind of device.

    Attributes:
        stack_all: Whether leaves of any size are stacked, or only small ones. On a GPU,
            XLA fuses the stacking into sums over the last axes. For other sums, and on
            other devices, it writes the stack to memory.
        one_pass: Whether several sums are computed in one pass. If not, stacks are
            written to memory, one after another into the same buffer.
    """

    stack_all: bool
    one_pass: bool


CPU, GPU, TPU = Form(False, False), Form(True, True), Form(False, True)
# Used on a GPU if groups are not contiguous in memory: each sum has its own pass.
COLUMNS = Form(False, True)


def _chunks(
    at: Sequence[int], leaves: Sequence[jax.Array], plan: Plan, form: Form, room: float
) -> list[list[int]]:
    """Splits leaves of one type into chunks that are stacked and reduced together."""
    x = leaves[at[0]]
    size, step = max(x.size * x.dtype.itemsize, 1), 1
    if form.stack_all and plan.trailing(leaves):
        step = MOST_STACKED
    elif len(at) >= MANY_ALIKE and size <= SMALL_BYTES:
        step = min(int(room // size), MOST_SMALL)
    return [[*at[i : i + step]] for i in range(0, len(at), step)]


class Segment(NamedTuple):
    """Leaves whose sums form one array.

    Attributes:
        leaves: The indices of the leaves.
        chunks: The same indices, in chunks that are stacked and reduced together.
        names: The mesh axes that sums are reduced over.
    """

    leaves: list[int]
    chunks: list[list[int]]
    names: tuple[str, ...]


def segments(leaves: Sequence[jax.Array], plan: Plan, form: Form) -> list[Segment]:
    """Returns the segments of the leaves, which must be in `bucket_order`."""
    sizes = [x.size * x.dtype.itemsize for x in leaves]
    room, found = max(ROOM_BYTES, ROOM_SHARE * sum(sizes)), []
    if isinstance(plan.groups, SliceGroups):
        runs = plan.groups.buckets
    else:
        by_names = itertools.groupby(range(len(leaves)), lambda i: plan.names[i])
        runs = [[*run] for _, run in by_names]
    for run in runs:
        chunks = []
        # With explicit sharding, the type of a leaf includes its sharding.
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
    """Applies ``kernel`` to the leaves, and returns one array per segment and sum.

    Args:
        leaves: The leaves, which must be real and in `bucket_order`.
        plan: What to measure.
        form: How leaves are reduced on this kind of device.
        kernel: A function of stacked leaves, the axes to reduce and a factor, which
            returns several sums.
        most: For each sum, whether it is a maximum, also over devices.
        factors: The factors that the entries of each leaf are multiplied by, in arrays
            of the same layout as the sums.
    """
    out, taken = [], {}
    for k, segment in enumerate(segments(leaves, plan, form)):
        rows = []
        for chunk in segment.chunks:
            xs, stacked = [leaves[i] for i in chunk], len(chunk) > 1
            in_turns = not form.one_pass and (stacked or plan.drop)
            if in_turns:
                # ``one`` is always 1, but XLA can't know that. It makes each chunk
                # depend on the previous one, so that they reuse one buffer. Only chunks
                # with the same mesh axes are chained, since the product varies over the
                # mesh axes of both factors.
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
    """Returns the sums, or maxima, of all chunks, reduced over these mesh axes.

    All sums share one concatenation and one collective, since XLA merges small
    reductions whose results are used by one operation.
    """
    columns: list[Any] = [None] * len(rows[0])
    maxima = [i for i, flag in enumerate(most or ()) if flag]
    sums = [i for i in range(len(columns)) if i not in maxima]
    for reduce, at in ((lax.pmax, maxima), (lax.psum, sums)):
        if not at:
            continue
        each = jnp.concatenate([row[i] for i in at for row in rows])
        table = each.reshape(len(at), len(each) // len(at), *each.shape[1:])
        table = reduce(table, names) if names else table
        if form.one_pass:
            # Without the barrier, XLA would compute a sum of these sums as another sum
            # over all entries.
            table = lax.optimization_barrier(table)
        for i, column in zip(at, table, strict=True):
            columns[i] = column
    return columns


def _factor(
    factors: Arrays, k: int, segment: Segment, chunk: list[int], rank: int, plan: Plan
) -> jax.Array:
    """Returns the factors of a chunk, which broadcast against its stacked leaves."""
    if not plan.in_slices:  # the leaves of a chunk have consecutive numbers
        part = lax.slice(factors[0], (chunk[0],), (chunk[-1] + 1,))
        return part.reshape(-1, *(1,) * (rank - 1))
    start = segment.leaves.index(chunk[0])
    part = lax.slice_in_dim(factors[k], start, start + len(chunk))
    return jnp.expand_dims(part, tuple(a + 1 for a in plan.axes[chunk[0]]))


class PowerSums(NamedTuple):
    """The sums of powers of all groups: one array, or one per shape bucket.

    Attributes:
        sums: The sum of |x / unit|**p over each group, or the maximum for order inf. It
            is non-finite if and only if the group has a non-finite entry that is not
            dropped.
        units: The units of the groups: powers of two for orders 1, 2 and inf, and
            arbitrary numbers for other orders.
        kinds: bool[leaves, 3]. Whether each leaf contains NaN, +inf, -inf.
    """

    sums: Arrays
    units: Arrays
    kinds: jax.Array


class Range(NamedTuple):
    """The range in which sums of squares of a dtype are accurate.

    Attributes:
        high: A sum that is at least this large may have overflowed.
        low: In a sum below this, significant squares may have underflowed.
        down: The factor for entries whose sum is too large. A sum of 2**32 squares of
            the largest number, scaled by this factor, does not overflow.
        up: The factor for entries whose sum is too small.
        cap: The largest square of an entry, scaled by ``up``, if the sum is below
            ``low``. A sum of 2**60 such squares does not overflow.
    """

    high: float
    low: float
    down: float
    up: float
    cap: float

    @property
    def small(self) -> float:
        """The magnitude of an entry whose square, scaled up, is ``cap``."""
        return self.cap**0.5 / self.up


SINGLE = Range(2.0**110, 2.0**-60, 2.0**-80, 2.0**64, 2.0**68)
DOUBLE = Range(2.0**900, 2.0**-900, 2.0**-600, 2.0**560, 2.0**220)


def range_of(dtype: Any) -> Range:
    """Returns the range of sums of squares in a dtype, float32 or float64."""
    return DOUBLE if dtype == jnp.float64 else SINGLE


def _signs(x: jax.Array) -> jax.Array:
    """Returns ``x`` with all entries except infinities replaced by 0.

    The sum of the result is infinite if all infinities have the same sign, and NaN if
    both signs occur.
    """
    return jnp.where(jnp.abs(x) == jnp.inf, x, jnp.zeros_like(x))


def scaled(x: jax.Array, scale: float) -> jax.Array:
    """Returns ``x`` times a power of two, whose square XLA does not rewrite.

    XLA rewrites the square of a single number times a constant as the product of their
    squares, one of which overflows while the other underflows. A select between the
    product and its square prevents this. The entries that it replaces by 0 do not
    contribute to the sum that uses the result.
    """
    if x.size != 1:
        return x * scale
    left_out = jnp.abs(x) < 1 if scale < 1 else jnp.abs(x) >= 1
    return jnp.where(left_out, jnp.zeros_like(x), x * scale)


def _term(x: jax.Array, unit: Any, name: str, order: float, drop: bool) -> jax.Array:
    """Returns the terms of the sum called ``name``."""
    if name == "nans":
        return (x != x).astype(x.dtype)
    if name == "signs":
        return _signs(x)
    limits = range_of(x.dtype)
    if drop:
        x = jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))
    if name == "up":
        square = jnp.square(scaled(x, limits.up))
        fits = square < limits.cap if x.size != 1 else jnp.abs(x) < limits.small
        # Squares that are too large are replaced by the entry scaled down, so that
        # infinities keep their sign, and finite entries can't add up to infinity.
        large = jnp.zeros_like(x) if drop else jnp.where(x == x, x * limits.down, 0.0)
        return jnp.where(fits, square, large)
    if unit is not None:
        x = x * unit
    if name == "down":
        x = scaled(x, limits.down)
    if order == 2.0:
        return jnp.square(x)
    x = jnp.abs(x)
    if order == 1.0:
        return x
    if order == np.inf:
        # NaN is replaced by infinity, since a max all-reduce drops NaN.
        return jnp.where(jnp.isnan(x), jnp.inf, x)
    zero = x == 0  # keeps derivatives of x**p finite at 0 if p < 2
    return jnp.where(zero, 0.0, jnp.where(zero, 1.0, x) ** order)


@functools.partial(jax.jit, static_argnums=(1, 3, 4))
def _sum_kernel(
    x: jax.Array, axes: tuple, factor: Any, names: tuple, how: tuple
) -> list:
    """Returns the named sums over ``axes``; "plain" is a maximum for order inf."""
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
    """Returns the names of the sums that are needed.

    Together, the sums determine the norm for entries of any magnitude, and which kinds
    of non-finite entries there are. "plain" is the sum of |x|**p; "down" and "up" are
    the same sum over the entries scaled down and up. "up" also encodes infinities and
    their signs. If there is no "up", or if infinities are dropped from it, "signs"
    encodes them. "nans" counts NaNs if "plain" does not propagate them.
    """
    if order == 2.0:
        return ("plain", "down", "up", *(("signs", "nans") if drop else ()))
    scaled = ("down",) if order == 1.0 else ()
    return ("plain", *scaled, "signs", *(("nans",) if drop or order == np.inf else ()))


def _kernel(names: Sequence[str], leaves: Arrays, plan: Plan) -> Callable:
    """Returns a kernel for `read` that computes the named sums."""
    dtype = None
    if not plan.in_slices:  # one vector of sums
        dtype = functools.reduce(jnp.promote_types, map(wide_dtype, leaves))
    how = (plan.order, plan.drop, dtype)
    return functools.partial(_sum_kernel, names=tuple(names), how=how)


def plain_sums(
    leaves: Arrays, plan: Plan, form: Form, factors: Arrays | None = None
) -> Arrays:
    """Returns the sums (or maxima) over groups of |x * factor|**p, without checks."""
    most = plan.order == np.inf
    if factors is not None:
        # Without the barrier, XLA would broadcast the factor of a group to the shape of
        # a leaf and write the result to memory.
        factors = sharding.kept_apart(plan.groups.expanded(factors))
    kernel = _kernel(["plain"], leaves, plan)
    found = read(leaves, plan, form, kernel, [most], factors)
    # Without the barrier, XLA would compute a sum of these sums as another sum over all
    # entries.
    sums = sharding.kept_apart(plan.groups.collected([columns[0] for columns in found]))
    return plan.groups.reduced(sums, most)


def _units(leaves: Arrays, plan: Plan, form: Form) -> Arrays | None:
    """Returns units near the largest entry of each group, or None if not needed.

    If p is large, |x|**p overflows and underflows sooner than the square, so entries
    are divided by the unit of their group. Orders 1, 2 and inf don't need units.
    """
    if plan.order in (1.0, 2.0, np.inf):
        return None
    largest = plain_sums(leaves, plan._replace(order=np.inf), form)
    return tuple(map(usable_unit, largest))


def _inverse(units: Arrays | None) -> Arrays | None:
    return None if units is None else tuple(1 / u for u in units)


def _kinds(
    nan: jax.Array, signs: jax.Array, sharded_over: tuple[str, ...]
) -> jax.Array:
    """Returns bool[rows, 3]: whether any group in a row contains NaN, +inf, -inf."""
    both = signs != signs
    kinds = [nan, both | (signs == jnp.inf), both | (signs == -jnp.inf)]
    kinds = jnp.stack(kinds, axis=-1)
    kinds = jnp.any(kinds, axis=tuple(range(1, kinds.ndim - 1)))
    return _anywhere(kinds, sharded_over)


def _anywhere(flags: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """Returns whether each flag is set on any device along the given mesh axes."""
    return lax.pmax(flags.astype(jnp.int32), names) > 0 if names else flags


def _nan_and_signs(column: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Returns whether there is a NaN, and the sum that encodes infinities."""
    nan = column["nans"] > 0 if "nans" in column else column["plain"] != column["plain"]
    return nan, column["signs" if "signs" in column else "up"]


def chosen(column: dict[str, jax.Array], order: float) -> tuple[jax.Array, jax.Array]:
    """Returns the most accurate sum for each group, and its unit."""
    total = plain = column["plain"]
    unit, limits = jnp.ones_like(plain), range_of(plain.dtype)
    if "down" in column:
        over = ~(plain < limits.high)
        total = jnp.where(over, column["down"], total)
        unit = jnp.where(over, 1 / limits.down, unit)
    if order == 2.0:
        under = plain < limits.low
        total = jnp.where(under, column["up"], total)
        unit = jnp.where(under, 1 / limits.up, unit)
    return total, unit.astype(plain.dtype)


def careful_sums(leaves: Arrays, plan: Plan, form: Form) -> PowerSums:
    """Returns the sums of powers in one pass over the leaves, without a conditional."""
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
            total = jnp.where(_nan_and_signs(group)[0], jnp.nan, total)
        sharded_over = plan.per_array[k]
        sums.append(total)
        units_used.append(unit)
        kinds.append(_kinds(*_nan_and_signs(column), sharded_over))
    units = tuple(units_used) if units is None else units
    return PowerSums(tuple(sums), units, jnp.concatenate(kinds))


@functools.partial(jax.jit, static_argnums=(1,))
def _counts(x: jax.Array, axes: tuple[int, ...], factor: Any) -> list[jax.Array]:
    """Returns float32[leaves, 3]: the counts of NaN, +inf, -inf, from one pass."""
    del axes, factor
    kinds = (x != x, x == jnp.inf, x == -jnp.inf)
    kinds = tuple(kind.astype(jnp.float32) for kind in kinds)
    # The three counts share one reduction: with three reductions, each of them would
    # write its mask to memory.
    add = lambda a, b: tuple(p + q for p, q in zip(a, b, strict=True))  # noqa: E731
    zeros = (np.float32(0),) * 3
    counts = lax.reduce(kinds, zeros, add, tuple(range(1, x.ndim)))
    return [jnp.stack(counts, axis=-1)]


def _counted_kinds(leaves: Arrays, plan: Plan, form: Form) -> jax.Array:
    """Returns bool[leaves, 3]: whether each leaf contains NaN, +inf, -inf."""
    found = read(leaves, plan, form, _counts)
    kinds = [
        _anywhere(counts > 0, plan.per_array[k] if plan.in_slices else ())
        for k, (counts,) in enumerate(found)
    ]
    return jnp.concatenate(kinds)


def _nan_groups(leaves: Arrays, plan: Plan, form: Form) -> Arrays:
    """Returns whether each group contains a NaN."""
    kernel = _kernel(["nans"], leaves, plan)
    found = read(leaves, plan, form, kernel)
    counts = plan.groups.reduced(
        plan.groups.collected([columns[0] for columns in found])
    )
    return tuple(count > 0 for count in counts)


def rescaled_sums(
    leaves: Arrays, sums: Arrays, units: Arrays, plan: Plan, form: Form
) -> PowerSums:
    """Returns the sums of powers of scaled entries, used if plain sums are inaccurate.

    Each sum has its own pass over the leaves, behind its own barrier. Otherwise, XLA on
    a CPU would write values shared by several passes, such as widened leaves, to
    memory.
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
            limits = range_of(s.dtype)
            large = jnp.where(s < limits.high, 1.0, limits.down)
            factor = jnp.where(s < lost, limits.up, large)
            factors.append(factor.astype(s.dtype))
        sums = plain_sums(leaves, plan, form, tuple(factors))
        units = tuple(1 / f for f in factors)
    return PowerSums(sums, units, kinds)


def _lost_below(x: jax.Array) -> float:
    """Returns the sum below which squares of entries of ``x`` may have underflowed."""
    low = range_of(wide_dtype(x)).low
    # The squares of float16 and float8 numbers never underflow in float32.
    return low if float(jnp.finfo(x.dtype).tiny) < low else 0.0


def _fails(leaves: Arrays, sums: Arrays, plan: Plan) -> jax.Array:
    """Returns whether a plain sum is inaccurate on any device."""
    high = [
        range_of(s.dtype).high if plan.order in (1.0, 2.0) else jnp.inf for s in sums
    ]
    flags = [jnp.any(~(s < h)) for s, h in zip(sums, high, strict=True)]
    if plan.order == 2.0:
        pairs = zip(sums, _lowest(leaves, plan), strict=True)
        flags += [jnp.any(s < low) for s, low in pairs]
    flag = functools.reduce(jnp.logical_or, flags)
    names = tuple(sorted({a for n in plan.everywhere for a in n}))
    # The sums of whole leaves are the same on all devices.
    return _anywhere(flag, names if plan.in_slices else ())


def _lowest(leaves: Arrays, plan: Plan) -> list[float]:
    """Returns the bound for each array of sums below which squares may underflow."""
    # These are Python floats, since JAX can't shard a constant array in a `lax.cond`
    # that is vmapped over an explicitly sharded axis.
    lost = [_lost_below(x) if plan.order == 2.0 else 0.0 for x in leaves]
    pairs = zip(plan.groups.rows, lost, strict=True)
    lowest = [0.0] * len(plan.per_array)
    for (array, _), below in pairs:
        lowest[array] = max(lowest[array], below)
    return lowest


def _unreduced_axes(leaves: Arrays, plan: Plan) -> tuple[str, ...]:
    """Returns the mesh axes that leaves vary over without being reduced over them."""
    pairs = zip(leaves, plan.everywhere, strict=True)
    own = {n for x, names in pairs for n in sharding.varying(x) if n not in names}
    return tuple(sorted(own))


def quick_sums(leaves: Arrays, plan: Plan, form: Form) -> PowerSums:
    """Returns the plain sums of powers, or `rescaled_sums` if they are inaccurate."""
    units = _units(leaves, plan, form)
    detecting = plan._replace(drop=False)  # so that non-finite entries make sums fail
    sums = plain_sums(leaves, detecting, form, _inverse(units))
    ones = lambda s: sharding.spread_over(jnp.ones_like(s), sharding.varying(s))  # noqa: E731
    used = lambda: units or tuple(map(ones, sums))  # noqa: E731

    def trusted():
        # Constants are created in the branch: under `jax.vmap` over an explicitly
        # sharded axis, JAX can't shard constants that a branch closes over.
        none = jnp.zeros((len(leaves), 3), bool)
        none = sharding.spread_over(none, _unreduced_axes(leaves, plan))
        return PowerSums(sums, used(), none)

    return lax.cond(
        _fails(leaves, sums, plan),
        lambda: rescaled_sums(leaves, sums, used(), plan, form),
        trusted,
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def power_sums(leaves: Arrays, plan: Plan, platform: str | None) -> PowerSums:
    """Returns, for each group of leaves, the sum of the p-th powers of its entries.

    The norm is ``sum ** (1 / p) * unit``; for order inf, ``sum`` is the maximum. A sum
    is non-finite only if a leaf is. Only the sums are differentiable. ``platform`` is
    the platform that this runs on, or None if it is not known until compilation.
    """
    rows = plan.trailing(leaves)
    forms = {
        "cpu": functools.partial(quick_sums, plan=plan, form=CPU),
        "tpu": functools.partial(careful_sums, plan=plan, form=TPU),
        "gpu": functools.partial(careful_sums, plan=plan, form=GPU),
    }
    if not rows:
        # XLA computes at most two sums over columns in one pass, so the plain sum is
        # computed alone, although the host has to wait for the conditional.
        forms["gpu"] = functools.partial(quick_sums, plan=plan, form=COLUMNS)
    if platform in forms:
        return forms[platform](leaves)
    gpu = forms.pop("gpu")  # for CUDA and ROCm
    if rows and segments(leaves, plan, GPU) == segments(leaves, plan, TPU):
        del forms["tpu"]  # no leaves to stack, so both forms are the same
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
