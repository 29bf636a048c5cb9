"""Clips updates by their global norm."""

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
    """Clips updates by their global norm.

    u' = u * min(1, max_norm / (n + eps)), where n is the norm of all updates,
    concatenated into a single vector. With ``eps=0``, the results match
    `optax.clip_by_global_norm` wherever Optax's results are accurate. With
    ``eps=1e-6``, they match ``torch.nn.utils.clip_grad_norm_``. The norm is accurate
    even if the squares of some entries overflow or underflow.

    Args:
        max_norm: The largest norm, at least 0: a number, an array or a schedule. A
            value of 0 sets all updates to zero, which stops training; inf disables
            clipping.
        ord: The order of the norm: a number that is at least 1, inf or "rms".
        eps: Value added to the norm, at least 0, in the units of the norm. Norms
            between ``max_norm - eps`` and ``max_norm`` are then also scaled down.
        nonfinite: As in `optclip.clip_by_rule`.
        axis_name: As in `optclip.clip_by_rule`.
        update_dtype: As in `optclip.clip_by_rule`.

    Returns:
        A gradient transformation whose state is a `ClipState`; ``params`` is not used.

    Raises:
        ValueError: If an argument is negative or NaN, or is not one of the allowed
            options.

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
