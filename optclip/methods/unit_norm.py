"""Clips each output unit (neuron or filter) by its norm."""

from __future__ import annotations

from typing import Any

import jax

from optclip import scopes
from optclip._engine.thresholds import fixed
from optclip._engine.types import Axis, DType, NonfinitePolicy, Order
from optclip._engine.validation import EUCLIDEAN
from optclip.clipping import clip_by_rule
from optclip.methods._common import Clip, Threshold, hard

__all__ = ["clip_by_unit_norm"]


def clip_by_unit_norm(
    max_norm: Threshold,
    *,
    axis: Axis = None,
    ord: Order = EUCLIDEAN,
    eps: jax.typing.ArrayLike = 0.0,
    nonfinite: NonfinitePolicy = "propagate",
    axis_name: Any = None,
    update_dtype: DType = None,
) -> Clip:
    """Clips each output unit (neuron or filter) by its norm.

    For each unit, u' = u * min(1, max_norm / (n + eps)), where n is the norm of the
    unit. By default, the norms of a matrix of shape [in, out] are taken over axis 0. A
    unit of an embedding of shape [vocab, dim] is then a column across the whole
    vocabulary, so a single row with a large gradient scales down all rows. To make each
    row a unit, pass ``axis={"embedding": 1}``.

    Args:
        max_norm: The largest norm of a unit, at least 0: a number or a schedule. A
            value of 0 sets all updates to zero, which stops training; inf disables
            clipping.
        axis: The axes over which the norm of a unit is taken, as in
            `optclip.scopes.unit`.
        ord: As in `clip_by_global_norm`.
        eps: As in `clip_by_global_norm`.
        nonfinite: As in `optclip.clip_by_rule`.
        axis_name: As in `optclip.clip_by_rule`, except that "auto" is not supported.
        update_dtype: As in `optclip.clip_by_rule`.

    Returns:
        A gradient transformation whose state is a `ClipState`; ``params`` is not used.

    Raises:
        ValueError: As for `clip_by_global_norm`, and in ``init`` if ``axis`` does not
            match the parameters.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> tx = optclip.clip_by_unit_norm(1.0)
        >>> grads = jnp.array([[0.0, 0.1], [4.0, 0.0]])  # [in, out]
        >>> tx.update(grads, tx.init(grads))[0].round(3).tolist()
        [[0.0, 0.10000000149011612], [1.0, 0.0]]
        >>> tx = optclip.clip_by_unit_norm(1.0, axis={"embedding": 1})
        >>> grads = {"embedding": jnp.array([[0.0, 0.5], [0.0, 8.0]])}  # [vocab, dim]
        >>> tx.update(grads, tx.init(grads))[0]["embedding"].tolist()
        [[0.0, 0.5], [0.0, 1.0]]
    """
    return clip_by_rule(
        fixed(max_norm, "max_norm"),
        scope=scopes.unit(axis),
        ord=ord,
        action=hard(eps),
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )
