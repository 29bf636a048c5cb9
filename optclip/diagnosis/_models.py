"""Converts other libraries' models to pytrees of arrays, without importing them."""

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["as_arrays", "is_weight"]


def is_weight(leaf: Any) -> bool:
    """Whether a leaf is an array of real or complex numbers."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def _from_nnx(nnx: Any, loss_fn: Callable, model: Any) -> tuple[Callable, Any]:
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, *args):
        # Copied at each call because the call may modify the variables.
        mine = jax.tree.map(lambda x: x, rest)
        return loss_fn(nnx.merge(graph, params, mine), *args)

    return loss, params


def as_arrays(loss_fn: Callable, params: Any) -> tuple[Callable, Any]:
    """Returns a loss function that takes only a pytree of arrays, and that pytree.

    A Flax NNX model is split, then merged again at each call. Changes that a call makes
    to the model, such as batch statistics and key counters, are discarded. In other
    pytrees, such as Equinox models, leaves that are not arrays of real or complex
    numbers are left unchanged.
    """
    nnx = getattr(sys.modules.get("flax"), "nnx", None)
    if nnx is not None and isinstance(params, nnx.Module):
        return _from_nnx(nnx, loss_fn, params)
    leaves, treedef = jax.tree.flatten(params)
    leaves = [jnp.asarray(x) if type(x) in (float, complex) else x for x in leaves]
    weights = [is_weight(x) for x in leaves]
    if not any(weights):
        raise ValueError(
            "`params` has no leaf of real or complex numbers. Give the tree of "
            "parameters, a Flax NNX model or an Equinox model."
        )
    if all(weights):
        return loss_fn, jax.tree.unflatten(treedef, leaves)
    paths = jax.tree.unflatten(
        treedef, [x if w else None for x, w in zip(leaves, weights, strict=True)]
    )

    def loss(arrays, *args):
        mine = iter(jax.tree.leaves(arrays))
        every = [next(mine) if w else x for x, w in zip(leaves, weights, strict=True)]
        return loss_fn(jax.tree.unflatten(treedef, every), *args)

    return loss, paths
