"""Arithmetic that is accurate near the limits of a dtype and differentiable at 0."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

__all__ = [
    "LAST_COUNT",
    "increment",
    "largest_of",
    "quotient",
    "root_of",
    "usable_unit",
]

# The largest int32. Counters stop here, as Optax's do.
LAST_COUNT = 2**31 - 1


def increment(count: jax.Array) -> jax.Array:
    """Returns ``count + 1``, capped at the largest int32."""
    return jnp.minimum(count, LAST_COUNT - 1) + 1


@jax.custom_jvp
def quotient(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """Returns ``numerator / denominator``, with a derivative that avoids squares.

    JAX's own derivative divides by the square of the denominator, which underflows in
    float32 if the denominator is below 1e-23.
    """
    return numerator / denominator


@quotient.defjvp
def _quotient_jvp(primals, tangents):
    (top, bottom), (top_dot, bottom_dot) = primals, tangents
    value = top / bottom
    return value, top_dot / bottom - value * (bottom_dot / bottom)


def usable_unit(length: jax.Array) -> jax.Array:
    """Returns a unit near ``length`` whose inverse is normal, or 1 for 0 and inf.

    The inverse of the largest number is subnormal, but the inverse of 1/16 of it isn't.
    """
    known = (length > 0) & (length < jnp.inf)
    return jnp.where(known, jnp.minimum(length, jnp.finfo(length.dtype).max / 16), 1.0)


def root_of(total: jax.Array, order: float = 2.0) -> jax.Array:
    """Returns the root of the given order, with derivative 0 at 0. Propagates NaN."""
    zero = total == 0
    safe = jnp.where(zero, 1.0, total)
    root = jnp.sqrt(safe) if order == 2.0 else safe ** (1 / order)
    return jnp.where(zero, 0.0, root)


def largest_of(
    values: jax.Array, add: Callable = jnp.sum, most: Callable = jnp.max
) -> jax.Array:
    """Returns the maximum of non-negative ``values``, or NaN if any of them is NaN.

    ``add`` and ``most`` compute the sum and the maximum over entries or devices. XLA's
    max all-reduce drops NaN, so NaNs are replaced by infinity in the maximum and
    counted by a sum.
    """
    nan = jnp.isnan(values)
    top = most(jnp.where(nan, jnp.inf, values))
    return jnp.where(add(nan.astype(jnp.int32)) > 0, jnp.nan, top)
