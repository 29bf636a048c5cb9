"""Finding the states of optclip in any optimizer state, and the names of leaves."""

from typing import Any

import jax
import numpy as np
import optax
from jax.core import Tracer

from optclip import _trees

__all__ = ["find", "known", "names_of", "outside_jit"]


def _plain(leaf: Any) -> Any:
    """Returns the array in a Flax NNX variable; other leaves as they are."""
    if isinstance(leaf, (jax.Array, np.ndarray)) or not hasattr(leaf, "get_value"):
        return leaf
    return leaf.get_value()


def _is_variable(node: Any) -> bool:
    return hasattr(node, "get_value") and hasattr(node, "set_value")


def outside_jit(state: Any, name: str) -> None:
    """Raises where the codes of paths can't be read."""
    if any(isinstance(x, Tracer) for x in jax.tree.leaves(state.seen)):
        raise ValueError(
            f"`{name}` looks up the names of leaves: call it outside of jit, on the "
            "state that the step returned. `metrics` works inside."
        )


def _refuse_optimizers(opt_state: Any) -> None:
    if isinstance(opt_state, optax.GradientTransformation):
        raise TypeError(
            "`opt_state` must be the state of an optimizer, got the optimizer itself. "
            "Pass what `init` or `update` returned."
        )


def find(opt_state: Any, kinds: tuple[type, ...]) -> list[Any]:
    """Returns the states of these kinds, in the order of the chain."""
    _refuse_optimizers(opt_state)
    states: list[Any] = []

    def stop(node):
        return isinstance(node, kinds)

    for node in jax.tree.leaves(opt_state, is_leaf=stop):
        if stop(node):
            states.append(jax.tree.map(_plain, node, is_leaf=_is_variable))
            states += find(getattr(node, "optimizer_state", ()), kinds)
    return states


def names_of(params: Any) -> dict[int, str]:
    """Returns the path that each code in a state stands for."""
    paths = _trees.leaves_of(params).paths
    codes = _trees.path_codes(paths)
    return {int(c): p for c, p in zip(codes, paths, strict=False)}


def known(codes: Any, names: dict[int, str]) -> list[tuple[int, str]]:
    """Returns (index, path) of the leaves that a state watched."""
    table = np.asarray(codes).reshape(-1, np.asarray(codes).shape[-1])[0]
    empty = int(_trees.path_codes([])[0])
    missing = [int(c) for c in table if int(c) not in names and int(c) != empty]
    if missing:
        raise ValueError(
            f"`params` has no parameter for {len(missing)} of the {len(table)} leaves "
            "that the state watched. Pass the parameters that the optimizer was "
            "initialised with."
        )
    return [(i, names[int(c)]) for i, c in enumerate(table) if int(c) in names]
