"""Clips to the moving mean of the norm plus standard deviations."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from optclip import actions, scopes
from optclip._engine import validation
from optclip._engine.numerics import increment
from optclip._engine.rule import Limit, Rule
from optclip._engine.types import DType, NonfinitePolicy
from optclip.clipping import clip_by_rule
from optclip.methods._common import Clip, strict
from optclip.methods._history import check_escape, count_consecutive, guard_statistics
from optclip.methods.zclip import ROUNDING, ScoreState, first_score, followed

__all__ = ["ema_sigma", "ema_sigma_clip"]


def ema_sigma(
    sigmas: jax.typing.ArrayLike = 3.0,
    *,
    decay: jax.typing.ArrayLike = 0.99,
    first_cap: jax.typing.ArrayLike = 1.0,
    escape_steps: int | None = 50,
    record_zeros: bool = False,
) -> Rule:
    """Returns the rule of Open-Sora-Plan: mean plus deviations, excluding outliers.

    The threshold is t = m + sigmas * s with the moving mean m and standard deviation s
    of the norms; norms above t are not recorded. The first step is not clipped, and
    sets s = 0 and m = min(3 * n, first_cap). A norm that exceeds m by at most a
    millionth of m is never clipped, since s is 0 where all norms so far were equal. The
    rule is scale invariant with ``first_cap=inf``.

    Args:
        sigmas: Number of standard deviations above the mean, at least 0.
        decay: Decay rate of the averages, at least 0 and below 1.
        first_cap: Upper bound on the initial mean, above 0; may be inf. With the
            original's 1.0 and ``escape_steps=None``, a run whose norms are above 1 is
            clipped to 1 permanently.
        escape_steps: After this many consecutive steps that were clipped, or whose norm
            was below a hundredth of the mean, the rule restarts with m = 3 * n. None
            disables this, as in the original, and also clips norms that exceed m by
            less than a millionth of m.
        record_zeros: Whether norms of zero are recorded, as in the original.

    Returns:
        A rule whose state is two float32 and two int32 values per group.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import optclip
        >>> tx = optclip.clip_by_rule(optclip.rules.ema_sigma(3.0))

    Reference:
        Lin et al., Open-Sora Plan: Open-Source Large Video Generation Model, 2024,
        https://arxiv.org/abs/2412.00131
    """
    validation.non_negative(sigmas=sigmas)
    validation.positive(first_cap=first_cap)
    check_escape(escape_steps)
    validation.decay(decay=decay)

    def init(norm):
        return first_score(norm, escape_steps)

    def update(norm, state, context):
        del context
        start = state.recorded == 0
        target = state.mean_norm + sigmas * state.spread_norm
        threshold = target
        if escape_steps is not None:
            threshold = jnp.maximum(target, state.mean_norm * (1 + ROUNDING))
        threshold = jnp.where(start, jnp.inf, threshold)
        over = norm > threshold
        run, away = count_consecutive(
            over, norm, state.mean_norm, state.clipped_run, escape_steps
        )
        count = increment(state.recorded)
        after = followed(state, norm, decay, count, run)
        mean = jnp.where(over, state.mean_norm, after.mean_norm)
        spread = jnp.where(over, state.spread_norm, after.spread_norm)
        tripled = jnp.minimum(3 * norm, float(jnp.finfo(jnp.float32).max))
        first = jnp.where(away, tripled, jnp.minimum(tripled, first_cap))
        mean = jnp.where(start | away, first, mean)
        spread = jnp.where(start | away, 0.0, spread)
        return Limit(threshold, target), ScoreState(mean, spread, count, run)

    return guard_statistics(init, update, "ema_sigma", zeros=record_zeros)


def ema_sigma_clip(
    sigmas: jax.typing.ArrayLike = 3.0,
    *,
    decay: jax.typing.ArrayLike = 0.99,
    scope: scopes.Scope = scopes.tree(),
    original: bool = False,
    nonfinite: NonfinitePolicy = "propagate",
    axis_name: Any = None,
    update_dtype: DType = None,
) -> Clip:
    """Clips norms to their moving mean plus three standard deviations (Open-Sora-Plan).

    u' = u * min(1, t / n) with t = m + sigmas * s where m and s are the moving mean and
    standard deviation of the norms that were not clipped (see
    `optclip.rules.ema_sigma`). The method is scale invariant unless ``original`` is
    set.

    Args:
        sigmas: Number of standard deviations above the mean, at least 0.
        decay: Decay rate of the averages, at least 0 and below 1.
        scope: Which entries share one norm; a scope of `optclip.scopes`.
        original: Follow the original: divide by n + 1e-6, start with a mean of at most
            1, record norms of zero, and never restart. A run whose norms are above 1 is
            clipped to 1 permanently. If False, the first mean is three times the first
            norm, and the statistics restart after 50 consecutive clipped steps.
        nonfinite: As in `optclip.clip_by_rule`.
        axis_name: As in `optclip.clip_by_rule`.
        update_dtype: As in `optclip.clip_by_rule`.

    Returns:
        A gradient transformation whose state is a `ClipState`; ``params`` is not used.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import optclip
        >>> tx = optclip.ema_sigma_clip(3.0)

    Reference:
        Lin et al., Open-Sora Plan: Open-Source Large Video Generation Model, 2024,
        https://arxiv.org/abs/2412.00131
    """
    rule = ema_sigma(
        sigmas,
        decay=decay,
        first_cap=1.0 if original else float("inf"),
        escape_steps=None if original else 50,
        record_zeros=original,
    )
    return clip_by_rule(
        rule._replace(name="ema_sigma_clip"),
        scope=scope,
        action=strict(1e-6) if original else actions.rescale,
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )
