"""Which leaves a wrapper looks at: masks as those of `optax.masked`."""

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
                "`mask` must be a pytree of True and False, laid out as the updates or "
                "as the first levels of them, or a function that returns one, got "
                f"{leaf!r} of type {type(leaf).__name__} in it."
            )
    if not leaves:
        raise TypeError(f"`mask` must hold True or False, got {mask!r}.")


def selected(mask: Mask, tree: Any) -> Any:
    """Returns the booleans of ``mask`` for ``tree``; None without a mask."""
    if callable(mask):
        mask = mask(tree)
        check(mask)
    return mask


def kept(flags: Any, tree: Any) -> Any:
    """Returns ``tree`` with `optax.MaskedNode` in place of leaves that are False."""
    if flags is None:
        return tree

    def choose(flag, subtree):
        return subtree if flag else jax.tree.map(lambda _: MaskedNode(), subtree)

    try:
        return jax.tree.map(choose, flags, tree)
    except (ValueError, TypeError) as error:
        raise ValueError(
            "`mask` must be laid out as the updates, or as the first levels of them. "
            f"JAX says: {error}"
        ) from error


def restored(flags: Any, new: Any, old: Any) -> Any:
    """Returns ``new``, which `kept` made of ``old``, with the masked leaves of this."""
    if flags is None:
        return new

    def choose(before, after):
        return before if isinstance(after, MaskedNode) else after

    return jax.tree.map(choose, old, new)
