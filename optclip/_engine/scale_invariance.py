"""Whether the updates of an optimizer depend on the scale of its gradients."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.numpy as jnp

from optclip._engine import pytrees

__all__ = ["examples_of", "ignores_scale"]

# Gradients are multiplied by this power of two, which rounds nothing. Its square, times
# a gradient of about 1, is in the range of float16.
FACTOR = 16.0
# Largest relative change of the updates of an optimizer that ignores the scale. Adam
# changes by about its `eps`, which is 1e-8 by default and rarely above 1e-3.
TOLERANCE = 0.01
# Number of steps that are compared. The first updates may be zero, as while a learning
# rate is 0 or gradients are accumulated.
STEPS = 4


def _example(number: int, leaf: Any) -> jax.Array:
    """Returns an array like ``leaf`` with at most two entries along each axis."""
    shape = tuple(min(size, 2) for size in jnp.shape(leaf))
    dtype = jnp.result_type(leaf)
    if not pytrees.is_measured(leaf):
        return jnp.zeros(shape, dtype)
    # Numbers of both signs, different in each entry and leaf.
    entries = jnp.arange(jnp.zeros(shape).size, dtype=jnp.float32)
    return jnp.cos(entries + (7.0 * number + 1.0)).reshape(shape).astype(dtype)


def examples_of(tree: Any, shift: int = 0) -> Any:
    """Returns small arrays with the structure, dtypes and numbers of axes of a tree."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten([_example(i + shift, x) for i, x in enumerate(leaves)])


def _is_scale_invariant(optimizer: Any, params: Any) -> jax.Array:
    """Compares the updates for two scales of the gradients; False if all are zeros."""
    params, grads = examples_of(params), examples_of(params, 1)

    def times(factor):
        return jax.tree.map(lambda g: g * jnp.asarray(factor, g.dtype), grads)

    states = [optimizer.init(params)] * 2
    apart = largest = jnp.float32(0.0)
    for number in range(STEPS):
        size = 1.0 + number % 2  # so that the steps differ
        small, first = optimizer.update(times(size), states[0], params)
        large, second = optimizer.update(times(size * FACTOR), states[1], params)
        states = [first, second]
        for u, v in zip(jax.tree.leaves(small), jax.tree.leaves(large), strict=True):
            if pytrees.is_measured(u) and jnp.size(u):
                most = jnp.max(jnp.abs(u)).astype(jnp.float32)
                largest = jnp.maximum(largest, most)
                most = jnp.max(jnp.abs(u - v)).astype(jnp.float32)
                apart = jnp.maximum(apart, most)
    return apart < TOLERANCE * largest


def ignores_scale(optimizer: Any, params: Any) -> bool | jax.Array:
    """Returns whether larger gradients give the same updates, as in Adam.

    The optimizer runs for a few steps on small arrays with the structure, dtypes and
    numbers of axes of ``params``. If it can't, as when its ``update`` needs the value
    of the loss, the result is False.
    """
    # The steps run at once, even while `jax.jit` traces, and move only a few numbers.
    with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
        with contextlib.suppress(Exception):  # whatever an optimizer may raise
            return bool(_is_scale_invariant(optimizer, params))
    # A learning rate may itself be traced, as in `jax.vmap` over learning rates.
    with contextlib.suppress(Exception):
        return _is_scale_invariant(optimizer, params)
    return False
