"""Soft clipping, without a kink at the threshold."""

from __future__ import annotations

from typing import Any

from optclip import actions, scopes
from optclip._engine.thresholds import fixed
from optclip._engine.types import DType, NonfinitePolicy, Order
from optclip._engine.validation import EUCLIDEAN
from optclip.actions import CurveName
from optclip.clipping import clip_by_rule
from optclip.methods._common import Clip, Threshold

__all__ = ["soft_clip"]


def soft_clip(
    max_norm: Threshold,
    *,
    kind: CurveName = "rational",
    scope: scopes.Scope = scopes.tree(),
    ord: Order = EUCLIDEAN,
    nonfinite: NonfinitePolicy = "propagate",
    axis_name: Any = None,
    update_dtype: DType = None,
) -> Clip:
    """Scales each group down smoothly so that its norm does not exceed ``max_norm``.

    With r = n / max_norm, a group of norm n is scaled to the norm ``max_norm * f(r)``,
    where f is one of the four curves of `optclip.actions.soften`. Unlike in hard
    clipping, the scale has no kink at the threshold. Every group is scaled down: groups
    with small norms only slightly, and groups with large norms strongly.

    Args:
        max_norm: Upper bound on the norm, at least 0: a number, an array or a schedule.
            A value of 0 sets all updates to zero, which stops training; inf disables
            clipping.
        kind: The name of the curve: "rational", "tanh", "atan" or "sqrt".
        scope: A scope from `optclip.scopes`, which determines the entries that share
            one norm.
        ord: As in `clip_by_global_norm`.
        nonfinite: As in `optclip.clip_by_rule`.
        axis_name: As in `optclip.clip_by_rule`.
        update_dtype: As in `optclip.clip_by_rule`.

    Returns:
        A gradient transformation whose state is a `ClipState`; ``params`` is not used.

    Raises:
        ValueError: If ``max_norm`` is negative or NaN, or ``kind`` is unknown.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> tx = optclip.soft_clip(1.0)
        >>> grads = jnp.array([0.0, 3.0])
        >>> tx.update(grads, tx.init(grads))[0].tolist()
        [0.0, 0.75]
    """
    return clip_by_rule(
        fixed(max_norm, "max_norm"),
        scope=scope,
        ord=ord,
        action=actions.soften(kind),
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )
