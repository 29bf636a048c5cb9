"""AdaClip (Stable-SPAM): clips entries above a moving average of the maximum."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optclip import scopes
from optclip._engine import validation
from optclip._engine.numerics import increment, quotient
from optclip._engine.rule import Limit, Rule
from optclip._engine.types import DType, NonfinitePolicy
from optclip.clipping import clip_by_rule
from optclip.methods._common import Clip
from optclip.methods._history import ema_weight_sum, guard_statistics

__all__ = ["MaximumState", "max_ema", "stable_spam_clip"]


class MaximumState(NamedTuple):
    """State of `max_ema`.

    Attributes:
        ema_maximum: float32 scalar, one per leaf. The moving average of the largest
            magnitude.
        recorded: int32 scalar, one per leaf. The number of updates so far.
    """

    ema_maximum: jax.Array
    recorded: jax.Array


def max_ema(decay: jax.typing.ArrayLike = 0.999, *, record_zeros: bool = False) -> Rule:
    """Returns the AdaClip rule, a moving average of the largest magnitude in a leaf.

    Let G be the largest magnitude in a leaf, and T the bias-corrected moving average of
    G, including the current step. An entry above T is multiplied by T / G, so the
    largest entry becomes T. Unlike clamping, this makes an entry just above T smaller
    than an entry just below T, as in the original implementation. G ignores entries
    that are NaN or infinite. An infinite entry becomes T.

    Args:
        decay: Decay rate of the average, at least 0 and below 1.
        record_zeros: Whether to record leaves that are all zero, as in the official
            code.

    Returns:
        A rule for `optclip.scopes.element`. Its state consists of one float32 value and
        one int32 value per leaf.

    Raises:
        ValueError: If ``decay`` is out of range.

    Example:
        >>> import optclip
        >>> entries = optclip.scopes.element()
        >>> tx = optclip.clip_by_rule(optclip.rules.max_ema(), scope=entries)

    Reference:
        Huang et al., Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam,
        2025, https://arxiv.org/abs/2502.17055
    """
    validation.decay(decay=decay)

    def init(norm):
        del norm
        return MaximumState(jnp.zeros([], jnp.float32), jnp.zeros([], jnp.int32))

    def update(norm, state, context):
        top = context.across(jnp.max(norm, initial=0.0))
        level = decay * state.ema_maximum + (1 - decay) * top
        count = increment(state.recorded)
        threshold = level / ema_weight_sum(decay, count, level.dtype)
        # At the first step, the average equals the maximum up to rounding.
        threshold = jnp.where(state.recorded == 0, top, threshold)
        # Divide each entry by the maximum before multiplying by the threshold. The
        # derivative of entries * (T / G) sums undivided entries, which might overflow.
        unit = jnp.broadcast_to(jnp.where(top > 0, top, 1.0), norm.shape)
        target = jnp.where(threshold < top, quotient(norm, unit) * threshold, norm)
        return Limit(threshold, target), MaximumState(level, count)

    rule = guard_statistics(init, update, "max_ema", zeros=record_zeros)
    return rule._replace(elements_only=True)


def stable_spam_clip(
    theta: jax.typing.ArrayLike = 0.999,
    *,
    original: bool = False,
    nonfinite: NonfinitePolicy = "propagate",
    axis_name: Any = None,
    update_dtype: DType = None,
) -> Clip:
    """Scales down entries above a moving average of the maximum of their leaf.

    If |u| > T, u' = u * T / G, where G is the largest magnitude in the leaf and T is
    the bias-corrected moving average of G, including the current step. This is AdaClip,
    the first half of Stable-SPAM. For the second half, chain `adagn` after it. The
    official code mistakenly resets the bias correction of T when the momentum is reset.
    This function follows the fixed version.

    Args:
        theta: Decay rate of the average, at least 0 and below 1.
        original: Whether to record leaves that are all zero, as in the official code.
        nonfinite: As in `optclip.clip_by_rule`.
        axis_name: As in `optclip.clip_by_rule`.
        update_dtype: As in `optclip.clip_by_rule`.

    Returns:
        A gradient transformation whose state is a `ClipState`; ``params`` is not used.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import optax, optclip
        >>> halves = optclip.stable_spam_clip(), optclip.adagn()
        >>> tx = optax.chain(*halves, optax.adam(1e-3))

    Reference:
        Huang et al., Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam,
        2025, https://arxiv.org/abs/2502.17055
    """
    validation.decay(theta=theta)
    rule = max_ema(theta, record_zeros=original)
    return clip_by_rule(
        rule._replace(name="stable_spam_clip"),
        scope=scopes.element(),
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )
