"""Clips norms to their moving mean plus a multiple of their standard deviation."""

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
    """Returns the Open-Sora-Plan rule: outliers are left out of the mean and deviation.

    The threshold is t = m + sigmas * s, where m and s are the moving mean and standard
    deviation of the norms. Norms above t are not recorded. The first step is not
    clipped and sets s = 0 and m = min(3 * n, first_cap). A norm that exceeds m by at
    most a millionth of m is never clipped, since s is 0 if all norms so far are equal.
    The rule is scale invariant if ``first_cap=inf``.

    Args:
        sigmas: Number of standard deviations above the mean, at least 0.
        decay: Decay rate of the averages, at least 0 and below 1.
        first_cap: Upper bound on the initial mean, greater than 0; may be inf. With the
            original value of 1.0 and ``escape_steps=None``, a run with norms above 1 is
            clipped to 1 permanently.
        escape_steps: Number of consecutive steps after which the rule restarts with m =
            3 * n. A step is counted if it is clipped or if its norm is below 1% of the
            mean. None disables the restart and the tolerance of a millionth of m, as in
            the original implementation.
        record_zeros: Whether norms of zero are recorded, as in the original
            implementation.

    Returns:
        A rule whose state holds two float32 and two int32 values per group.

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

    Updates u with norm n are scaled to u' = u * min(1, t / n) with t = m + sigmas * s,
    where m and s are the moving mean and standard deviation of the norms that were not
    clipped. See `optclip.rules.ema_sigma` for details. The method is scale invariant
    unless ``original`` is set.

    Args:
        sigmas: Number of standard deviations above the mean, at least 0.
        decay: Decay rate of the averages, at least 0 and below 1.
        scope: Which entries share one norm; a scope from `optclip.scopes`.
        original: Whether to follow the original implementation: divide by n + 1e-6,
            start with a mean of at most 1, record norms of zero, and never restart. A
            run with norms above 1 is then clipped to 1 permanently. If False, the
            initial mean is three times the first norm, and the statistics restart after
            50 consecutive clipped steps.
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
