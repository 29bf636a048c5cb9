"""AdaGN from Stable-SPAM: Adam's normalization applied to the gradient norm."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optclip import actions, scopes
from optclip._engine import validation
from optclip._engine.numerics import increment, quotient
from optclip._engine.rule import Rule
from optclip._engine.types import DType, NonfinitePolicy
from optclip.clipping import clip_by_rule
from optclip.methods._common import Clip
from optclip.methods._history import (
    check_escape,
    count_consecutive,
    ema_weight_sum,
    guard_statistics,
    init_consecutive,
    one,
    rms_of_two,
)

__all__ = ["SmoothState", "adagn", "smoothed_norm"]


class SmoothState(NamedTuple):
    """State of `smoothed_norm`.

    Attributes:
        first_moment: float32, one per group. Moving average of the norm.
        second_root: float32, one per group. Square root of the moving average of the
            squared norm.
        recorded: int32, one per group. Number of norms recorded.
        clipped_run: int32, one per group. Number of consecutive steps that count
            toward ``escape_steps``; None if ``escape_steps=None``.
    """

    first_moment: jax.Array
    second_root: jax.Array
    recorded: jax.Array
    clipped_run: Any = None


def smoothed_norm(
    first_decay: jax.typing.ArrayLike = 0.7,
    *,
    second_decay: jax.typing.ArrayLike = 0.9,
    eps: jax.typing.ArrayLike = 0.0,
    escape_steps: int | None = 50,
    record_zeros: bool = False,
) -> Rule:
    """Returns the AdaGN rule: Adam's normalization applied to the norm.

    The target is t = m / (sqrt(q) + eps), where m and q are bias-corrected moving
    averages of the norm n and of n**2. Both include the current step. Use this rule
    with `optclip.actions.normalize`, which scales each group to its target. With
    ``eps=0``, the targets do not depend on the scale of the gradients.

    Args:
        first_decay: Decay rate of m, at least 0 and below 1.
        second_decay: Decay rate of q, at least 0 and below 1.
        eps: Added to sqrt(q), at least 0. The original implementation uses 1e-8.
        escape_steps: Number of consecutive steps after which the averages restart. A
            step counts if its norm is above 100 * sqrt(q) or below 0.01 * sqrt(q). A
            norm above 100 * sqrt(q) is recorded as 100 * sqrt(q). None disables both
            the restart and this bound, as in the original implementation.
        record_zeros: Whether norms of zero are recorded.

    Returns:
        A rule whose state holds two float32 and two int32 values per group.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import optclip
        >>> rule = optclip.rules.smoothed_norm()
        >>> tx = optclip.clip_by_rule(rule, action=optclip.actions.normalize)

    Reference:
        Huang et al., Stable-SPAM, 2025, https://arxiv.org/abs/2502.17055
    """
    validation.decay(first_decay=first_decay, second_decay=second_decay)
    validation.non_negative(eps=eps)
    check_escape(escape_steps)

    def init(norm):
        zeros, count = (
            jnp.zeros(norm.shape, jnp.float32),
            jnp.zeros(norm.shape, jnp.int32),
        )
        return SmoothState(
            zeros, zeros + 0, count, init_consecutive(norm, escape_steps)
        )

    def size_of(root, count):
        return root / jnp.sqrt(ema_weight_sum(second_decay, count, root.dtype))

    def update(norm, state, context):
        del context
        count = increment(state.recorded)
        size = size_of(state.second_root, state.recorded)
        known = size > 0
        run, away = count_consecutive(
            known & (norm > 100 * size), norm, size, state.clipped_run, escape_steps
        )
        value = norm
        if escape_steps is not None:
            value = jnp.minimum(norm, jnp.where(known, 100 * size, jnp.inf))
        old = [jnp.where(away, 0.0, x) for x in (state.first_moment, state.second_root)]
        count = jnp.where(away, 1, count)
        first: Any = first_decay * old[0] + (1 - first_decay) * value
        root = rms_of_two(second_decay, old[1], value)
        # Divide the moments by each other before the bias correction: a moment divided
        # by its weight sum may overflow.
        weights = [
            ema_weight_sum(d, count, first.dtype) for d in (first_decay, second_decay)
        ]
        scale = jnp.sqrt(weights[1])
        size = root + eps * scale
        # If ``size`` is 0, all norms so far are 0. Any target works in this case, since
        # groups with a norm of 0 are not scaled.
        known = size > 0
        target = quotient(jnp.where(known, first, 1.0), jnp.where(known, size, 1.0))
        target = target * (scale / weights[0])
        return one(target), SmoothState(first, root, count, run)

    return guard_statistics(init, update, "smoothed_norm", zeros=record_zeros)


def adagn(
    gamma1: jax.typing.ArrayLike = 0.7,
    *,
    gamma2: jax.typing.ArrayLike = 0.9,
    eps: jax.typing.ArrayLike | None = None,
    scope: scopes.Scope = scopes.leaf(),
    original: bool = False,
    nonfinite: NonfinitePolicy = "propagate",
    axis_name: Any = None,
    update_dtype: DType = None,
) -> Clip:
    """Scales each leaf to a smoothed, normalized norm (AdaGN, GradientStabilizer).

    Each leaf u with norm n is scaled to u' = u / n * m / (sqrt(q) + eps), where m and q
    are bias-corrected moving averages of n and n**2. The new norm is about 1, or
    smaller if n fluctuates. The original norm is lost, so use this transformation
    before an optimizer that does not depend on it, such as Adam. Stable-SPAM chains
    AdaGN after AdaClip, which is available as `stable_spam_clip`.

    Args:
        gamma1: Decay rate of m, at least 0 and below 1.
        gamma2: Decay rate of q, at least 0 and below 1.
        eps: Added to sqrt(q), at least 0. None means 0, or 1e-8 with ``original``.
        scope: Which entries share one norm; a scope from `optclip.scopes`.
        original: Whether to follow the official implementation, which records every
            norm, including zeros and outliers. A single extreme norm then shrinks the
            updates for hundreds of steps.
        nonfinite: As in `optclip.clip_by_rule`.
        axis_name: As in `optclip.clip_by_rule`.
        update_dtype: As in `optclip.clip_by_rule`.

    Returns:
        A gradient transformation whose state is a `ClipState`; ``params`` is not used.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import optclip
        >>> tx = optclip.adagn()

    Reference:
        Huang et al., Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam,
        2025, https://arxiv.org/abs/2502.17055
    """
    validation.decay(gamma1=gamma1, gamma2=gamma2)
    if eps is None:
        eps = 1e-8 if original else 0.0
    rule = smoothed_norm(
        gamma1,
        second_decay=gamma2,
        eps=eps,
        escape_steps=None if original else 50,
        record_zeros=original,
    )
    return clip_by_rule(
        rule._replace(name="adagn"),
        scope=scope,
        action=actions.normalize,
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )
