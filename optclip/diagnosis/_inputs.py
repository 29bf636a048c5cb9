"""Validates the arguments of a diagnosis before anything is measured."""

import itertools
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optclip._engine import names as path_names

__all__ = ["batches_of", "broken_parts", "fitted", "not_finite_leaves", "outside_jit"]


def outside_jit(name: str, *trees: Any) -> None:
    """Raises if an argument is traced, since the host needs the measured values."""
    if any(isinstance(x, Tracer) for x in jax.tree.leaves(trees)):
        raise ValueError(f"`{name}` runs programs of its own: call it outside of jit.")


def _named(tree: Any) -> list[tuple[str, Any]]:
    return list(zip(path_names.leaf_names(tree), jax.tree.leaves(tree), strict=True))


def _as_array(leaf: Any, path: str, number: int) -> jax.Array:
    try:
        return jnp.asarray(leaf)
    except (TypeError, ValueError) as error:
        where = f"at {path!r} " if path else ""
        kind = getattr(leaf, "dtype", type(leaf).__name__)
        raise TypeError(
            f"Batch {number} holds {where}what is no array of numbers: {kind}. Give "
            "batches as trees of arrays, and leave names and texts out."
        ) from error


def batches_of(batches: Any, most: int) -> tuple[list[Any], bool]:
    """Returns up to ``most`` batches as arrays, and whether there are more.

    Raises:
        TypeError: If ``batches`` is not an iterable of batches, or if a leaf of a batch
            is not an array.
        ValueError: If ``batches`` is empty.
    """
    if isinstance(batches, (Mapping, str)) or not isinstance(batches, Iterable):
        raise TypeError(
            "`batches` must be an iterable of batches, such as a list, got "
            f"{type(batches).__name__}. A single batch is given as `[batch]`."
        )
    if getattr(batches, "ndim", 2) < 2:
        raise TypeError("`batches` is one array of one axis. Give a list of batches.")
    given = list(itertools.islice(batches, most + 1))
    if not given:
        raise ValueError("`batches` is empty: give at least one batch.")
    outside_jit("diagnose", given)
    taken = []
    for number, batch in enumerate(given[:most]):
        paths, treedef = [p for p, _ in _named(batch)], jax.tree.structure(batch)
        leaves = zip(jax.tree.leaves(batch), paths, strict=True)
        made = [_as_array(leaf, path, number) for leaf, path in leaves]
        taken.append(jax.tree.unflatten(treedef, made))
    return taken, len(given) > most


def not_finite_leaves(tree: Any) -> tuple[str, ...]:
    """Returns the paths of the leaves that contain NaN or infinity."""
    named = _named(tree)
    inexact = [(p, x) for p, x in named if jnp.issubdtype(_dtype(x), jnp.inexact)]
    return tuple(p for p, x in inexact if not bool(jnp.all(jnp.isfinite(x))))


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else np.result_type(leaf)


def _lost(what: str, tree: Any) -> None:
    for path, leaf in _named(tree):
        if getattr(leaf, "is_deleted", bool)():
            raise ValueError(
                f"{what} {path!r} was deleted, mostly by a step that it was donated "
                "to. Give the arrays that the step returned."
            )


def _bare(tree: Any) -> Any:
    """Returns the tree with Flax NNX's variables replaced by their values."""
    nnx = getattr(sys.modules.get("flax"), "nnx", None)
    if nnx is None:
        return tree

    def is_variable(x):
        return isinstance(x, nnx.Variable)

    return jax.tree.map(
        lambda x: x[...] if is_variable(x) else x, tree, is_leaf=is_variable
    )


def fitted(params: Any, opt_state: Any, expected: Any) -> Any:
    """Returns the optimizer state in the structure of ``optimizer.init(params)``.

    If the parameters include integers, the state is reduced to the parameters that are
    diagnosed. Flax NNX variables are replaced by their values.

    Raises:
        ValueError: If the state does not match ``params``, or if arrays were deleted.
    """
    if hasattr(opt_state, "tx") and hasattr(opt_state, "opt_state"):
        raise ValueError(
            f"`opt_state` is a {type(opt_state).__name__}, which holds the state of an "
            "optimizer: pass its `opt_state`."
        )
    _lost("The parameter", params)
    _lost("`opt_state` at", opt_state)
    outside_jit("diagnose", params, opt_state)
    wanted, treedef = _named(expected), jax.tree.structure(expected)
    given = _named(_bare(opt_state))
    known = dict(given)
    found = []
    for path, like in wanted:
        leaf = known.get(path)
        if leaf is None or np.shape(leaf) != like.shape:
            what = "nothing" if leaf is None else f"an array of shape {np.shape(leaf)}"
            raise ValueError(
                f"`opt_state` does not fit `optimizer` and `params`: at {path!r} there "
                f"should be an array of shape {like.shape}, and there is {what}. Give "
                "the state that this optimizer's last update returned."
            )
        found.append(leaf)
    return jax.tree.unflatten(treedef, found)


def broken_parts(params: Any, batches: list[Any]) -> dict[str, Any]:
    """Returns the arguments that may explain why no batch has a finite gradient."""
    bad = [str(i) for i, batch in enumerate(batches) if not_finite_leaves(batch)]
    empty = [str(i) for i, b in enumerate(batches) if _is_empty(b)]
    found = {
        "parameters": not_finite_leaves(params),
        "batches": tuple(bad),
        "empty": tuple(empty),
    }
    return {name: where for name, where in found.items() if where}


def _is_empty(batch: Any) -> bool:
    return any(np.size(x) == 0 for x in jax.tree.leaves(batch))
