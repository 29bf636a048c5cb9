"""Clips each layer of scan-stacked leaves by its norm."""

from __future__ import annotations

from typing import Any

import jax

from optclip import scopes
from optclip._engine.thresholds import fixed
from optclip._engine.types import DType, NonfinitePolicy, Order, StackAxes
from optclip._engine.validation import EUCLIDEAN
from optclip.clipping import clip_by_rule
from optclip.methods._common import Clip, Threshold, hard

__all__ = ["clip_per_layer"]


def clip_per_layer(
    max_norm: Threshold,
    stack_axes: StackAxes,
    *,
    ord: Order = EUCLIDEAN,
    eps: jax.typing.ArrayLike = 0.0,
    nonfinite: NonfinitePolicy = "propagate",
    axis_name: Any = None,
    update_dtype: DType = None,
) -> Clip:
    """Clips each layer of scan-stacked leaves by its norm.

    This is `clip_by_leaf_norm` for models whose layers are stacked for
    ``jax.lax.scan``. Each layer of a leaf of shape [layers, ...] is clipped as if it
    were a separate leaf.

    Args:
        max_norm: The largest norm of a layer, at least 0: a number, an array or a
            schedule. A value of 0 sets all updates to zero, which stops training; inf
            disables clipping.
        stack_axes: The number of leading axes that index layers: an int for all leaves,
            a function of the path, or a mapping from regular expressions to ints.
        ord: As in `clip_by_global_norm`.
        eps: As in `clip_by_global_norm`.
        nonfinite: As in `optclip.clip_by_rule`.
        axis_name: As in `optclip.clip_by_rule`.
        update_dtype: As in `optclip.clip_by_rule`.

    Returns:
        A gradient transformation whose state is a `ClipState`; ``params`` is not used.

    Raises:
        ValueError: As for `clip_by_global_norm`. In ``init``, if a leaf has too few
            axes.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> tx = optclip.clip_per_layer(1.0, {"blocks": 1})
        >>> grads = {"blocks": jnp.array([[0.0, 2.0], [0.0, 0.5]])}
        >>> tx.update(grads, tx.init(grads))[0]["blocks"].tolist()
        [[0.0, 1.0], [0.0, 0.5]]
    """
    return clip_by_rule(
        fixed(max_norm, "max_norm"),
        scope=scopes.layer(stack_axes),
        ord=ord,
        action=hard(eps),
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )
