"""Derives the PartitionSpecs of an optimizer state from those of the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from optclip._engine.names import leaf_names

__all__ = ["state_specs"]

# A dimension of a parameter is multiplied by this factor to find out which dimensions
# of the state depend on it. Some states store leaves of the same shape in one array, so
# the factor must not make different shapes equal. This is unlikely for a large prime.
FACTOR = 127

# The mesh axes that one dimension is sharded over.
Entry = tuple[str, ...]
# The leaves of a pytree of shapes, by key path.
Shapes = dict[tuple, Any]


def _entry(value: Any) -> Entry:
    """Returns the mesh axes that a PartitionSpec names for one dimension."""
    if value is None or value is PartitionSpec.UNCONSTRAINED:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


def _is_spec(node: Any) -> bool:
    return node is None or isinstance(node, PartitionSpec)


def _entries(spec: Any, shape: tuple[int, ...], path: str) -> list[Entry]:
    """Returns the mesh axes of each dimension of a parameter."""
    if not _is_spec(spec):
        raise TypeError(
            f"`specs` must hold a `jax.sharding.PartitionSpec` for each parameter, got "
            f"{spec!r} for `{path}`."
        )
    entries = [_entry(value) for value in spec or ()]
    if len(entries) > len(shape):
        raise ValueError(
            f"The spec {spec} of `{path}` has {len(entries)} entries, but the "
            f"parameter has shape {shape}. Give at most one entry per dimension."
        )
    names = [name for entry in entries for name in entry]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(
            f"The spec {spec} of `{path}` names the mesh axis {twice!r} more than "
            "once. A mesh axis can shard only one dimension."
        )
    return entries + [()] * (len(shape) - len(entries))


def _entries_of(params: Any, specs: Any) -> list[list[Entry]]:
    each: list[Any] = []

    def visit(spec, subtree):
        each.extend([spec] * len(jax.tree.leaves(subtree)))

    try:
        jax.tree.map(visit, specs, params, is_leaf=_is_spec)
    except (ValueError, TypeError) as error:
        raise ValueError(
            "`specs` must have the structure of `params`, or be a prefix of it, as for "
            f"`jax.shard_map`. JAX says: {error}"
        ) from error
    leaves, names = jax.tree.leaves(params), leaf_names(params)
    return [
        _entries(spec, leaf.shape, name)
        for spec, leaf, name in zip(each, leaves, names, strict=True)
    ]


def _by_path(tree: Any) -> Shapes:
    return dict(jax.tree_util.tree_flatten_with_path(tree)[0])


def _children(shapes: Shapes) -> dict[tuple, set]:
    """Returns the keys of the children of each node."""
    children: dict[tuple, set] = {}
    for path in shapes:
        for depth, key in enumerate(path):
            children.setdefault(path[:depth], set()).add(key)
    return children


def _comparable(base: Shapes, other: Shapes) -> Callable[[tuple], bool]:
    """Returns a function that checks whether a leaf is comparable across the states.

    A leaf is comparable if both states have the same structure at its path, and each
    dimension in ``other`` is equal to the one in ``base`` or multiplied by `FACTOR`.
    """
    before, after = _children(base), _children(other)
    changed = {node for node, keys in before.items() if after.get(node) != keys}

    def same(path):
        if any(path[:depth] in changed for depth in range(len(path))):
            return False
        pairs = zip(base[path].shape, other[path].shape, strict=False)
        ranks = base[path].ndim == other[path].ndim
        return ranks and all(n in (m, m * FACTOR) for m, n in pairs)

    return same


def _like_a_parameter(path: tuple, shape: tuple, params: Shapes) -> tuple | None:
    """Returns the path of the parameter that matches a leaf of the state, or None."""
    tails = (path[k:] for k in range(len(path)))
    found = [t for t in tails if t in params and params[t].shape == shape]
    return found[0] if found else None


def state_specs(optimizer: Any, params: Any, specs: Any) -> Any:
    """Returns the PartitionSpecs of an optimizer state, given those of the parameters.

    Each dimension of the state is sharded like the parameter dimension that determines
    its size, and all other dimensions are replicated. For example, moments are sharded
    like their parameters, and norms per layer or unit are sharded over the mesh axes of
    the layers or units. Dimensions are matched using shapes alone: ``init`` is
    evaluated abstractly with the shapes of the parameters, and again with the sharded
    dimensions enlarged. This requires neither a mesh nor devices.

    If the layout of the state depends on shapes, some leaves can't be matched this way.
    Such a leaf gets the spec of the parameter with the same path and shape, or is
    replicated if there is no such parameter. Adafactor, for example, factors a leaf
    over its two largest axes. For sharded square matrices, check the specs of ``v_row``
    and ``v_col``, which may be swapped.

    Args:
        optimizer: Any Optax optimizer, or any other object with an ``init`` function.
        params: The parameters or their shapes. The shapes must be global, so call this
            function outside of `jax.shard_map`.
        specs: A pytree of PartitionSpecs with the structure of ``params``, or a prefix
            of it; None means that a parameter is replicated.

    Returns:
        A pytree of PartitionSpecs with the structure of ``optimizer.init(params)``. Use
        it for the ``in_specs`` and ``out_specs`` of `jax.shard_map`, or for the
        ``out_shardings`` of a jitted ``init``.

    Raises:
        TypeError: If ``optimizer`` has no ``init``, or ``specs`` contains anything
            other than PartitionSpecs.
        ValueError: If ``specs`` does not match ``params``.

    Example:
        >>> import jax, jax.numpy as jnp, optax, optclip
        >>> from jax.sharding import PartitionSpec as P
        >>> params = {"w": jnp.zeros((8, 4)), "b": jnp.zeros(4)}
        >>> specs = {"w": P("data", None), "b": P()}
        >>> tx = optax.chain(optclip.clip_by_rule(1.0), optax.trace(0.9))
        >>> clip, momentum = optclip.state_specs(tx, params, specs)
        >>> momentum.trace == specs, clip.norm_before == P()
        (True, True)
    """
    init = getattr(optimizer, "init", None)
    if not callable(init):
        raise TypeError(
            f"`optimizer` must be an Optax optimizer with a function `init`, such as "
            f"`optax.adamw(1e-3)`, got {optimizer!r}."
        )
    shapes = jax.eval_shape(lambda tree: tree, params)
    leaves, treedef = jax.tree.flatten(shapes)
    each = _entries_of(shapes, specs)
    state = jax.eval_shape(init, shapes)
    base = _by_path(state)
    dims: dict[tuple, list[Entry]] = {p: [()] * x.ndim for p, x in base.items()}
    used: dict[tuple, set[str]] = {path: set() for path in base}
    unclear: set[tuple] = set()
    for entry in dict.fromkeys(e for entries in each for e in entries if e):
        larger = []
        for leaf, entries in zip(leaves, each, strict=True):
            sizes = zip(leaf.shape, entries, strict=True)
            shape = [n * FACTOR if axes == entry else n for n, axes in sizes]
            larger.append(jax.ShapeDtypeStruct(shape, leaf.dtype))
        other = _by_path(jax.eval_shape(init, jax.tree.unflatten(treedef, larger)))
        same = _comparable(base, other)
        for path, x in base.items():
            if not same(path):
                unclear.add(path)
                continue
            for axis, n in enumerate(x.shape):
                follows = other[path].shape[axis] != n
                # A mesh axis can shard only one dimension of an array.
                if follows and not used[path] & set(entry):
                    dims[path][axis] += entry
                    used[path] |= set(entry)
    by_path = _by_path(shapes)
    given = dict(zip(by_path, each, strict=True))
    for path in unclear:
        tail = _like_a_parameter(path, base[path].shape, by_path)
        dims[path] = [] if tail is None else given[tail]

    def spec(entries):
        plain = [e[0] if len(e) == 1 else e or None for e in entries]
        return PartitionSpec(*plain) if any(plain) else PartitionSpec()

    return jax.tree.unflatten(jax.tree.structure(state), map(spec, dims.values()))
