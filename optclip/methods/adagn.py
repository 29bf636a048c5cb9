"""AdaGN of Stable-SPAM: Adam's normalization, applied to the gradient norm."""

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
            towards ``escape_steps``; None with ``escape_steps=None``.
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
    """Returns the rule of AdaGN: Adam's normalization, applied to the norm.

    The target is t = m / (sqrt(q) + eps) with the bias-corrected moving averages m of
    the norm n and q of n**2, both including this step. Use it with
    `optclip.actions.normalize`, which scales each group to its target. With ``eps=0``
    the targets do not depend on the scale of the gradients.

    Args:
        first_decay: Decay rate of m, at least 0 and below 1.
        second_decay: Decay rate of q, at least 0 and below 1.
        eps: Added to the root of q, at least 0; the original uses 1e-8.
        escape_steps: A norm is recorded as at most a hundred times the root of q. After
            this many consecutive steps whose norm is above that bound, or below a
            hundredth of the root, the averages restart. None disables both, as in the
            original.
        record_zeros: Whether norms of zero are recorded.

    Returns:
        A rule whose state is two float32 and two int32 values per group.

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
        # Divide the moments first: each of them, divided by its weight sum, may
        # overflow.
        weights = [
            ema_weight_sum(d, count, first.dtype) for d in (first_decay, second_decay)
        ]
        scale = jnp.sqrt(weights[1])
        size = root + eps * scale
        known = size > 0  # otherwise all norms so far are 0, and any target works
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

    u' = u / n * m / (sqrt(q) + eps) with the bias-corrected moving averages m of n and
    q of n**2. The new norm is about 1, and smaller where the norm fluctuates. The
    original norm is lost, so use this before an optimizer that does not depend on it,
    such as Adam. This is the AdaGN of Stable-SPAM; its AdaClip is `stable_spam_clip`,
    which is chained before it.

    Args:
        gamma1: Decay rate of m, at least 0 and below 1.
        gamma2: Decay rate of q, at least 0 and below 1.
        eps: Added to the root of q, at least 0. None: 0, or 1e-8 with ``original``.
        scope: Which entries share one norm; a scope of `optclip.scopes`.
        original: Follow the official code and record every norm, including zeros and
            outliers. One extreme norm then shrinks the updates for hundreds of steps.
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
