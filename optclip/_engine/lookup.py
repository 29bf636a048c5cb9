"""Finds the states of optclip in an optimizer state, and the names of leaves."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.core import Tracer

from optclip._engine import pytrees
from optclip._engine.names import path_codes

__all__ = [
    "Located",
    "Paths",
    "contents_of",
    "find",
    "locate",
    "outside_jit",
    "path_finder",
]

# Maps the leaf codes in a state to a list of (index, path), one per leaf.
Paths = Callable[[Any], list[tuple[int, str]]]


class Located(NamedTuple):
    """A state and its location.

    Attributes:
        state: The state, as plain arrays.
        groups: The labels of the `optax.partition` groups that contain the state, from
            the outermost to the innermost; () if there are none.
    """

    state: Any
    groups: tuple[str, ...]


def _plain(leaf: Any) -> Any:
    """Returns the array in a Flax NNX variable, and other leaves unchanged."""
    if isinstance(leaf, (jax.Array, np.ndarray)) or not hasattr(leaf, "get_value"):
        return leaf
    return leaf.get_value()


def _is_variable(node: Any) -> bool:
    return hasattr(node, "get_value") and hasattr(node, "set_value")


def outside_jit(tree: Any, name: str) -> None:
    """Raises an error inside jit, where the codes of paths can't be read."""
    if any(isinstance(x, Tracer) for x in jax.tree.leaves(tree)):
        raise ValueError(
            f"`{name}` needs concrete values to look up the names of leaves, got "
            "tracers: call it outside of jit, on the state that the step returned. "
            "`metrics` works inside jit."
        )


def _refuse_optimizers(opt_state: Any) -> None:
    if isinstance(opt_state, optax.GradientTransformation):
        raise TypeError(
            "`opt_state` must be the state of an optimizer, got the optimizer itself. "
            "Pass what `init` or `update` returned."
        )


def _labels_in(path: tuple) -> tuple[str, ...]:
    """Returns the labels of `optax.partition` in a key path.

    Its state has a field `inner_states`, which maps labels to states.
    """
    return tuple(
        str(key.key)
        for above, key in itertools.pairwise(path)
        if getattr(above, "name", None) == "inner_states" and hasattr(key, "key")
    )


def locate(
    opt_state: Any, kinds: tuple[type, ...], groups: tuple[str, ...] = ()
) -> list[Located]:
    """Returns the states of these types in the order of the chain, outer ones first."""
    _refuse_optimizers(opt_state)
    states: list[Located] = []

    def stop(node):
        return isinstance(node, kinds)

    flat, _ = jax.tree_util.tree_flatten_with_path(opt_state, is_leaf=stop)
    for path, node in flat:
        if stop(node):
            labels = groups + _labels_in(path)
            plain = jax.tree.map(_plain, node, is_leaf=_is_variable)
            states.append(Located(plain, labels))
            inside = getattr(node, "optimizer_state", ())
            states += locate(inside, kinds, labels)
    return states


def find(opt_state: Any, kinds: tuple[type, ...]) -> list[Any]:
    """Returns the states of these types in the order of the chain, outer ones first."""
    return [located.state for located in locate(opt_state, kinds)]


def contents_of(opt_state: Any) -> str:
    """Describes the contents of an optimizer state, for error messages."""
    kinds: dict[str, None] = {}

    def visit(node):
        if hasattr(node, "_fields"):
            kinds.setdefault(type(node).__name__)
        return False

    jax.tree.leaves(opt_state, is_leaf=visit)
    return ", ".join(kinds) if kinds else f"a {type(opt_state).__name__}"


def _names_of(tree: Any) -> dict[int, str]:
    """Returns a dict that maps the code of each leaf to its path."""
    paths = pytrees.leaves_of(tree).paths
    codes = path_codes(paths)
    return {int(c): p for c, p in zip(codes, paths, strict=False)}


def _subtrees(tree: Any, least: int) -> Iterator[Any]:
    """Yields ``tree`` and all its subtrees with at least this many leaves."""
    if len(jax.tree.leaves(tree)) < least:
        return
    yield tree
    children = jax.tree.leaves(tree, is_leaf=lambda node: node is not tree)
    for child in children:
        if child is not tree:
            yield from _subtrees(child, least)


def path_finder(opt_state: Any, params: Any) -> Paths:
    """Returns a function that finds the paths of the leaves that a state tracks.

    If ``params`` is None, the paths are taken from a part of ``opt_state`` that has the
    structure of the parameters, such as the moments of Adam.
    """
    (empty,) = path_codes([]).tolist()
    given = None if params is None else _names_of(params)
    memory: dict[tuple, dict[int, str]] = {}

    def names_for(wanted: Sequence[int]) -> dict[int, str]:
        for tree in _subtrees(opt_state, max(len(wanted), 1)):
            names = _names_of(tree)
            if all(code in names for code in wanted):
                return names
        raise ValueError(
            "`params` is needed to name leaves, since no part of `opt_state` has the "
            "structure of the parameters, as the moments of Adam have. Pass the "
            "parameters that the optimizer was initialized with."
        )

    def paths(codes: Any) -> list[tuple[int, str]]:
        table = np.asarray(codes).reshape(-1, np.asarray(codes).shape[-1])[0].tolist()
        wanted = tuple(c for c in table if c != empty)
        if given is None:
            if wanted not in memory:
                memory[wanted] = names_for(wanted)
            names = memory[wanted]
        else:
            names = given
        missing = [c for c in wanted if c not in names]
        if missing:
            raise ValueError(
                f"`params` has no parameter for {len(missing)} of the {len(table)} "
                "leaves that the state tracks. Pass the parameters that the optimizer "
                "was initialized with."
            )
        return [(i, names[c]) for i, c in enumerate(table) if c in names]

    return paths
