"""Threshold type and hard-clipping actions that the methods share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from optclip import actions
from optclip._engine import validation

Threshold: TypeAlias = (
    jax.typing.ArrayLike | Callable[[jax.Array], jax.typing.ArrayLike]
)


Clip: TypeAlias = optax.GradientTransformationExtraArgs


def hard(eps: Any) -> actions.Action:
    """Returns a hard-clipping action that adds ``eps`` to the norm, as in PyTorch."""
    validation.non_negative(eps=eps)
    exact = isinstance(eps, (int, float)) and eps == 0
    return actions.rescale if exact else functools.partial(actions.rescale, eps=eps)


def strict(eps: float) -> actions.Action:
    """Returns a variant of `hard(eps)` that clips only norms above the threshold."""

    def action(norm, limit):
        scale = actions.rescale(norm, limit, eps=eps)
        return jnp.where(norm > limit.threshold, scale, 1.0)

    return action
