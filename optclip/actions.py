"""Actions: what happens to a group, as the factor that it is multiplied by.

An action is a function ``(norm, limit) -> scale`` on arrays of norms. It must not
depend on the unit of length: ``scale(c * norm, c * limit) == scale(norm, limit)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp

from optclip._engine import validation
from optclip._engine.numerics import quotient
from optclip._engine.rule import Limit

__all__ = ["Action", "CurveName", "normalize", "rescale", "soften", "zero"]


Action = Callable[[jax.Array, Limit], jax.Array]
# The curves of `soften`.
CurveName: TypeAlias = Literal["rational", "tanh", "atan", "sqrt"]


def _ratio(where: jax.Array, target: jax.Array, norm: jax.Array) -> jax.Array:
    """Returns ``target / norm`` where that is asked, else 1; finite, also its slope."""
    asked = where & (norm > 0)
    target = jnp.where(asked, target, 1.0)
    scale = quotient(target, jnp.where(asked, norm, 1.0))
    largest = jnp.finfo(scale.dtype).max
    return jnp.where(scale < largest, scale, largest)


def rescale(
    norm: jax.Array, limit: Limit, *, eps: jax.typing.ArrayLike = 0.0
) -> jax.Array:
    """Brings a group whose norm is above its threshold to its target: hard clipping.

    The scale is ``target / (norm + eps)`` where ``norm + eps > threshold``, else 1.
    With ``eps=1e-6`` these are the numbers of ``torch.nn.utils.clip_grad_norm_``.

    Args:
        norm: The norms of the groups.
        limit: Their thresholds and targets.
        eps: Added to the norm, in the units of the norm.

    Returns:
        The scales, at most 1 where the target is at most the threshold.

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
    """Brings every group to its target, the small ones too; zero groups stay zero.

    The scale is ``target / (norm + eps)``, and 1 where the norm is zero.
    `optclip.clip_by_rule` leaves a group whose threshold is inf as it is, whatever the
    action.

    Args:
        norm: The norms of the groups.
        limit: Their thresholds (not used) and targets.
        eps: Added to the norm, in the units of the norm.

    Returns:
        The scales. A scale that would be infinite is the largest finite number.
    """
    return _ratio(norm > 0, limit.target, norm + eps)


def zero(norm: jax.Array, limit: Limit) -> jax.Array:
    """Drops a group whose norm is above its threshold: its scale is 0, else 1."""
    return jnp.where(norm > limit.threshold, 0.0, jnp.ones_like(norm))


# Each f has f(0) = 0, f'(0) = 1 and f(inf) = 1, so that short groups hardly change and
# none ends above its target.
_CURVES = {
    "rational": lambda r: r / (1 + r),
    "tanh": jnp.tanh,
    "atan": lambda r: (2 / jnp.pi) * jnp.arctan((jnp.pi / 2) * r),
    "sqrt": lambda r: r * jax.lax.rsqrt(1 + r * r),
}


def soften(kind: CurveName = "rational") -> Action:
    """Makes the action that shortens every group a little, and long ones to the target.

    With r = norm / target, a group is brought to ``target * f(r)``, where f(r) is

    | kind         | f(r)                  |
    | ------------ | --------------------- |
    | ``rational`` | r / (1 + r)           |
    | ``tanh``     | tanh(r)               |
    | ``atan``     | 2/pi * atan(pi/2 * r) |
    | ``sqrt``     | r / sqrt(1 + r^2)     |

    Args:
        kind: The curve.

    Returns:
        An action. Zero groups stay zero; with target 0 every group becomes zero, with
        target inf none changes.

    Raises:
        ValueError: If there is no such kind.

    Example:
        >>> import optclip
        >>> tx = optclip.clip_by_rule(1.0, action=optclip.actions.soften("tanh"))
    """
    validation.one_of("kind", kind, tuple(_CURVES))
    curve = _CURVES[kind]

    def action(norm, limit):
        target = jnp.broadcast_to(limit.target, norm.shape)
        usable = (norm > 0) & (target > 0) & (target < jnp.inf)
        # Beyond 1e6 every curve is flat, before it r * r is finite.
        far = usable & (norm > 1e6 * target)
        near = usable & ~far
        r = quotient(jnp.where(near, norm, 1.0), jnp.where(near, target, 1.0))
        visible = near & (r > 1e-12)
        r = jnp.where(visible, r, 1.0)
        scale = jnp.where(visible, curve(r) / r, 1.0)
        scale = jnp.where(far, _ratio(far, target, norm), scale)
        return jnp.where((norm > 0) & (target == 0), 0.0, scale)

    return action
