"""Arithmetic that holds at the edges of a dtype, and its derivatives at zero."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

__all__ = ["largest_of", "root_of", "usable_unit"]


def usable_unit(length: jax.Array) -> jax.Array:
    """Returns a unit near ``length`` whose inverse is no subnormal number; 1 for 0."""
    known = (length > 0) & (length < jnp.inf)
    return jnp.where(known, jnp.minimum(length, jnp.finfo(length.dtype).max / 16), 1.0)


def root_of(total: jax.Array, order: float = 2.0) -> jax.Array:
    """Returns the root of that order, with derivative 0 at 0; of NaN, NaN."""
    zero = total == 0
    safe = jnp.where(zero, 1.0, total)
    root = jnp.sqrt(safe) if order == 2.0 else safe ** (1 / order)
    return jnp.where(zero, 0.0, root)


def largest_of(
    values: jax.Array, add: Callable = jnp.sum, most: Callable = jnp.max
) -> jax.Array:
    """Returns the maximum of non-negative ``values``, NaN if one of them is NaN.

    ``add`` and ``most`` reduce over entries or devices. XLA's all-reduce of maxima
    drops NaN, so NaN takes part as infinity, and a sum tells where it was.
    """
    nan = jnp.isnan(values)
    top = most(jnp.where(nan, jnp.inf, values))
    return jnp.where(add(nan.astype(jnp.int32)) > 0, jnp.nan, top)
