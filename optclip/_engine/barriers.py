"""Barriers: work that XLA shall not share, move or fuse across."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optclip._engine.sharding import varying

__all__ = ["in_one_array", "kept_apart"]


@jax.custom_jvp
def _barrier(arrays: list[jax.Array]) -> list[jax.Array]:
    return lax.optimization_barrier(arrays)


@_barrier.defjvp
def _barrier_jvp(primals: tuple, tangents: tuple) -> tuple:
    # JAX 0.12 can't transpose a barrier of which some tangents are constant.
    return _barrier(*primals), tangents[0]


def kept_apart(tree: Any) -> Any:
    """Returns ``tree`` behind a barrier, across which XLA shares no work."""
    flat, treedef = jax.tree.flatten(tree)
    # Before JAX 0.12 what comes out of one barrier varies over all the mesh axes that
    # any part of it varied over.
    along = list(map(varying, flat))
    for names in sorted(set(along)):
        at = [i for i, own in enumerate(along) if own == names]
        behind = _barrier([flat[i] for i in at])
        for i, x in zip(at, behind, strict=True):
            flat[i] = x
    return jax.tree.unflatten(treedef, flat)


def in_one_array(values: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns the scalars ``values``, out of one array behind a barrier.

    Of what follows from them XLA makes one kernel on a GPU, where it would make one for
    each. Those of another dtype, or that vary over other mesh axes, have another array.
    """
    values = list(values)
    kinds = [(str(v.dtype), varying(v)) for v in values]
    for kind in sorted(set(kinds)):
        at = [i for i, own in enumerate(kinds) if own == kind]
        behind = lax.optimization_barrier(jnp.stack([values[i] for i in at]))
        for i, value in zip(at, behind, strict=True):
            values[i] = value
    return values
