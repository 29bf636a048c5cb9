"""Bounds the update relative to the parameters."""

from __future__ import annotations

from typing import Any

import jax

from optclip import scopes
from optclip._engine.types import DType, NonfinitePolicy
from optclip.clipping import clip_by_rule
from optclip.methods._common import Clip
from optclip.methods.agc import relative_to_params

__all__ = ["cap_update"]


def cap_update(
    ratio: jax.typing.ArrayLike = 0.02,
    *,
    floor: jax.typing.ArrayLike = 1e-2,
    scope: scopes.Scope = scopes.tree(),
    nonfinite: NonfinitePolicy = "propagate",
    axis_name: Any = None,
    update_dtype: DType = None,
) -> Clip:
    """Bounds the final update relative to the norm of the parameters.

    u' = u * min(1, ratio * max(w, floor) / r) with the root mean squares r of the
    update and w of the parameters. Apart from the floor, r / w is the ratio of their
    norms. Chain it last, after the learning rate: there, updates have the units of the
    parameters, so the same ratio fits any optimizer, loss and schedule. It prevents the
    divergence caused by a learning rate that is too high, which clipping the gradients
    cannot prevent.

    Args:
        ratio: Largest ratio of the update to the parameters, at least 0. At 0, all
            updates are zero, which stops training; inf disables the cap.
        floor: Lower bound on the root mean square of the parameters, at least 0, in the
            units of the parameters, so that parameters that are zero can change.
        scope: Which entries share one ratio; a scope of `optclip.scopes`.
        nonfinite: As in `optclip.clip_by_rule`.
        axis_name: As in `optclip.clip_by_rule`.
        update_dtype: As in `optclip.clip_by_rule`.

    Returns:
        A gradient transformation whose state is a `ClipState`, in which norms are root
        mean squares; it needs ``params``.

    Raises:
        ValueError: If an argument is negative or NaN, or ``params`` are missing.

    Example:
        >>> import optax, optclip
        >>> tx = optax.chain(optax.adam(1e-3), optclip.cap_update(0.02))

    Reference:
        You et al., Large Batch Training of Convolutional Networks, 2017,
        https://arxiv.org/abs/1708.03888 (LARS, whose ratio this bounds)
    """
    rule = relative_to_params(ratio, floor=floor)
    return clip_by_rule(
        rule._replace(name="cap_update"),
        scope=scope,
        ord="rms",
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )
