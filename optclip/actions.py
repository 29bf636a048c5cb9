"""Actions, which compute the scale of each group from its norm and limit.

An action is a function ``(norm, limit) -> scale`` that operates on arrays of norms. It
must be scale invariant: ``action(c * norm, c * limit) == action(norm, limit)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from optclip._engine import validation
from optclip._engine.numerics import quotient
from optclip._engine.rule import Limit

__all__ = ["Action", "CurveName", "normalize", "rescale", "soften", "zero"]


Action = Callable[[jax.Array, Limit], jax.Array]
# The names of the curves of `soften`.
CurveName: TypeAlias = Literal["rational", "tanh", "atan", "sqrt"]


def _ratio(where: jax.Array, target: jax.Array, norm: jax.Array) -> jax.Array:
    """Returns ``target / norm`` if ``where``, else 1. Its derivatives are finite."""
    divides = where & (norm > 0)
    target = jnp.where(divides, target, 1.0)
    scale = quotient(target, jnp.where(divides, norm, 1.0))
    largest = jnp.finfo(scale.dtype).max
    return jnp.where(scale < largest, scale, largest)


def rescale(
    norm: jax.Array, limit: Limit, *, eps: jax.typing.ArrayLike = 0.0
) -> jax.Array:
    """Scales groups with norms above their thresholds to their targets (hard clipping).

    The scale is ``target / (norm + eps)`` if ``norm + eps > threshold``, else 1. With
    ``eps=1e-6``, it matches ``torch.nn.utils.clip_grad_norm_``.

    Args:
        norm: The norms of the groups.
        limit: The thresholds and targets of the groups.
        eps: Value added to the norm, in the units of the norm.

    Returns:
        The scales. They are at most 1 if no target is above its threshold.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> limit = optclip.rules.Limit(jnp.float32(1.0), jnp.float32(1.0))
        >>> float(optclip.actions.rescale(jnp.float32(4.0), limit))
        0.25
    """
    padded = norm + eps
    return _ratio(padded > limit.threshold, limit.target, padded)


def normalize(
    norm: jax.Array, limit: Limit, *, eps: jax.typing.ArrayLike = 0.0
) -> jax.Array:
    """Scales every group to its target, even if its norm is below the target.

    The scale is ``target / (norm + eps)``, or 1 if the norm is zero, so that zero
    groups stay zero. `optclip.clip_by_rule` never changes a group whose threshold is
    inf, regardless of the action.

    Args:
        norm: The norms of the groups.
        limit: The thresholds (unused) and targets of the groups.
        eps: Value added to the norm, in the units of the norm.

    Returns:
        The scales. A scale that overflows is replaced by the largest finite number.
    """
    return _ratio(norm > 0, limit.target, norm + eps)


def zero(norm: jax.Array, limit: Limit) -> jax.Array:
    """Sets groups whose norm is above their threshold to zero; the scale is 0 or 1."""
    return jnp.where(norm > limit.threshold, 0.0, jnp.ones_like(norm))


# Each curve f is increasing with f(0) = 0, f'(0) = 1 and f(inf) = 1. Groups with small
# norms hardly change, and no clipped norm exceeds its target.
_CURVES: dict[CurveName, Callable[[jax.Array], jax.Array]] = {
    "rational": lambda r: r / (1 + r),
    "tanh": jnp.tanh,
    "atan": lambda r: (2 / jnp.pi) * jnp.arctan((jnp.pi / 2) * r),
    "sqrt": lambda r: r * jax.lax.rsqrt(1 + r * r),
}


def soften(kind: CurveName = "rational") -> Action:
    """Returns an action for soft clipping, in which no norm exceeds its target.

    Small norms hardly change, and large norms smoothly approach the target. A group is
    scaled to the norm ``target * f(r)``, where r = norm / target and f is one of these
    curves:

    | kind         | f(r)                  |
    | ------------ | --------------------- |
    | ``rational`` | r / (1 + r)           |
    | ``tanh``     | tanh(r)               |
    | ``atan``     | 2/pi * atan(pi/2 * r) |
    | ``sqrt``     | r / sqrt(1 + r^2)     |

    Args:
        kind: The name of the curve.

    Returns:
        An action. Zero groups stay zero. If the target of a group is 0, the group
        becomes zero. If the target is inf, the group does not change.

    Raises:
        ValueError: If ``kind`` is not the name of a curve.

    Example:
        >>> import optclip
        >>> tx = optclip.clip_by_rule(1.0, action=optclip.actions.soften("tanh"))
    """
    validation.one_of("kind", kind, get_args(CurveName))
    curve = _CURVES[kind]

    def action(norm, limit):
        target = jnp.broadcast_to(limit.target, norm.shape)
        usable = (norm > 0) & (target > 0) & (target < jnp.inf)
        # Above r = 1e6, the group is scaled to its target, since every curve is within
        # 1e-6 of 1. Below r = 1e6, r * r is finite.
        far = usable & (norm > 1e6 * target)
        near = usable & ~far
        r = quotient(jnp.where(near, norm, 1.0), jnp.where(near, target, 1.0))
        # Below r = 1e-12, the scale is 1, since f(r) / r is within 1e-12 of 1.
        changes = near & (r > 1e-12)
        r = jnp.where(changes, r, 1.0)
        scale = jnp.where(changes, curve(r) / r, 1.0)
        scale = jnp.where(far, _ratio(far, target, norm), scale)
        return jnp.where((norm > 0) & (target == 0), 0.0, scale)

    return action
