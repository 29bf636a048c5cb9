"""Clips each leaf by its norm."""

from __future__ import annotations

from typing import Any

import jax

from optclip import scopes
from optclip._engine.thresholds import fixed
from optclip._engine.types import DType, NonfinitePolicy, Order
from optclip._engine.validation import EUCLIDEAN
from optclip.clipping import clip_by_rule
from optclip.methods._common import Clip, Threshold, hard

__all__ = ["clip_by_leaf_norm"]


def clip_by_leaf_norm(
    max_norm: Threshold,
    *,
    ord: Order = EUCLIDEAN,
    eps: jax.typing.ArrayLike = 0.0,
    nonfinite: NonfinitePolicy = "propagate",
    axis_name: Any = None,
    update_dtype: DType = None,
) -> Clip:
    """Clips each leaf by its norm.

    For each leaf, u' = u * min(1, max_norm / (n + eps)), where n is the norm of the
    leaf. Large gradients in one part of the model do not scale down the updates of the
    other parts. Unlike clipping by the global norm, clipping each leaf changes the
    direction of the update.

    Args:
        max_norm: The largest norm of a leaf, at least 0: a number, a schedule, or an
            array with one entry per leaf. A value of 0 sets all updates to zero, which
            stops training; inf disables clipping.
        ord: As in `clip_by_global_norm`.
        eps: As in `clip_by_global_norm`.
        nonfinite: As in `optclip.clip_by_rule`.
        axis_name: As in `optclip.clip_by_rule`.
        update_dtype: As in `optclip.clip_by_rule`.

    Returns:
        A gradient transformation whose state is a `ClipState`; ``params`` is not used.

    Raises:
        ValueError: As for `clip_by_global_norm`.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> tx = optclip.clip_by_leaf_norm(1.0)
        >>> grads = {"w": jnp.array([0.0, 4.0]), "b": jnp.array(0.5)}
        >>> updates, _ = tx.update(grads, tx.init(grads))
        >>> updates["w"].tolist(), float(updates["b"])
        ([0.0, 1.0], 0.5)
    """
    return clip_by_rule(
        fixed(max_norm, "max_norm"),
        scope=scopes.leaf(),
        ord=ord,
        action=hard(eps),
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )
