"""A bound on the update of a leaf, relative to its parameters."""

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
    """Bounds the final update to a share of the norm of the parameters.

    u' = u * min(1, ratio * max(w, floor) / r) with the root mean squares r of the
    update and w of the parameters; apart from the floor, the ratio of the norms. Put it
    last, after the learning rate: it is in the units of the parameters, so that one
    ratio fits any optimizer, loss and schedule. It prevents the divergence caused by a
    learning rate that is too high, which a clip of gradients can't see.

    Args:
        ratio: The largest ratio of update to parameters, at least 0. 0 gives zeros,
            which stops training; inf switches the cap off.
        floor: The smallest root mean square that parameters count with, at least 0, in
            the unit of the parameters, so that parameters that are zero can move.
        scope: Which entries share one ratio, from `optclip.scopes`.
        nonfinite: As in `optclip.clip_by_rule`.
        axis_name: As in `optclip.clip_by_rule`.
        update_dtype: As in `optclip.clip_by_rule`.

    Returns:
        A transformation with `ClipState`, whose norms are root mean squares; it needs
        ``params``.

    Raises:
        ValueError: If a number is negative or NaN, or ``params`` are missing.

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
