"""Mesh axes and placement of leaves, collectives over mesh axes, and barriers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from optclip._engine.pytrees import Leaves, is_measured, leaves_of, trained

__all__ = [
    "axis_names",
    "check_bound",
    "in_one_array",
    "kept_apart",
    "kept_apart_on_cpu",
    "leaf_axes",
    "leaf_specs",
    "most",
    "on_all",
    "placement",
    "sharded_like",
    "spread_over",
    "varying",
    "zeros_of",
]


def zeros_of(tree: Any) -> Any:
    """Returns float32 or complex64 zeros for measured leaves, and None for the rest."""

    def zeros(x):
        if not is_measured(x):
            return None
        complex_ = jnp.issubdtype(jnp.result_type(x), jnp.complexfloating)
        zero = jnp.zeros(jnp.shape(x), jnp.complex64 if complex_ else jnp.float32)
        return sharded_like(zero, x)

    return jax.tree.map(zeros, trained(tree))


def varying(x: jax.Array) -> tuple[str, ...]:
    """Returns the manual mesh axes that ``x`` varies over, according to its type."""
    kind = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)
    names = getattr(manual, "varying", None) if manual is not None else None
    if names is None:
        names = getattr(kind, "vma", frozenset())
    return tuple(sorted(names))


def spread_over(tree: Any, names: tuple[str, ...]) -> Any:
    """Makes the types of all arrays in ``tree`` vary over the given mesh axes."""

    def spread(x):
        missing = tuple(n for n in names if n not in varying(x))
        if not missing:
            return x
        if hasattr(lax, "pcast"):
            return lax.pcast(x, missing, to="varying")
        return getattr(lax, "pvary")(x, missing)  # noqa: B009 (JAX before 0.7)

    return jax.tree.map(spread, tree)


def placement(x: Any) -> tuple:
    """Returns the sharding in the type of ``x``, or () if no axis is explicit."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return ()
    spec = getattr(getattr(jax.typeof(x), "sharding", None), "spec", None)
    names = tuple(spec) if spec is not None else ()
    return names if any(n is not None for n in names) else ()


def sharded_like(tree: Any, x: Any) -> Any:
    """Shards all arrays in ``tree`` that have the shape of ``x`` like ``x``."""
    if not placement(x):
        return tree
    return jax.tree.map(
        lambda y: y + jnp.zeros_like(x, y.dtype) if y.shape == x.shape else y, tree
    )


def _flat(entries: Any) -> tuple[str, ...]:
    names: list[str] = []
    for entry in entries:
        names += [] if entry is None else [entry] if isinstance(entry, str) else entry
    return tuple(sorted(set(names)))


def _spec_names(spec: Any, axes: tuple[int, ...]) -> tuple[tuple[str, ...], ...]:
    """Returns the mesh axes to sum a leaf over, and the axes that shard its groups."""
    if not _is_names(spec):
        raise ValueError(
            '`axis_name` must be the name of a mesh axis or several, "auto", or a tree '
            f"of names or PartitionSpecs with one per leaf, got {spec!r}."
        )
    if not _is_spec(spec):
        return _flat([spec] if isinstance(spec, str) else spec or ()), ()
    names = _flat([spec[a] for a in axes if a < len(spec)])
    return names, tuple(n for n in _flat(spec) if n not in names)


def _is_spec(node: Any) -> bool:
    return isinstance(node, jax.sharding.PartitionSpec)


def _is_names(node: Any) -> bool:
    plain = isinstance(node, (list, tuple)) and not hasattr(node, "_fields")
    return (
        node is None
        or isinstance(node, str)
        or _is_spec(node)
        or (plain and all(isinstance(n, str) for n in node))
    )


def _manual_axes() -> tuple[set[str], set[str]]:
    """Returns the manual mesh axes that array types include, and all other ones.

    Types do not include mesh axes in `jax.pmap`, or in `jax.shard_map` with
    ``check_vma=False``.
    """
    bound = set(jax.sharding.get_abstract_mesh().manual_axes)
    in_types = {n for n in bound if n in varying(lax.axis_index(n))}
    return in_types, bound - in_types


def check_bound(names: Iterable[str]) -> None:
    """Raises an error unless all names are bound mesh axes."""
    for name in names:
        try:
            lax.axis_index(name)
        except (NameError, KeyError) as error:
            bound = sorted(jax.sharding.get_abstract_mesh().manual_axes)
            raise ValueError(
                f"`axis_name` names {name!r}, which is not a bound mesh axis: "
                f"{bound or 'none'} can be named here. Use `axis_name` inside "
                "`jax.shard_map` or `jax.pmap`; under `jax.jit` leave it out."
            ) from error


def _for_each_leaf(axis_name: Any, tree: Any, count: int) -> list[Any]:
    if _is_names(axis_name):
        return [axis_name] * count
    wanted: list[Any] = []

    def visit(spec, subtree):
        wanted.extend([spec] * len(leaves_of(subtree).leaves))

    try:
        jax.tree.map(visit, axis_name, trained(tree), is_leaf=_is_names)
    except ValueError as error:
        raise ValueError(
            "`axis_name` must be a tree with the structure of the updates, or a prefix "
            f"of it. JAX says: {error}"
        ) from error
    return wanted


