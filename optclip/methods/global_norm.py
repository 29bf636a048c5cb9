"""Clipping by the norm of all updates together."""

from __future__ import annotations

from typing import Any

import jax

from optclip._engine.thresholds import fixed
from optclip._engine.types import DType, NonfinitePolicy, Order
from optclip._engine.validation import EUCLIDEAN
from optclip.clipping import clip_by_rule
from optclip.methods._common import Clip, Threshold, hard

__all__ = ["clip_by_global_norm"]


def clip_by_global_norm(
    max_norm: Threshold,
    *,
    ord: Order = EUCLIDEAN,
    eps: jax.typing.ArrayLike = 0.0,
    nonfinite: NonfinitePolicy = "propagate",
    axis_name: Any = None,
    update_dtype: DType = None,
) -> Clip:
    """Scales all updates down together if their joint norm is above ``max_norm``.

    u' = u * min(1, max_norm / (n + eps)) with n the norm of all updates. With ``eps=0``
    this is what `optax.clip_by_global_norm` computes where that is right; with
    ``eps=1e-6``, ``torch.nn.utils.clip_grad_norm_``. Entries whose squares overflow or
    underflow are clipped like all others.

    Args:
        max_norm: The largest norm, at least 0: a number, an array or a schedule. 0
            gives zeros, which stops training; inf switches the clip off.
        ord: The norm's order: a number of at least 1, inf or "rms".
        eps: Added to the norm, at least 0, in the unit of the norm: norms that are not
            far above it are scaled down as well.
        nonfinite: As in `optclip.clip_by_rule`.
        axis_name: As in `optclip.clip_by_rule`.
        update_dtype: As in `optclip.clip_by_rule`.

    Returns:
        A transformation with `ClipState`; ``params`` is not used.

    Raises:
        ValueError: If a number is negative or NaN, or an option is not one of those
            named.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> tx = optclip.clip_by_global_norm(1.0)
        >>> grads = {"w": jnp.array([0.0, 3.0]), "b": jnp.array(4.0)}
        >>> updates, state = tx.update(grads, tx.init(grads))
        >>> round(float(updates["w"][1]), 6), round(float(updates["b"]), 6)
        (0.6, 0.8)

    Reference:
        Pascanu et al., On the difficulty of training recurrent neural
        networks, 2013, https://arxiv.org/abs/1211.5063
    """
    return clip_by_rule(
        fixed(max_norm, "max_norm"),
        ord=ord,
        action=hard(eps),
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )
