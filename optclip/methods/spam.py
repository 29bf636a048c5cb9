"""SPAM: clips entries that are large relative to their own second moment."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optclip import scopes
from optclip._engine import validation
from optclip._engine.numerics import increment
from optclip._engine.rule import Rule
from optclip._engine.types import DType, NonfinitePolicy
from optclip.clipping import clip_by_rule
from optclip.methods._common import Clip
from optclip.methods._history import (
    ema_weight_sum,
    guard_statistics,
    next_place,
    one,
    recorded_norm,
    rms_of_two,
)

__all__ = ["SecondMomentState", "second_moment", "spam_clip"]


class SecondMomentState(NamedTuple):
    """State of `second_moment`.

    Attributes:
        root_moment: float32, with the shape of the leaf. The square root of the moving
            mean square.
        recorded: int32, one per leaf. The number of updates so far. With
            ``reset_every``, the count is reduced by ``reset_every`` before it would
            exceed int32.
    """

    root_moment: jax.Array
    recorded: jax.Array


def second_moment(
    ratio: jax.typing.ArrayLike,
    *,
    decay: jax.typing.ArrayLike = 0.999,
    floor: jax.typing.ArrayLike = 0.0,
    debias: bool = False,
    warmup_steps: jax.typing.ArrayLike = 0,
    reset_every: jax.typing.ArrayLike | None = None,
    pass_unseen: bool = True,
) -> Rule:
    """Returns the rule of SPAM and AdamWClip, a multiple of the RMS of each entry.

    The threshold is t = max(ratio * sqrt(v), floor), where v is the moving mean square
    of the clipped entry. Each step updates v = decay * v + (1 - decay) * u'**2. The
    rule is scale invariant with ``floor=0``.

    Args:
        ratio: Ratio of the threshold to sqrt(v), at least 0; SPAM uses sqrt(5000).
        decay: Decay rate of v, at least 0 and below 1.
        floor: Lower bound on the threshold, at least 0, in the units of the entries.
        debias: Whether to divide v by 1 - decay**step. AdamWClip does this, but SPAM
            does not.
        warmup_steps: The number of the first update that may be clipped, counted from
            1. SPAM uses 20.
        reset_every: The number of updates between resets. At each update whose number
            is a multiple of ``reset_every``, v is reset to 0 and the warm-up restarts.
            None disables the reset.
        pass_unseen: Whether an entry whose v is 0 passes through unchanged. The
            original implementations clip it to ``floor``, so with ``floor=0`` an entry
            that has always been zero stays zero.

    Returns:
        A rule for `optclip.scopes.element`. Its state consists of one float32 value per
        entry and one int32 value per leaf.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import optclip
        >>> rule = optclip.rules.second_moment(3.0, debias=True)
        >>> tx = optclip.clip_by_rule(rule, scope=optclip.scopes.element())

    Reference:
        Huang et al., SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM
        Training, 2025, https://arxiv.org/abs/2501.06842
    """
    validation.non_negative(ratio=ratio, floor=floor)
    validation.decay(decay=decay)
    validation.steps(warmup_steps=warmup_steps)
    if reset_every is not None:
        validation.steps(reset_every=reset_every)
        validation.positive(reset_every=reset_every)

    def init(norm):
        root = jnp.zeros(norm.shape, jnp.float32)
        return SecondMomentState(root, jnp.zeros([], jnp.int32))

    def update(norm, state, context):
        del context
        root, earlier = state
        number: Any = increment(state.recorded)
        phase = number
        if reset_every is not None:
            period = jnp.asarray(reset_every).astype(jnp.int32)
            number = next_place(state.recorded, period)
            phase = number % period
            root = jnp.where(phase == 0, 0.0, root)
            earlier = jnp.where(number < period, earlier, phase)
        size: Any = root
        if debias:
            size = root / jnp.sqrt(ema_weight_sum(decay, earlier, root.dtype))
        threshold = jnp.maximum(ratio * size, floor)
        if pass_unseen:
            threshold = jnp.where(root > 0, threshold, jnp.inf)
        threshold = jnp.where(
            jnp.minimum(phase, number) < warmup_steps, jnp.inf, threshold
        )
        limit = one(threshold)
        root = rms_of_two(decay, root, recorded_norm(norm, limit, "clipped"))
        return limit, SecondMomentState(root, number)

    return guard_statistics(init, update, "second_moment", zeros=True)


def spam_clip(
    threshold: jax.typing.ArrayLike = 5000.0,
    *,
    decay: jax.typing.ArrayLike = 0.999,
    warmup_steps: jax.typing.ArrayLike = 20,
    reset_every: jax.typing.ArrayLike | None = None,
    original: bool = False,
    nonfinite: NonfinitePolicy = "propagate",
    axis_name: Any = None,
    update_dtype: DType = None,
) -> Clip:
    """Clips entries whose square is far above their moving mean square, as in SPAM.

    u' = sign(u) * min(|u|, sqrt(threshold * v)), where v is the moving mean square of
    the clipped entry. SPAM also resets the optimizer's momentum periodically. This
    function resets only v, every ``reset_every`` updates. The method is scale
    invariant.

    Args:
        threshold: The largest ratio of a squared entry to v, at least 0.
        decay: Decay rate of v, at least 0 and below 1, like ``b2`` in Adam.
        warmup_steps: The number of the first update that may be clipped, counted from
            1.
        reset_every: The number of updates after which v is reset and the warm-up
            restarts. SPAM uses 500. None disables the reset.
        original: Whether to follow the original implementation and set an entry to 0 if
            its v is 0. An entry that has no gradient during the warm-up then stays at
            zero.
        nonfinite: As in `optclip.clip_by_rule`.
        axis_name: As in `optclip.clip_by_rule`.
        update_dtype: As in `optclip.clip_by_rule`.

    Returns:
        A gradient transformation whose state is a `ClipState`; ``params`` is not used.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import optclip
        >>> tx = optclip.spam_clip(5000.0)

    Reference:
        Huang et al., SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM
        Training, 2025, https://arxiv.org/abs/2501.06842
    """
    validation.threshold(threshold=threshold)
    validation.steps(warmup_steps=warmup_steps)
    rule = second_moment(
        jnp.sqrt(threshold),
        decay=decay,
        warmup_steps=warmup_steps,
        reset_every=reset_every,
        pass_unseen=not original,
    )
    return clip_by_rule(
        rule._replace(name="spam_clip"),
        scope=scopes.element(),
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )
