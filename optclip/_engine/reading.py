"""Reading the leaves of a pytree: which are read together, and how sums are laid out.

Two layouts of the results: *pooled*, one vector with one entry per leaf; and *local*,
one array for all leaves of one kind: a row for each leaf, whose shape is that of the
axes that are kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optclip._engine import barriers, sharding

__all__ = [
    "COLUMNS",
    "CPU",
    "GPU",
    "TPU",
    "Arrays",
    "Form",
    "Plan",
    "laid_out",
    "read",
    "reading_order",
    "reordered",
    "segments",
    "spread",
    "unpool",
    "wide_dtype",
    "widen",
]


Arrays = tuple[jax.Array, ...]


# Leaves up to this size, if this many are alike, are stacked to be read together: so a
# program with a thousand leaves is quick to compile. This many at most, since XLA
# compiles longer stacks slowly, and no more bytes than this at a time, or this share.
SMALL_BYTES, MANY_ALIKE, MOST_SMALL = 2**16, 8, 64
ROOM_BYTES, ROOM_SHARE = 2**20, 1 / 256
# On a GPU, XLA fuses a stack of this many leaves of any size into the sums that are
# taken of it. Of a longer one it makes several kernels, which read the leaves again.
MOST_STACKED = 16


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
        roles: Per leaf, its path without numbers. Under `jax.jit` a leaf does not tell
            how it is sharded, and XLA would move leaves to stack them with others that
            are sharded differently: what has one role in several layers is sharded
            alike. Empty if there are no paths.
    """

    order: float
    axes: tuple[tuple[int, ...], ...]
    groups: tuple[int, ...]
    names: tuple[tuple[str, ...], ...]
    drop: bool = False
    across: tuple[tuple[str, ...], ...] = ()
    kinds: tuple[tuple[int, ...], ...] = ()
    roles: tuple[str, ...] = ()

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


def spread(values: jax.Array, axes: Sequence[int]) -> jax.Array:
    """Gives ``values``, one a group, the rank of the leaf that was summed over axes."""
    return jnp.expand_dims(values, tuple(axes)) if values.ndim else values


def unpool(parts: Sequence[Arrays], plan: Plan) -> list[tuple[jax.Array, ...]]:
    """Returns what belongs to each leaf of each of ``parts``, laid out like norms."""
    if plan.groups:
        places = [(0, group) for group in plan.groups]
    else:
        rows = enumerate(plan.kinds)
        by_leaf = {i: (k, row) for k, kind in rows for row, i in enumerate(kind)}
        places = [by_leaf[i] for i in range(len(plan.axes))]

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
        if not plan.groups:
            return [tuple(p[k][row] for p in parts) for k, row in places]
        # What reads one array for all leaves, XLA takes together, in kernels that are
        # slow to compile. So one kernel hands each leaf its own; without the maximum,
        # which changes nothing, it would be one kernel for each slice.
        (own,) = {p[0].dtype for p in parts if p[0].dtype != bool}
        table = jnp.stack([p[0].astype(own) for p in parts], axis=-1)
        each = [jnp.maximum(table[row], 0.0) for _, row in places]
        each = barriers.kept_apart(each)
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
        roles=take(plan.roles),
        kinds=tuple(tuple(place[i] for i in kind) for kind in plan.kinds),
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
    """Returns the leaves in their `reading_order`, those of one array together."""
    sizes = [x.size * x.dtype.itemsize for x in leaves]
    room, found = max(ROOM_BYTES, ROOM_SHARE * sum(sizes)), []
    if plan.groups:
        by_names = itertools.groupby(range(len(leaves)), lambda i: plan.names[i])
        runs = [[*run] for _, run in by_names]
    else:
        runs = plan.kinds
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
        leaves: The leaves, real, in their `reading_order`.
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
    if plan.groups:  # a chunk is a run of leaves
        part = lax.slice(factors[0], (chunk[0],), (chunk[-1] + 1,))
        return part.reshape(-1, *(1,) * (rank - 1))
    start = segment.leaves.index(chunk[0])
    part = lax.slice_in_dim(factors[k], start, start + len(chunk))
    return jnp.expand_dims(part, tuple(a + 1 for a in plan.axes[chunk[0]]))


def laid_out(found: list[jax.Array], plan: Plan) -> Arrays:
    """Returns one array for each segment as the plan wants it: one in all if pooled."""
    if not plan.groups:
        return tuple(found)
    return (jnp.concatenate(found),)
