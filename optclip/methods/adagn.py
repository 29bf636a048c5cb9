"""AdaGN, of Stable-SPAM: the norm that Adam would make of the norm."""

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
        first_moment: float32, one per group. Running mean of the norm.
        second_root: float32, one per group. Root of the running mean of its square.
        recorded: int32, one per group. How many norms were recorded.
        clipped_run: int32, one per group. Consecutive steps on which the rule lost the
            norm; None with ``escape_steps=None``.
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
    """Returns the rule of AdaGN: the norm that Adam would make of the norm.

    The target is t = m / (sqrt(q) + eps) with bias-corrected running averages m of n
    and q of n**2, this step's included. Meant for `optclip.actions.normalize`, which
    scales every group to its target. With ``eps=0`` the targets do not depend on the
    scale of the gradients.

    Args:
        first_decay: Decay of m, at least 0 and below 1.
        second_decay: Decay of q, at least 0 and below 1.
        eps: Added to the root of q, at least 0; the original has 1e-8.
        escape_steps: A norm counts for at most a hundred times the root of q; and after
            so many consecutive steps on which it is above that, or at most a hundredth
            of the root, the averages restart. None: as in the original.
        record_zeros: Record norms of zero too.

    Returns:
        A rule with two float32 and two int32 per group.

    Raises:
        ValueError: If a number is out of range.

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
        # The moments are divided first: each over its weight may be above 3.4e38.
        weights = [
            ema_weight_sum(d, count, first.dtype) for d in (first_decay, second_decay)
        ]
        scale = jnp.sqrt(weights[1])
        size = root + eps * scale
        known = size > 0  # else all norms so far are 0, and any target will do
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
    """Gives each leaf the smoothed, normalised norm of its past (GradientStabilizer).

    u' = u / n * m / (sqrt(q) + eps) with bias-corrected averages m of n and q of n**2:
    the norm becomes about 1, less where it is unsteady. The norm of the gradient is
    lost, so put it before an optimizer that does not depend on it, such as Adam. This
    is AdaGN of Stable-SPAM; its AdaClip is `stable_spam_clip`, to be chained before it.

    Args:
        gamma1: Decay of m, at least 0 and below 1.
        gamma2: Decay of q, at least 0 and below 1.
        eps: Added to the root of q, at least 0. None: 0, or 1e-8 with ``original``.
        scope: Which entries share one norm, from `optclip.scopes`.
        original: Record every norm, zeros and outliers included, as the official code
            does: one extreme norm then shrinks the updates for hundreds of steps.
        nonfinite: As in `optclip.clip_by_rule`.
        axis_name: As in `optclip.clip_by_rule`.
        update_dtype: As in `optclip.clip_by_rule`.

    Returns:
        A transformation with `ClipState`; ``params`` is not used.

    Raises:
        ValueError: If a number is out of range.

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
