"""Norms of groups, computed from sums of powers.

Norms are float32, or float64 if a leaf is float64 or complex128.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from optclip._engine import grouping, pytrees, sharding
from optclip._engine.grouping import Layout, whole_leaf_layout
from optclip._engine.numerics import largest_of, root_of, usable_unit
from optclip._engine.power_sums import (
    Plan,
    bucket_order,
    chosen,
    power_sums,
    range_of,
    reordered,
    scaled,
)

__all__ = [
    "REDUCTION",
    "Measured",
    "check_mesh",
    "combine",
    "devices_along",
    "measure",
    "measure_layout",
    "measure_leaves",
    "plan_of",
    "rows",
    "total",
]

# A norm may exceed the largest float32; the norm times 2**-64 never does.
REDUCTION = 2.0**-64


class Measured(NamedTuple):
    """The norms of all groups: one array, or one per shape bucket of slices.

    Attributes:
        norm: The norms. A norm that overflows its dtype is replaced by the largest
            finite number. The norm of a group that contains NaN or inf is NaN or inf.
        reduced: The norms times 2**-64, which can't overflow.
        kinds: bool[leaves, 3]. Whether each leaf contains NaN, +inf, -inf.
    """

    norm: tuple[jax.Array, ...]
    reduced: tuple[jax.Array, ...]
    kinds: jax.Array


def root(total: jax.Array, order: float) -> jax.Array:
    """Returns the norm of a group whose sum of powers (or maximum) is ``total``."""
    return total if order in (1.0, np.inf) else root_of(total, order)


def _norm_of_norms(
    norms: jax.Array,
    order: float,
    add: Callable[[jax.Array], jax.Array],
    most: Callable[[jax.Array], jax.Array],
    back: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> jax.Array:
    """Returns the norm of ``norms`` without squaring large numbers.

    The norms are first divided by their maximum. ``add`` and ``most`` compute the sum
    and the maximum over a group; ``back`` broadcasts a result to the group's members.
    """
    if order == np.inf:
        return largest_of(norms, add, most)
    # The derivative with respect to an infinite norm is NaN, and stays NaN even when
    # multiplied by 0.
    norms = jnp.where(norms < jnp.inf, norms, lax.stop_gradient(norms))
    top = most(lax.stop_gradient(norms))
    # The squares of the finite norms must not overflow, even if another norm is
    # infinite: the derivative of the root would be 0, and 0 times infinity is NaN.
    unit = usable_unit(jnp.minimum(top, jnp.finfo(top.dtype).max))
    ratio = norms / back(unit)
    powers = jnp.square(ratio) if order == 2.0 else ratio**order
    return root(add(powers), order) * unit


def combine(norms: jax.Array, order: float) -> jax.Array:
    """Combines several norms into one: the norm of all their entries."""
    if norms.size == 1:
        return norms.reshape(())
    return _norm_of_norms(norms, order, jnp.sum, jnp.max)


@functools.partial(jax.jit, static_argnames=("plan", "platform"))
def measure(
    leaves: tuple[jax.Array, ...], plan: Plan, platform: str | None = None
) -> Measured:
    """Returns the norms of the groups of ``leaves`` that ``plan`` describes."""
    axes, reals = list(plan.axes), list(leaves)
    for i, x in enumerate(leaves):
        if jnp.iscomplexobj(x) and plan.order == 2.0:
            re, im = x.real, x.imag
            if plan.drop:  # drops both parts of an entry even if one is finite
                fine_re, fine_im = jnp.isfinite(re), jnp.isfinite(im)
                re, im = (
                    jnp.where(fine_im | ~fine_re, re, 0),
                    jnp.where(fine_re | ~fine_im, im, 0),
                )
            reals[i] = jnp.stack([re, im], axis=-1)
            axes[i] = (*axes[i], x.ndim)
        elif jnp.iscomplexobj(x):
            reals[i] = jnp.abs(x)
    order = bucket_order(reals, plan)
    ordered = reordered(plan._replace(axes=tuple(axes)), order)
    sums, units, kinds = power_sums(tuple(reals[i] for i in order), ordered, platform)
    roots = [root(s, plan.order) for s in sums]
    norm = [r * u for r, u in zip(roots, units, strict=True)]
    reduced = [r * (u * REDUCTION) for r, u in zip(roots, units, strict=True)]
    return Measured(tuple(norm), tuple(reduced), kinds[np.argsort(order)])


def _finalize(measured: Measured, cut: Cut) -> Measured:
    """Divides RMS norms by their counts, and caps norms that overflow their dtype."""
    norms, reduced = [], []
    for norm, small, count in zip(*measured[:2], cut.counts, strict=True):
        divisor: Any = 1.0
        if cut.order == "rms":
            divisor = np.sqrt(np.maximum(count, 1)).astype(norm.dtype)
        small = small / divisor
        overflowed = jnp.isposinf(norm) & jnp.isfinite(small)
        divided = jnp.where(overflowed, small / REDUCTION, norm / divisor)
        largest = jnp.finfo(norm.dtype).max
        too_large = overflowed & jnp.isinf(divided)
        # With one array behind one barrier, XLA for a GPU computes all dependent values
        # in one kernel, instead of one kernel per scalar.
        pair = jnp.stack([jnp.where(too_large, largest, divided), small])
        norm, small = sharding.kept_apart(pair)
        norms.append(norm)
        reduced.append(small)
    return Measured(tuple(norms), tuple(reduced), measured.kinds)


def entry_counts(leaves: Sequence[jax.Array], plan: Plan) -> tuple[np.ndarray, ...]:
    """Returns the number of entries in each group, one array per array of norms."""
    counts = []
    for x, axes, names in zip(leaves, plan.axes, plan.names, strict=True):
        size = np.prod([x.shape[a] for a in axes], initial=1)
        counts.append(float(size * devices_along(names)))
    return plan.groups.sizes(counts)


def initial_norms(leaves: Sequence[jax.Array], cut: Cut) -> tuple[np.ndarray, ...]:
    """Returns the norms that parameters of these shapes typically start with.

    Each entry of a leaf or slice with N entries counts as N**(-1/4).
    """
    plan, order = cut.plan, cut.order
    counts = []
    for x, axes, names in zip(leaves, plan.axes, plan.names, strict=True):
        size = np.prod([x.shape[a] for a in axes], initial=1) * devices_along(names)
        counts.append(max(float(size), 1.0))
    totals = plan.groups.sizes(counts)
    if order == np.inf:
        largest = [np.zeros_like(total) for total in totals]
        for (k, row), n in zip(plan.groups.rows, counts, strict=True):
            at = row if largest[k].ndim else ()
            largest[k][at] = max(largest[k][at], n**-0.25)
        return tuple(largest)
    power = 2.0 if order == "rms" else float(order)
    powers = plan.groups.sizes([n ** (1 - power / 4) for n in counts])
    if order == "rms":
        pairs = zip(powers, totals, strict=True)
        powers = tuple(p / np.maximum(total, 1) for p, total in pairs)
    return tuple(p ** (1 / power) for p in powers)


def rows(tree: Any) -> tuple[jax.Array, jax.Array]:
    """Returns the norm of each row of all leaves together, and the norm times 2**-64.

    Rows are indexed by the first axis. A norm that overflows its dtype is replaced by
    the largest finite number.
    """
    found = pytrees.leaves_of(tree)
    layout = Layout(tuple(tuple(range(1, x.ndim)) for x in found.leaves))
    measured, _, _ = measure_layout(tree, found, layout, order=2.0, axis_name=None)
    add, most = (functools.partial(f, axis=0) for f in (jnp.sum, jnp.max))

    def over_leaves(norms):
        widest = functools.reduce(jnp.promote_types, [n.dtype for n in norms])
        each = jnp.concatenate([n.astype(widest) for n in norms])
        return _norm_of_norms(each, 2.0, add, most, lambda unit: unit[None])

    norm, reduced = over_leaves(measured.norm), over_leaves(measured.reduced)
    overflowed = jnp.isposinf(norm) & jnp.isfinite(reduced)
    return jnp.where(overflowed, jnp.finfo(norm.dtype).max, norm), reduced


def _over_devices(norm: jax.Array, order: float, names: tuple[str, ...]) -> jax.Array:
    """Returns the norm of the vector of the values of ``norm`` on all devices."""
    if not names:
        return norm
    add, most = (functools.partial(f, axis_name=names) for f in (lax.psum, lax.pmax))
    return _norm_of_norms(norm, order, add, most)


def _euclidean(
    norms: Sequence[jax.Array], sharded_over: Sequence[tuple[str, ...]]
) -> jax.Array:
    """Returns the square root of the sum of squares of all ``norms``.

    All arrays need the same three sums, so XLA reduces each array in one kernel, and
    combines the results of all devices in one all-reduce.
    """
    limits, found = range_of(norms[0].dtype), []
    for norm, names in zip(norms, sharded_over, strict=True):
        # The array isn't flattened, since JAX can't flatten an array that is sharded
        # over a middle axis. The selects also keep derivatives finite: the derivative
        # of the square of the largest number is infinite, and 0 times it is NaN.
        norm = jnp.where(norm < jnp.inf, norm, lax.stop_gradient(norm))
        sums = [
            jnp.where(norm < limits.high**0.5, norm, jnp.inf),
            scaled(norm, limits.down),
            jnp.where(norm < limits.small, norm * limits.up, 0.0),
        ]
        sums = jnp.stack([jnp.sum(jnp.square(x)) for x in sums])
        found.append(lax.psum(sums, names) if names else sums)
    plain, down, up = functools.reduce(jnp.add, found)
    squares, unit = chosen({"plain": plain, "down": down, "up": up}, 2.0)
    norm = root(squares, 2.0) * unit
    # If no group is infinite, an infinite result must be due to overflow.
    overflowed = jnp.isposinf(norm) & jnp.isfinite(down)
    return jnp.where(overflowed, jnp.finfo(norm.dtype).max, norm)


def total(norms: Sequence[jax.Array], cut: Cut) -> jax.Array:
    """Returns the norm of all groups together, capped at the largest finite number."""
    if cut.layout.scalar:
        return norms[0].reshape(())
    widest = functools.reduce(jnp.promote_types, [n.dtype for n in norms])
    norms = [n.astype(widest) for n in norms]
    counts, order, sharded_over = cut.counts, cut.order, cut.plan.per_array
    if order == "rms":
        sizes = [
            np.sum(count) * (1 if np.ndim(count) else norm.size) * devices_along(names)
            for norm, count, names in zip(norms, counts, sharded_over, strict=True)
        ]
        shares = [np.sqrt(count / max(sum(sizes), 1)) for count in counts]
        norms = [n * s.astype(widest) for n, s in zip(norms, shares, strict=True)]
    if order in ("rms", 2.0):
        return _euclidean(norms, sharded_over)
    parts = []
    for norm, names in zip(norms, sharded_over, strict=True):
        part = jnp.zeros([], norm.dtype)
        if norm.size:
            part = _norm_of_norms(norm, order, jnp.sum, jnp.max)
        parts.append(_over_devices(part, order, names))
    norm = combine(jnp.stack(parts), order)
    # If no group is infinite, an infinite result must be due to overflow.
    pairs = zip(norms, sharded_over, strict=True)
    finite = [sharding.on_all(jnp.all(n < jnp.inf), names) for n, names in pairs]
    overflowed = jnp.isposinf(norm) & jnp.all(jnp.stack(finite))
    return jnp.where(overflowed, jnp.finfo(widest).max, norm)


def devices_along(names: tuple[str, ...]) -> int:
    """Returns the number of devices along these mesh axes."""
    return lax.psum(1, names) if names else 1


def plan_of(
    updates: Any,
    found: pytrees.Leaves,
    layout: Layout,
    *,
    order: Any,
    axis_name: Any,
    drop: bool = False,
) -> Plan:
    """Returns the plan: what to measure, and how norms are stored in arrays."""
    names, sharded_over = sharding.axis_names(
        axis_name, updates, found, list(layout.axes), local=layout.groups is None
    )
    power = 2.0 if order == "rms" else order
    roles = tuple(re.sub(r"\d+", "#", path) for path in found.paths)
    if layout.groups is not None:
        return Plan(power, layout.axes, layout.groups, names, drop, roles=roles)
    placed = list(map(sharding.placement, found.leaves))
    # Leaves with the same global shape but different shardings have different local
    # shapes, so they go into different buckets.
    specs = sharding.leaf_specs(axis_name, updates, found)
    alike = (found.leaves, layout.axes, names, sharded_over, placed, specs)
    buckets = grouping.shape_buckets(*alike)
    return Plan(power, layout.axes, buckets, names, drop, sharded_over, roles)


def check_mesh(plan: Plan) -> None:
    """Raises an error if the plan names a mesh axis that is not bound."""
    sharding.check_bound(
        {n for names in (*plan.names, *plan.sharded_over) for n in names}
    )


class Cut(NamedTuple):
    """How the leaves of a tree are split into groups and measured.

    This depends only on the types of the leaves.

    Attributes:
        order: The order of the norm, or "rms".
        layout: Which entries form a group.
        plan: What to measure.
        counts: The number of entries in each group, one array per array of norms;
            empty if unknown.
        shapes: The shapes of the arrays of norms.
    """

    order: Any
    layout: Layout
    plan: Plan
    counts: tuple[np.ndarray, ...]
    shapes: tuple[tuple[int, ...], ...]


def cut_by(
    layout: Layout,
    updates: Any,
    found: pytrees.Leaves,
    *,
    order: Any,
    mapped: bool = True,
    **how: Any,
) -> Cut:
    """Returns how the leaves are split into the groups of a layout and measured.

    The number of entries in a group is known only if the mesh axes are bound
    (``mapped``). ``update`` runs inside `jax.shard_map`, but ``init`` may not.
    """
    plan, counts = plan_of(updates, found, layout, order=order, **how), ()
    if mapped:
        check_mesh(plan)
        counts = entry_counts(found.leaves, plan)
    return Cut(order, layout, plan, counts, _shapes(layout, found.leaves, plan))


def _shapes(layout: Layout, leaves: list, plan: Plan) -> tuple[tuple[int, ...], ...]:
    """Returns the shapes of the arrays of norms."""
    if layout.scalar:
        return ((),)
    if isinstance(plan.groups, grouping.WholeLeafGroups):
        return ((plan.groups.number,),)

    def shape(bucket):
        axes = layout.axes[bucket[0]]
        kept = [n for a, n in enumerate(leaves[bucket[0]].shape) if a not in axes]
        return (len(bucket), *kept)

    return tuple(map(shape, plan.groups.buckets)) if leaves else ((1,),)


def norms_of(leaves: Sequence[jax.Array], cut: Cut) -> Measured:
    """Returns the norms of all groups."""
    return _finalize(measure(tuple(leaves), cut.plan, _platform_of(leaves)), cut)


def _platform_of(leaves: Sequence[jax.Array]) -> str | None:
    """Returns the platform of the leaves, or None if they are traced."""
    if any(isinstance(x, Tracer) for x in leaves):
        return None
    return next(iter(leaves[0].devices())).platform if leaves else None


def measure_layout(
    updates: Any, found: pytrees.Leaves, layout: Layout, **how: Any
) -> tuple[Measured, tuple[np.ndarray, ...], Plan]:
    """Returns the norms of the groups of a layout, their entry counts, and the plan."""
    cut = cut_by(layout, updates, found, **how)
    return norms_of(found.leaves, cut), cut.counts, cut.plan


def measure_leaves(
    updates: Any, found: pytrees.Leaves, *, order: Any, axis_name: Any
) -> tuple[Measured, jax.Array]:
    """Returns the norm of each leaf, and the norm of all leaves together."""
    layout = whole_leaf_layout(range(len(found.leaves)), found.leaves)
    cut = cut_by(layout, updates, found, order=order, axis_name=axis_name)
    measured = norms_of(found.leaves, cut)
    return measured, total(measured.norm, cut)
