"""Scales every group of updates to the same norm (normalized gradients)."""

from __future__ import annotations

import functools
from typing import Any

import jax

from optclip import actions, scopes
from optclip._engine import validation
from optclip._engine.thresholds import fixed
from optclip._engine.types import DType, NonfinitePolicy, Order
from optclip._engine.validation import EUCLIDEAN
from optclip.clipping import clip_by_rule
from optclip.methods._common import Clip, Threshold

__all__ = ["normalize_by_norm"]


def normalize_by_norm(
    target: Threshold = 1.0,
    eps: jax.typing.ArrayLike = 0.0,
    *,
    scope: scopes.Scope = scopes.tree(),
    ord: Order = EUCLIDEAN,
    nonfinite: NonfinitePolicy = "propagate",
    axis_name: Any = None,
    update_dtype: DType = None,
) -> Clip:
    """Scales each group of updates to the norm ``target`` (normalized gradients).

    u' = u * target / (n + eps), where n is the norm of the group. A group of zeros
    stays zero. With ``eps=1e-6``, this is `optax.normalize_by_update_norm`. The norm of
    the gradient no longer affects the size of the update, so tune the learning rate
    again, and use a learning rate schedule that decays.

    Args:
        target: The norm of each scaled group, at least 0: a number, an array or a
            schedule. A value of 0 sets all updates to zero, which stops training; inf
            leaves the updates unchanged.
        eps: Value added to the norm, at least 0.
        scope: A scope from `optclip.scopes`, which determines the entries that share
            one norm.
        ord: As in `clip_by_global_norm`.
        nonfinite: As in `optclip.clip_by_rule`.
        axis_name: As in `optclip.clip_by_rule`.
        update_dtype: As in `optclip.clip_by_rule`.

    Returns:
        A gradient transformation whose state is a `ClipState`; ``params`` is not used.

    Raises:
        ValueError: If an argument is negative or NaN.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> tx = optclip.normalize_by_norm()
        >>> grads = jnp.array([0.0, 0.01])
        >>> tx.update(grads, tx.init(grads))[0].tolist()
        [0.0, 1.0]

    Reference:
        Cutkosky and Mehta, Momentum Improves Normalized SGD, 2020,
        https://arxiv.org/abs/2002.03305
    """
    validation.non_negative(eps=eps)
    return clip_by_rule(
        fixed(target, "target"),
        scope=scope,
        ord=ord,
        action=functools.partial(actions.normalize, eps=eps),
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )
