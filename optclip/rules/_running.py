"""Rules that follow the norm with running averages."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optclip import _checks
from optclip._numbers import increment, quotient
from optclip.rules._base import Limit, Rule
from optclip.rules._memory import (
    check_escape,
    first_run,
    in_a_row,
    one,
    recorded_norm,
    remembering,
    weight_of,
)

__all__ = [
    "DualState",
    "LevelState",
    "dual_ema",
    "ema_ratio",
    "previous_norm",
]

RECORDS = ("raw", "clipped")


class LevelState(NamedTuple):
    """State of `ema_ratio` and `max_ema`.

    Attributes:
        ema_norm: float32, one per group. The running average; 0 at first.
        recorded: int32, one per group. How many norms were recorded.
        clipped_run: int32, one per group. Consecutive steps on which the rule lost the
            norm; None with ``escape_steps=None``.
    """

    ema_norm: jax.Array
    recorded: jax.Array
    clipped_run: Any = None


def _counts(norm: jax.Array) -> jax.Array:
    return jnp.zeros(norm.shape, jnp.int32)


def _floats(norm: jax.Array) -> jax.Array:
    return jnp.zeros(norm.shape, jnp.float32)


def ema_ratio(
    ratio: jax.typing.ArrayLike,
    *,
    decay: jax.typing.ArrayLike,
    record: str = "clipped",
    warmup_steps: jax.typing.ArrayLike = 0,
    warmup_threshold: jax.typing.ArrayLike | None = None,
    eps: jax.typing.ArrayLike = 0.0,
    floor: jax.typing.ArrayLike = 0.0,
    escape_steps: int | None = 200,
    record_zeros: bool = False,
) -> Rule:
    """Returns the rule of AdaGC: a multiple of a running average of the norm.

    With the average g, the threshold is t = ratio * max(g, eps), and then
    g = decay * g + (1 - decay) * m, where m is the norm recorded; at the first step
    nothing is clipped and g = m. So g grows by at most ``decay + (1 - decay) * ratio``
    per step while clipped norms are recorded. ``decay=0`` limits the growth of the norm
    from one step to the next (Fira, APOLLO).

    With a ``warmup_threshold``, AdaGC's warm-up: in the first ``warmup_steps - 1``
    steps (at least one) all groups share the factor
    min(1, warmup_threshold / (n + eps)) with n the norm of the whole tree, and g is the
    smallest norm recorded.

    The rule is scale invariant: gradients times a constant have thresholds times that
    constant. ``eps``, ``floor`` and ``warmup_threshold`` are not: they have the unit of
    the norm.

    Args:
        ratio: The multiple, at least 0.
        decay: At least 0 and below 1.
        record: "clipped" or "raw": the norm after or before the clip.
        warmup_steps: See above.
        warmup_threshold: See above; None for no warm-up.
        eps: The smallest average that counts, at least 0; AdaGC has 1e-8.
        floor: The smallest threshold after the warm-up, at least 0.
        escape_steps: After so many consecutive steps that were clipped, or whose norm
            was at most a hundredth of the average, the average becomes the current
            norm. None: never, as in the original.
        record_zeros: Record norms of zero too, as the originals do: one zero gradient
            at the start then brings the threshold to about ``ratio * eps`` permanently.

    Returns:
        A rule with one float32 and two int32 per group.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> import optclip
        >>> rule = optclip.rules.ema_ratio(1.05, decay=0.98)
        >>> tx = optclip.clip(rule, scope=optclip.scopes.leaf())

    Reference:
        Wang et al., AdaGC: Improving Training Stability for Large Language Model
        Pretraining, 2025, https://arxiv.org/abs/2502.11034
    """
    _checks.non_negative(ratio=ratio, eps=eps)
    return _ema_ratio(
        ratio, lambda level: jnp.maximum(level, eps), decay=decay, record=record,
        warmup_steps=warmup_steps, warmup_threshold=warmup_threshold, eps=eps,
        floor=floor, escape_steps=escape_steps, record_zeros=record_zeros,
        name="ema_ratio",
    )  # fmt: skip


def _ema_ratio(
    ratio: Any, padded: Any, *, decay: Any, record: str, warmup_steps: Any,
    warmup_threshold: Any, eps: Any, floor: Any, escape_steps: Any, record_zeros: bool,
    name: str,
) -> Rule:  # fmt: skip
    """Returns the rule whose threshold is ``ratio * padded(average)``."""
    _checks.non_negative(floor=floor)
    _checks.decay(decay=decay)
    _checks.steps(warmup_steps=warmup_steps)
    _checks.one_of("record", record, RECORDS)
    check_escape(escape_steps)
    if warmup_threshold is not None:
        _checks.non_negative(warmup_threshold=warmup_threshold)

    def init(norm):
        return LevelState(_floats(norm), _counts(norm), first_run(norm, escape_steps))

    def update(norm, state, context):
        start = state.recorded == 0
        count = increment(state.recorded)
        threshold = jnp.maximum(ratio * padded(state.ema_norm), floor)
        warm: Any = jnp.zeros_like(start)
        if warmup_threshold is None:
            threshold = jnp.where(start, jnp.inf, threshold)
        else:
            warm = start | (count < warmup_steps)
            whole = context.tree_norm + eps
            above = whole > warmup_threshold
            # In this order: 1 / whole may be subnormal, and that is 0 to XLA.
            share = quotient(norm, jnp.where(above, whole, 1.0).astype(norm.dtype))
            early = jnp.where(
                above, share * jnp.where(above, warmup_threshold, 0.0), norm
            )
            threshold = jnp.where(warm, early, threshold)
        limit = one(threshold)
        seen = recorded_norm(norm, limit, record)
        level = decay * state.ema_norm + (1 - decay) * seen
        level = jnp.where(warm, jnp.minimum(state.ema_norm, seen), level)
        run, away = in_a_row(
            ~warm & (norm > threshold), norm, jnp.where(warm, 0.0, state.ema_norm),
            state.clipped_run, escape_steps,
        )  # fmt: skip
        level = jnp.where(start, seen, jnp.where(away, norm, level))
        return limit, LevelState(level, count, run)

    return remembering(init, update, name, zeros=record_zeros)


def previous_norm(
    growth: jax.typing.ArrayLike = 1.01,
    *,
    record: str = "clipped",
    eps: jax.typing.ArrayLike = 0.0,
    escape_steps: int | None = 200,
    record_zeros: bool = False,
) -> Rule:
    """Returns the rule that lets the norm grow by a factor from step to step.

    The threshold is t = growth * (s + eps) with s the norm of the step before; nothing
    is clipped at the first step. This is `ema_ratio` with ``decay=0``, except that
    ``eps`` is added to the norm, as in Fira and APOLLO. Scale invariant with ``eps=0``.

    Args:
        growth: The largest factor, at least 0.
        record: "clipped" or "raw": the norm after or before the clip.
        eps: Added to the norm of the step before, at least 0; the originals have 1e-8.
        escape_steps: As in `ema_ratio`.
        record_zeros: As in `ema_ratio`.

    Returns:
        A rule with one float32 and two int32 per group.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> import optclip
        >>> tx = optclip.clip(optclip.rules.previous_norm(1.01))

    Reference:
        Chen et al., Fira, 2024, https://arxiv.org/abs/2410.01623
    """
    _checks.non_negative(growth=growth, eps=eps)
    return _ema_ratio(
        growth, lambda level: level + eps, decay=0.0, record=record, warmup_steps=0,
        warmup_threshold=None, eps=eps, floor=0.0, escape_steps=escape_steps,
        record_zeros=record_zeros, name="previous_norm",
    )  # fmt: skip


class DualState(NamedTuple):
    """State of `dual_ema`.

    Attributes:
        fast_ema: float32, one per group. The fast average, not yet corrected for bias.
        slow_ema: float32, one per group. The slow one.
        recorded: int32, one per group. How many norms were recorded.
        clipped_run: int32, one per group. Consecutive steps on which the rule lost the
            norm; None with ``escape_steps=None``.
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
    record: str = "clipped",
    escape_steps: int | None = 50,
    record_zeros: bool = False,
) -> Rule:
    """Returns the rule with two averages: one tells when to clip, one how far.

    With bias-corrected averages s (slow) and f (fast) of the norms so far: where
    n > trigger * s, the group is scaled to the norm min(n, target * f). Nothing is
    clipped before a norm was recorded. Scale invariant.

    Args:
        trigger: Multiple of the slow average, at least 0.
        target: Multiple of the fast average, at least 0.
        fast_decay: At least 0 and below 1.
        slow_decay: At least 0 and below 1.
        record: "clipped" or "raw": the norm after or before the clip. "target", as the
            original: ``target * f`` where the group was clipped, even if n is less.
        escape_steps: After so many consecutive steps that were clipped, or whose norm
            was at most a hundredth of the slow average, both averages restart from the
            current norm. None: never, as in the original.
        record_zeros: Record norms of zero too.

    Returns:
        A rule with two float32 and two int32 per group.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> import optclip
        >>> tx = optclip.clip(optclip.rules.dual_ema())
    """
    _checks.non_negative(trigger=trigger, target=target)
    _checks.decay(fast_decay=fast_decay, slow_decay=slow_decay)
    _checks.one_of("record", record, (*RECORDS, "target"))
    check_escape(escape_steps)

    def init(norm):
        run = first_run(norm, escape_steps)
        return DualState(_floats(norm), _floats(norm), _counts(norm), run)

    def update(norm, state, context):
        del context
        start = state.slow_ema == 0  # nothing was recorded yet, or zeros only
        fast: Any = state.fast_ema / weight_of(fast_decay, state.recorded, norm.dtype)
        slow: Any = state.slow_ema / weight_of(slow_decay, state.recorded, norm.dtype)
        threshold = jnp.where(start, jnp.inf, trigger * slow)
        limit = Limit(threshold, jnp.minimum(target * fast, norm))
        run, away = in_a_row(
            norm > threshold, norm, jnp.where(start, 0.0, slow), state.clipped_run,
            escape_steps,
        )  # fmt: skip
        seen = recorded_norm(norm, limit, record)
        if record == "target":
            seen = jnp.where(norm > threshold, target * fast, norm)
        seen = jnp.where(away, norm, seen)
        old = [jnp.where(away, 0.0, e) for e in (state.fast_ema, state.slow_ema)]
        fast = fast_decay * old[0] + (1 - fast_decay) * seen
        slow = slow_decay * old[1] + (1 - slow_decay) * seen
        count = jnp.where(away, 1, increment(state.recorded))
        return limit, DualState(fast, slow, count, run)

    return remembering(init, update, "dual_ema", zeros=record_zeros)
