"""Clips each entry of the updates to an interval."""

from __future__ import annotations

from typing import Any

import jax

from optclip import scopes
from optclip._engine.thresholds import fixed, interval
from optclip._engine.types import DType, NonfinitePolicy
from optclip.clipping import clip_by_rule
from optclip.methods._common import Clip, Threshold

__all__ = ["clip_by_value"]


def clip_by_value(
    max_value: Threshold | tuple[jax.typing.ArrayLike, jax.typing.ArrayLike],
    *,
    nonfinite: NonfinitePolicy = "propagate",
    axis_name: Any = None,
    update_dtype: DType = None,
    record: bool = False,
) -> Clip:
    """Clips each entry to [-max_value, max_value], or to [low, high].

    u' = sign(u) * min(|u|, max_value). The magnitude of a complex entry is bounded, and
    its phase is unchanged. Infinite entries are clipped to the bound. NaN stays NaN
    unless ``nonfinite`` is set to replace it.

    Args:
        max_value: The largest magnitude, at least 0: a number, an array or a schedule.
            For real updates, it can also be a pair (low, high) of numbers or arrays. A
            value of 0 sets all updates to zero, which stops training; inf disables
            clipping.
        nonfinite: As in `optclip.clip_by_rule`.
        axis_name: As in `optclip.clip_by_rule`.
        update_dtype: As in `optclip.clip_by_rule`.
        record: Whether to record statistics for `metrics` and `nonfinite_leaves`. The
            recorded norms are the largest magnitudes. Recording requires one more pass
            over the updates. Without it, XLA fuses the clipping into the optimizer
            update at no cost.

    Returns:
        A gradient transformation whose state is an `UnrecordedState`, or a `ClipState`
        if ``record`` is True; ``params`` is not used.

    Raises:
        ValueError: If a bound is negative or NaN, or ``low`` is above ``high``.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> tx = optclip.clip_by_value(1.0)
        >>> grads = jnp.array([-3.0, 0.5, 2.0])
        >>> tx.update(grads, tx.init(grads))[0].tolist()
        [-1.0, 0.5, 1.0]

    Reference:
        Mikolov, Statistical Language Models Based on Neural Networks, 2012.
    """
    if isinstance(max_value, (tuple, list)):
        if len(max_value) != 2:
            raise ValueError(
                "`max_value` must be a number or a pair (low, high), got "
                f"{max_value!r}."
            )
        rule = interval(*max_value)
    else:
        rule = fixed(max_value, "max_value")
    return clip_by_rule(
        rule,
        scope=scopes.element(),
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
        record=record,
    )
