"""The clip of Stable-SPAM: entries above a running average of the largest."""

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
        ema_maximum: float32 scalar, one per leaf. Running average of the largest entry.
        recorded: int32 scalar, one per leaf. Updates so far.
    """

    ema_maximum: jax.Array
    recorded: jax.Array


def max_ema(decay: jax.typing.ArrayLike = 0.999, *, record_zeros: bool = False) -> Rule:
    """Returns the rule of Stable-SPAM's AdaClip: an average of a leaf's largest entry.

    With G the largest magnitude of a leaf and T the bias-corrected running average of
    G, this step's included, an entry above T is multiplied by T / G: the largest entry
    becomes T, and what lies between shrinks with it. (So this is not a clamp: an entry
    just above T ends below one just under it, as in the original.) Entries that are NaN
    or infinite do not count for G, and an infinite entry is brought to T.

    Args:
        decay: At least 0 and below 1.
        record_zeros: Record leaves that are zero too, as the official code.

    Returns:
        A rule for `optclip.scopes.element`, with one float32 and one int32 per leaf.

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
        # At the first step both are the same number, up to rounding.
        threshold = jnp.where(state.recorded == 0, top, threshold)
        # Entries are divided first: their sum, in a derivative, might overflow.
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
    """Brings entries above the running average of their leaf's maximum to it (AdaClip).

    With G the largest magnitude of a leaf and T its bias-corrected running average,
    this step's included: where |u| > T, u' = u * T / G. The first half of Stable-SPAM;
    chain `adagn` after it for the second. Official code resets T's correction by
    mistake when momentum is reset; this follows the fixed version.

    Args:
        theta: Decay of the average, at least 0 and below 1.
        original: Record leaves that are zero, as the official code does.
        nonfinite: As in `optclip.clip_by_rule`.
        axis_name: As in `optclip.clip_by_rule`.
        update_dtype: As in `optclip.clip_by_rule`.

    Returns:
        A transformation with `ClipState`; ``params`` is not used.

    Raises:
        ValueError: If a number is out of range.

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