def leaf_specs(axis_name: Any, tree: Any, found: Leaves) -> tuple[tuple, ...]:
    """Returns the PartitionSpec of each leaf, or () if only names are given."""
    each = _for_each_leaf(axis_name, tree, len(found.leaves))
    return tuple(tuple(spec) if _is_spec(spec) else () for spec in each)


def axis_names(
    axis_name: Any, tree: Any, found: Leaves, axes: list[tuple[int, ...]], local: bool
) -> tuple[tuple[tuple[str, ...], ...], ...]:
    """Returns the mesh axes to sum each leaf over, and the axes that shard its groups.

    If leaves are split into slices (``local``), the groups of a leaf can be sharded.
    """
    count = len(found.leaves)
    if axis_name is None:
        return ((),) * count, ((),) * count
    if isinstance(axis_name, str) and axis_name == "auto":
        not_in_types = sorted(_manual_axes()[1])
        if not_in_types:
            raise ValueError(
                '`axis_name="auto"` reads the mesh axes that leaves are sharded over '
                "from their types, but in `jax.pmap` or with `check_vma=False` types "
                f"don't show {not_in_types}. Name the axes or give PartitionSpecs; "
                "leave `axis_name` out for gradients that are averaged already."
            )
        names = tuple(varying(x) for x in found.leaves)
        if local and any(names):
            raise ValueError(
                '`axis_name="auto"` can\'t find out which dimensions of a leaf are '
                "sharded, which layer and unit scope need to know. Give the tree of "
                "PartitionSpecs of the updates instead."
            )
        return names, ((),) * count
    wanted = _for_each_leaf(axis_name, tree, count)
    pairs = [_spec_names(s, a) for s, a in zip(wanted, axes, strict=True)]
    sums, groups = tuple(p[0] for p in pairs), tuple(p[1] for p in pairs)
    if not local:  # a leaf that is replicated according to its type is counted once
        in_types = _manual_axes()[0]
        sums = tuple(
            tuple(n for n in names if n not in in_types or n in varying(x))
            for names, x in zip(sums, found.leaves, strict=True)
        )
    return sums, groups


def leaf_axes(axis_name: Any, tree: Any, found: Leaves) -> tuple[tuple[str, ...], ...]:
    """Returns the mesh axes that each leaf is sharded over."""
    axes = [tuple(range(x.ndim)) for x in found.leaves]
    return axis_names(axis_name, tree, found, axes, local=False)[0]


def most(x: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """Returns the elementwise maximum over the devices along the given mesh axes."""
    return lax.pmax(x, names) if names else x


def on_all(flag: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """Returns whether a flag is set on all devices along the given mesh axes."""
    return most((~flag).astype(jnp.int32), names) == 0


@jax.custom_jvp
def _barrier(arrays: list[jax.Array]) -> list[jax.Array]:
    return lax.optimization_barrier(arrays)


@_barrier.defjvp
def _barrier_jvp(primals: tuple, tangents: tuple) -> tuple:
    # The tangents skip the barrier: JAX 0.12 can't transpose a barrier if some of its
    # tangents are constant.
    return _barrier(*primals), tangents[0]


def kept_apart(tree: Any) -> Any:
    """Returns ``tree`` behind a barrier, across which XLA neither fuses nor shares."""
    flat, treedef = jax.tree.flatten(tree)
    # Arrays that vary over different mesh axes get separate barriers: before JAX 0.12,
    # every output of a barrier varies over the mesh axes of all its inputs.
    along = list(map(varying, flat))
    for names in sorted(set(along)):
        at = [i for i, axes in enumerate(along) if axes == names]
        behind = _barrier([flat[i] for i in at])
        for i, x in zip(at, behind, strict=True):
            flat[i] = x
    return jax.tree.unflatten(treedef, flat)


def kept_apart_on_cpu(tree: Any) -> Any:
    """Returns ``tree`` behind a barrier on a CPU, and unchanged on other devices.

    On a GPU or TPU, two kernels that need the same cheap value, such as a gradient that
    a backward pass converts from bfloat16, both compute it. Behind a barrier, XLA would
    write the value to memory.
    """
    if not any(isinstance(x, Tracer) for x in jax.tree.leaves(tree)):
        return tree
    return lax.platform_dependent(tree, cpu=kept_apart, default=lambda tree: tree)


def in_one_array(values: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns the scalars ``values``, read from one array behind a barrier.

    On a GPU, XLA then computes all dependent values in one kernel, instead of one
    kernel per scalar. There is one array per dtype and set of mesh axes.
    """
    values = list(values)
    kinds = [(str(v.dtype), varying(v)) for v in values]
    for kind in sorted(set(kinds)):
        at = [i for i, other in enumerate(kinds) if other == kind]
        behind = lax.optimization_barrier(jnp.stack([values[i] for i in at]))
        for i, value in zip(at, behind, strict=True):
            values[i] = value
    return values
