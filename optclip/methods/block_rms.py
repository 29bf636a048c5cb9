"""Adafactor: clips each leaf by its root mean square."""

from __future__ import annotations

from typing import Any

from optclip import scopes
from optclip._engine.thresholds import fixed
from optclip._engine.types import DType, NonfinitePolicy
from optclip.clipping import clip_by_rule
from optclip.methods._common import Clip, Threshold

__all__ = ["clip_by_block_rms"]


def clip_by_block_rms(
    threshold: Threshold = 1.0,
    *,
    nonfinite: NonfinitePolicy = "propagate",
    axis_name: Any = None,
    update_dtype: DType = None,
) -> Clip:
    """Clips each leaf by its root mean square (Adafactor).

    Each leaf u is scaled to u' = u / max(1, rms(u) / threshold). This is the update
    clipping of Adafactor, whose default is also ``threshold=1.0``. Chained after
    `optax.scale_by_adam`, it is close to the update clipping of StableAdamW,
    which measures the gradients divided by the same root, without momentum.

    Args:
        threshold: The maximum root mean square, at least 0: a number, an array with one
            entry per leaf, or a schedule. A threshold of 0 sets all updates to zero,
            which stops training; inf disables clipping.
        nonfinite: As in `optclip.clip_by_rule`.
        axis_name: As in `optclip.clip_by_rule`.
        update_dtype: As in `optclip.clip_by_rule`.

    Returns:
        A gradient transformation whose state is a `ClipState`; ``params`` is not used.

    Raises:
        ValueError: If ``threshold`` is negative or NaN.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> tx = optclip.clip_by_block_rms(1.0)
        >>> grads = jnp.array([2.0, -2.0])
        >>> tx.update(grads, tx.init(grads))[0].tolist()
        [1.0, -1.0]

    Reference:
        Shazeer and Stern, Adafactor, 2018, https://arxiv.org/abs/1804.04235
    """
    return clip_by_rule(
        fixed(threshold, "threshold"),
        scope=scopes.leaf(),
        ord="rms",
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )
