"""LARC, in its form that clips: the update bounded by a trust ratio."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from optclip import scopes
from optclip._engine import validation
from optclip._engine.rule import Limit, Rule
from optclip._engine.types import DType, NonfinitePolicy
from optclip.clipping import clip_by_rule
from optclip.methods._common import Clip

__all__ = ["trust_ratio_clip"]


def trust_ratio_clip(
    coefficient: jax.typing.ArrayLike = 1.0,
    *,
    scope: scopes.Scope = scopes.leaf(),
    nonfinite: NonfinitePolicy = "propagate",
    axis_name: Any = None,
    update_dtype: DType = None,
) -> Clip:
    """Scales each leaf by its trust ratio, but never up: LAMBC, and LARC's clipping.

    u' = u * min(1, coefficient * w / n) with the norms n of the leaf and w of its
    parameters; unchanged where w is 0. After `optax.scale_by_adam` and the weight decay
    it is LAMB with the trust ratio clipped at 1. For LARC's, put it after the gradient
    with ``coefficient`` = its trust coefficient divided by the learning rate.

    Args:
        coefficient: At least 0. 0 gives zeros, which stops training; inf switches the
            clip off.
        scope: Which entries share one ratio, from `optclip.scopes`.
        nonfinite: As in `optclip.clip_by_rule`.
        axis_name: As in `optclip.clip_by_rule`.
        update_dtype: As in `optclip.clip_by_rule`.

    Returns:
        A transformation with `ClipState` that needs ``params``.

    Raises:
        ValueError: If ``coefficient`` is negative or NaN, or ``params`` are missing.

    Example:
        >>> import optax, optclip
        >>> adam = optax.scale_by_adam()
        >>> tx = optax.chain(adam, optclip.trust_ratio_clip(), optax.scale(-1e-3))

    Reference:
        You et al., Large Batch Optimization for Deep Learning, 2020,
        https://arxiv.org/abs/1904.00962
    """
    validation.threshold(coefficient=coefficient)

    def update(norm, state, context):
        size = context.params_norm().astype(norm.dtype)
        limit = jnp.where(size > 0, coefficient * size, jnp.inf)
        return Limit(limit, limit), state

    rule = Rule(lambda norm: (), update, "trust_ratio_clip")
    return clip_by_rule(
        rule,
        scope=scope,
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )
