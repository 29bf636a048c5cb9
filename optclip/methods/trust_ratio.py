"""Scales updates by a clipped trust ratio, as in LARC and LAMBC."""

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
    """Scales each leaf by its trust ratio, clipped at 1, as in LAMBC and LARC.

    u' = u * min(1, coefficient * w / n), where n is the norm of the leaf and w is the
    norm of its parameters. A leaf is unchanged if w is 0. Chained after
    `optax.scale_by_adam` and the weight decay, this is LAMB with its trust ratio
    clipped at 1. For LARC, apply it to the gradients, and set ``coefficient`` to LARC's
    trust coefficient divided by the learning rate.

    Args:
        coefficient: Factor that multiplies the trust ratio, at least 0. A value of 0
            sets all updates to zero, which stops training; inf disables clipping.
        scope: A scope from `optclip.scopes`, which determines the entries that share
            one ratio.
        nonfinite: As in `optclip.clip_by_rule`.
        axis_name: As in `optclip.clip_by_rule`.
        update_dtype: As in `optclip.clip_by_rule`.

    Returns:
        A gradient transformation whose state is a `ClipState`; ``params`` is required.

    Raises:
        ValueError: If ``coefficient`` is negative or NaN, or ``params`` is missing.

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
