"""Masks that select the leaves a wrapper applies to, as in `optax.masked`."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from optax import MaskedNode

__all__ = ["Mask", "check", "kept", "restored", "selected"]


Mask = Any


def check(mask: Mask) -> None:
    """Raises unless ``mask`` is None, a function, or a pytree of booleans."""
    if mask is None or callable(mask):
        return
    leaves = jax.tree.leaves(mask)
    for leaf in leaves:
        if not isinstance(leaf, (bool, np.bool_)):
            raise TypeError(
                "`mask` must be a pytree of booleans with the structure of the updates "
                "or a prefix of it, or a function that returns one, got a leaf "
                f"{leaf!r} of type {type(leaf).__name__}."
            )
    if not leaves:
        raise TypeError(
            f"`mask` must contain at least one boolean, got {mask!r}. Pass None to "
            "select all leaves."
        )


def selected(mask: Mask, tree: Any) -> Any:
    """Returns the booleans of ``mask`` for ``tree``, or None if there is no mask."""
    if callable(mask):
        mask = mask(tree)
        check(mask)
    return mask


def kept(flags: Any, tree: Any) -> Any:
    """Returns ``tree`` with each leaf flagged False replaced by `optax.MaskedNode`."""
    if flags is None:
        return tree

    def choose(flag, subtree):
        return subtree if flag else jax.tree.map(lambda _: MaskedNode(), subtree)

    try:
        return jax.tree.map(choose, flags, tree)
    except (ValueError, TypeError) as error:
        raise ValueError(
            "`mask` must have the structure of the updates or a prefix of it. JAX "
            f"reports: {error}"
        ) from error


def restored(flags: Any, new: Any, old: Any) -> Any:
    """Returns ``new`` with its masked leaves replaced by the leaves of ``old``."""
    if flags is None:
        return new

    def choose(before, after):
        return before if isinstance(after, MaskedNode) else after

    return jax.tree.map(choose, old, new)
