"""The leaves of a pytree that hold real or complex numbers, and their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from optax import LookaheadParams, MaskedNode

from optclip._engine.names import leaf_names

__all__ = [
    "Leaves",
    "is_measured",
    "leaves_of",
    "matching",
    "memoized",
    "trained",
]

T = TypeVar("T")

# The maximum number of results in one cache. A training step needs one or two, so the
# limit matters only in programs that use many trees.
MOST_MEMOIZED = 64


class Leaves(NamedTuple):
    """The leaves of a tree that hold real or complex numbers.

    Attributes:
        leaves: The leaves, in the order of the tree.
        paths: Their paths, such as "encoder/0/kernel".
        rebuild: A function of a list of new leaves that returns the tree with the
            leaves replaced.
        absent: The number of entries of the tree that are None.
        structure: The structure of the whole tree.
    """

    leaves: list[jax.Array]
    paths: list[str]
    rebuild: Callable[[list], Any]
    absent: int
    structure: Any

    @property
    def kind(self) -> Any:
        """The static structure and types, or None if leaves have no types."""
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in self.leaves):
            return None
        return self.structure, tuple(map(jax.typeof, self.leaves))


def memoized(memory: dict[Any, T], key: Any, make: Callable[[], T]) -> T:
    """Returns ``make()``, memoized by ``key`` unless ``key`` is None."""
    try:
        if key in memory:
            return memory[key]
    except TypeError:  # the structure of the tree contains something unhashable
        return make()
    found = make()
    if key is not None:
        if len(memory) >= MOST_MEMOIZED:
            memory.clear()
        memory[key] = found
    return found


def is_measured(leaf: Any) -> bool:
    """Returns whether a leaf holds real or complex numbers."""
    if isinstance(leaf, (float, complex)):
        return True
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def trained(tree: Any) -> Any:
    """Returns the trained parameters: the fast ones if ``tree`` is `LookaheadParams`.

    `optax.lookahead` keeps two sets of parameters; gradients belong to the fast ones.
    """
    return tree.fast if isinstance(tree, LookaheadParams) else tree


def leaves_of(tree: Any) -> Leaves:
    """Returns the `Leaves` of ``tree``, or of the fast part of `LookaheadParams`."""
    if isinstance(tree, LookaheadParams):
        fast = leaves_of(tree.fast)
        return fast._replace(rebuild=lambda new: tree._replace(fast=fast.rebuild(new)))
    values, treedef = jax.tree.flatten(tree)
    names, absent = memoized(_NAMES, treedef, lambda: _names_and_holes(tree))
    at = [i for i, leaf in enumerate(values) if is_measured(leaf)]

    def rebuild(new):
        out = list(values)
        for i, leaf in zip(at, new, strict=True):
            out[i] = leaf
        return jax.tree.unflatten(treedef, out)

    leaves = [
        x if isinstance(x, jax.Array) or hasattr(x, "aval") else _abstract_or_array(x)
        for x in (values[i] for i in at)
    ]
    return Leaves(leaves, [names[i] for i in at], rebuild, absent, treedef)


# The cache of `_names_and_holes`, keyed by the structure of the tree.
_NAMES: dict = {}


def _names_and_holes(tree: Any) -> tuple[list[str], int]:
    """Returns the names of all leaves, and the number of entries that are None."""
    entries = jax.tree.leaves(tree, is_leaf=lambda x: x is None)
    return leaf_names(tree), sum(x is None for x in entries)


def _abstract_or_array(x: Any) -> Any:
    return x if isinstance(x, jax.ShapeDtypeStruct) else jnp.asarray(x)


def _is_hole(node: Any) -> bool:
    return node is None or isinstance(node, MaskedNode)


def matching(updates: Any, params: Any) -> list[jax.Array]:
    """Returns the leaves of ``params`` that match measured leaves of ``updates``."""
    pairs = []

    def visit(update, param):
        if not _is_hole(update) and is_measured(update):
            pairs.append(jnp.asarray(param))

    try:
        jax.tree.map(visit, trained(updates), trained(params), is_leaf=_is_hole)
    except (ValueError, TypeError) as error:
        raise ValueError(
            "`params` must have the structure of the updates. Pass the parameters that "
            f"the gradients belong to. JAX says: {error}"
        ) from error
    return pairs
