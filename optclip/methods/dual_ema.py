"""Clips norms relative to their slow and fast moving averages."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from optclip import actions, scopes
from optclip._engine import validation
from optclip._engine.numerics import increment
from optclip._engine.rule import Limit, Rule
from optclip._engine.types import DType, NonfinitePolicy
from optclip.clipping import clip_by_rule
from optclip.methods._common import Clip, strict
from optclip.methods._history import (
    RECORDS,
    check_escape,
    count_consecutive,
    counts,
    ema_weight_sum,
    floats,
    guard_statistics,
    init_consecutive,
    recorded_norm,
)

__all__ = ["DualState", "dual_ema", "dual_ema_clip"]


class DualState(NamedTuple):
    """State of `dual_ema`.

    Attributes:
        fast_ema: float32, one per group. Fast moving average of the norm, without bias
            correction.
        slow_ema: float32, one per group. Slow moving average of the norm, without bias
            correction.
        recorded: int32, one per group. Number of norms recorded.
        clipped_run: int32, one per group. Number of consecutive steps that count
            toward ``escape_steps``; None if ``escape_steps=None``.
    """

    fast_ema: jax.Array
    slow_ema: jax.Array
    recorded: jax.Array
    clipped_run: Any = None


def dual_ema(
    trigger: jax.typing.ArrayLike = 2.0,
    target: jax.typing.ArrayLike = 1.1,
    *,
    fast_decay: jax.typing.ArrayLike = 0.9,
    slow_decay: jax.typing.ArrayLike = 0.99,
    record: Literal["raw", "clipped", "target"] = "clipped",
    escape_steps: int | None = 50,
    record_zeros: bool = False,
) -> Rule:
    """Returns a rule with separate averages for the trigger and the target.

    Let s (slow) and f (fast) be bias-corrected moving averages of the norms so far.
    A group with norm n > trigger * s is scaled to norm min(n, target * f). Groups are
    not clipped until a nonzero norm has been recorded. The rule is scale invariant.

    Args:
        trigger: Multiple of the slow average above which a group is clipped, at least
            0.
        target: Multiple of the fast average to which the group is clipped, at least 0.
        fast_decay: Decay rate of the fast average, at least 0 and below 1.
        slow_decay: Decay rate of the slow average, at least 0 and below 1.
        record: "clipped" records the norm after clipping, and "raw" the norm before
            clipping. "target" records ``target * f`` if the group was clipped, even if
            n is smaller, as in the original implementation.
        escape_steps: Number of consecutive steps after which both averages restart from
            the current norm. A step is counted if it is clipped or if its norm is below
            1% of the slow average. None disables the restart, as in the original
            implementation.
        record_zeros: Whether norms of zero are recorded.

    Returns:
        A rule whose state holds two float32 and two int32 values per group.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import optclip
        >>> tx = optclip.clip_by_rule(optclip.rules.dual_ema())
    """
    validation.non_negative(trigger=trigger, target=target)
    validation.decay(fast_decay=fast_decay, slow_decay=slow_decay)
    validation.one_of("record", record, (*RECORDS, "target"))
    check_escape(escape_steps)

    def init(norm):
        run = init_consecutive(norm, escape_steps)
        return DualState(floats(norm), floats(norm), counts(norm), run)

    def update(norm, state, context):
        del context
        start = state.slow_ema == 0  # no nonzero norm has been recorded yet
        fast: Any = state.fast_ema / ema_weight_sum(
            fast_decay, state.recorded, norm.dtype
        )
        slow: Any = state.slow_ema / ema_weight_sum(
            slow_decay, state.recorded, norm.dtype
        )
        threshold = jnp.where(start, jnp.inf, trigger * slow)
        limit = Limit(threshold, jnp.minimum(target * fast, norm))
        run, away = count_consecutive(
            norm > threshold,
            norm,
            jnp.where(start, 0.0, slow),
            state.clipped_run,
            escape_steps,
        )
        seen = recorded_norm(norm, limit, record)
        if record == "target":
            seen = jnp.where(norm > threshold, target * fast, norm)
        seen = jnp.where(away, norm, seen)
        old = [jnp.where(away, 0.0, e) for e in (state.fast_ema, state.slow_ema)]
        fast = fast_decay * old[0] + (1 - fast_decay) * seen
        slow = slow_decay * old[1] + (1 - slow_decay) * seen
        count = jnp.where(away, 1, increment(state.recorded))
        return limit, DualState(fast, slow, count, run)

    return guard_statistics(init, update, "dual_ema", zeros=record_zeros)


def dual_ema_clip(
    trigger: jax.typing.ArrayLike = 2.0,
    target: jax.typing.ArrayLike = 1.1,
    *,
    fast_decay: jax.typing.ArrayLike = 0.9,
    slow_decay: jax.typing.ArrayLike = 0.99,
    scope: scopes.Scope = scopes.tree(),
    original: bool = False,
    nonfinite: NonfinitePolicy = "propagate",
    axis_name: Any = None,
    update_dtype: DType = None,
) -> Clip:
    """Clips norms far above a slow moving average to just above a fast average.

    If the norm n of the updates u exceeds trigger * s, they are scaled to u' = u *
    min(1, target * f / n), where s (slow) and f (fast) are bias-corrected moving
    averages of the clipped norms. This rule is taken from the training code of
    PDE-Transformer. The first step is not clipped, and the method is scale invariant,
    unless ``original`` is set.

    Args:
        trigger: Multiple of the slow average above which norms are clipped, at least 0.
        target: Multiple of the fast average to which they are clipped, at least 0.
        fast_decay: Decay rate of the fast average, at least 0 and below 1.
        slow_decay: Decay rate of the slow average, at least 0 and below 1.
        scope: Which entries share one norm; a scope from `optclip.scopes`.
        original: Whether to follow the published code: clip a first norm above 10,000
            to 1, divide by n + 1e-6, record ``target * f`` for clipped norms even if n
            is smaller, record norms of zero, and never restart. If False, both averages
            restart after 50 consecutive clipped steps.
        nonfinite: As in `optclip.clip_by_rule`.
        axis_name: As in `optclip.clip_by_rule`.
        update_dtype: As in `optclip.clip_by_rule`.

    Returns:
        A gradient transformation whose state is a `ClipState`; ``params`` is not used.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import optclip
        >>> tx = optclip.dual_ema_clip()

    Reference:
        Holzschuh et al., PDE-Transformer: Efficient and Versatile Transformers for
        Physics Simulations, 2025, https://arxiv.org/abs/2505.24717
    """
    rule = dual_ema(
        trigger,
        target,
        fast_decay=fast_decay,
        slow_decay=slow_decay,
        record="target" if original else "clipped",
        escape_steps=None if original else 50,
        record_zeros=original,
    )
    if original:
        rule = _first_bounded(rule)
    return clip_by_rule(
        rule._replace(name="dual_ema_clip"),
        scope=scope,
        action=strict(1e-6) if original else actions.rescale,
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )


def _first_bounded(rule: Rule) -> Rule:
    """Returns `rules.dual_ema` with the published limits for the first norm.

    Until a nonzero norm is recorded, the published code clips norms above 10,000 to 1.
    """

    def update(norm, state, context):
        limit, after = rule.update(norm, state, context)
        start = state.slow_ema == 0
        threshold = jnp.where(start, 1e4, limit.threshold)
        target = jnp.where(start, 1.0, limit.target)
        return Limit(threshold, target), after

    return rule._replace(update=update)
