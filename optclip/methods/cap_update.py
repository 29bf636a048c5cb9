"""Bounds updates relative to the parameters."""

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

    The update u is scaled to u' = u * min(1, ratio * max(w, floor) / r), where r and w
    are the root mean squares of the update and of the parameters. The ratio r / w is
    equal to the ratio of their norms.

    Chain this transformation last, after the learning rate. At that point, updates have
    the units of the parameters, so the same ratio suits any optimizer, loss and
    schedule. The bound prevents divergence caused by a learning rate that is too high,
    which gradient clipping cannot prevent.

    Args:
        ratio: Maximum ratio of the update to the parameters, at least 0. A value of 0
            sets all updates to zero, which stops training; inf disables the bound.
        floor: Lower bound on the root mean square of the parameters, at least 0, in the
            units of the parameters. It allows updates to parameters that are zero.
        scope: Which entries share one ratio; a scope from `optclip.scopes`.
        nonfinite: As in `optclip.clip_by_rule`.
        axis_name: As in `optclip.clip_by_rule`.
        update_dtype: As in `optclip.clip_by_rule`.

    Returns:
        A gradient transformation whose state is a `ClipState`; it requires ``params``.
        The norms in the state are root mean squares.

    Raises:
        ValueError: If an argument is negative or NaN, or if ``params`` are missing.

    Example:
        >>> import optax, optclip
        >>> tx = optax.chain(optax.adam(1e-3), optclip.cap_update(0.02))

    Reference:
        You et al., Large Batch Training of Convolutional Networks, 2017,
        https://arxiv.org/abs/1708.03888 (LARS, which sets the ratio bounded here)
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
