"""Rules that compare the norm with a running mean and standard deviation."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optclip import _checks
from optclip._numbers import root_of
from optclip.rules._base import Limit, Rule
from optclip.rules._memory import (
    check_escape,
    first_run,
    in_a_row,
    one,
    remembering,
    rms_of_two,
)

__all__ = ["ScoreState", "ema_sigma", "ema_zscore"]

MODES = ("zscore", "percentile")
OPTIONS = ("adaptive_scaling", "mean")


class ScoreState(NamedTuple):
    """State of `ema_zscore` and `ema_sigma`.

    Attributes:
        mean_norm: float32, one a group. Running mean of the norms; 0 at first.
        spread_norm: float32, one a group. Running standard deviation; 0 at first.
        recorded: int32, one a group. How many norms were recorded.
        clipped_run: int32, one a group. Lost steps in a row; None without an escape.
    """

    mean_norm: jax.Array
    spread_norm: jax.Array
    recorded: jax.Array
    clipped_run: Any = None


def first_score(norm: jax.Array, escape_steps: Any) -> ScoreState:
    """Returns the state that the rules with a mean and a spread begin with."""
    run = first_run(norm, escape_steps)
    return ScoreState(
        jnp.zeros(norm.shape, jnp.float32),
        jnp.zeros(norm.shape, jnp.float32),
        jnp.zeros(norm.shape, jnp.int32),
        run,
    )


def followed(state: ScoreState, value: jax.Array, decay: Any, count: Any, run: Any):
    """Returns the state after ``value``; the spread is taken from the new mean."""
    # In this form the weights add up to 1 in float32 too.
    step = value - state.mean_norm
    mean = state.mean_norm + (1 - decay) * step
    spread = rms_of_two(decay, state.spread_norm, decay * step)
    return ScoreState(mean, spread, count, run)


def ema_zscore(
    z_thresh: jax.typing.ArrayLike = 2.5,
    *,
    alpha: jax.typing.ArrayLike = 0.97,
    warmup_steps: jax.typing.ArrayLike = 25,
    max_grad_norm: jax.typing.ArrayLike | None = None,
    mode: str = "zscore",
    clip_option: str = "adaptive_scaling",
    clip_factor: jax.typing.ArrayLike = 1.0,
    skip_update_on_spike: bool = False,
    eps: jax.typing.ArrayLike = 1e-6,
    escape_steps: int | None = 50,
    record_zeros: bool = False,
) -> Rule:
    """Returns the rule of ZClip: what lies far above the running mean is a spike.

    With running mean m and standard deviation s of the norms recorded, and
    z = (n - m) / (s + eps), a group with z > z_thresh is brought to the norm

    | mode         | clip_option        | target                              |
    | ------------ | ------------------ | ----------------------------------- |
    | "zscore"     | "adaptive_scaling" | (m + z_thresh**2 * s / z) * factor  |
    | "zscore"     | "mean"             | m                                   |
    | "percentile" | either             | m + z_thresh * s, also the trigger  |

    and no group ends above ``max_grad_norm``. The target of a spike is recorded in its
    place: m = alpha * m + (1 - alpha) * x, s**2 = alpha * s**2 + (1 - alpha) *
    (x - m)**2 with the new m. In the first ``warmup_steps`` steps only
    ``max_grad_norm`` bounds, and m and s are those of the norms so far.

    The state holds s, not its square, so that it neither over- nor underflows.

    Args:
        z_thresh: The trigger, in standard deviations; above 0.
        alpha: Decay of the averages, at least 0 and below 1.
        warmup_steps: At least 1.
        max_grad_norm: A constant bound beside, at least 0; None for none.
        mode: "zscore" or "percentile".
        clip_option: "adaptive_scaling" or "mean".
        clip_factor: Factor of the target in "adaptive_scaling", above 0.
        skip_update_on_spike: Record nothing where there is a spike.
        eps: Added to s, at least 0.
        escape_steps: After so many steps in a row that are spikes, or whose norm is a
            hundredth of the mean or less, the rule begins anew, at its warm-up; and in
            the warm-up a norm counts for ten times the mean before it at most. None:
            as the original, which never leaves a spread of zero.
        record_zeros: Record norms of zero too, as the original.

    Returns:
        A rule with two float32 and two int32 a group.

    Raises:
        ValueError: If a number is out of range, or there is no such mode or option.

    Example:
        >>> import optclip
        >>> tx = optclip.clip(optclip.rules.ema_zscore(2.5))

    Reference:
        Kumar et al., ZClip: Adaptive Spike Mitigation for LLM Pre-Training, 2025,
        https://arxiv.org/abs/2504.02507
    """
    _checks.positive(
        z_thresh=z_thresh, clip_factor=clip_factor, warmup_steps=warmup_steps
    )
    _checks.non_negative(eps=eps)
    _checks.decay(alpha=alpha)
    _checks.steps(warmup_steps=warmup_steps)
    _checks.one_of("mode", mode, MODES)
    check_escape(escape_steps)
    _checks.one_of("clip_option", clip_option, OPTIONS)
    top = jnp.inf
    if max_grad_norm is not None:
        _checks.non_negative(max_grad_norm=max_grad_norm)
        top = max_grad_norm

    def spike_of(norm, state):
        mean, spread = state.mean_norm, state.spread_norm
        if mode == "percentile":
            return mean + z_thresh * spread, mean + z_thresh * spread
        trigger = mean + z_thresh * (spread + eps)
        if clip_option == "mean":
            return trigger, mean
        z = (norm - mean) / (spread + eps)
        share = z_thresh / jnp.where(z > 0, z, 1.0)
        return trigger, (mean + z_thresh * spread * share) * clip_factor

    def update(norm, state, context):
        del context
        warm = state.recorded < warmup_steps
        trigger, target = spike_of(norm, state)
        spike = ~warm & (norm > trigger)
        threshold = jnp.minimum(jnp.where(warm, jnp.inf, trigger), top)
        end = jnp.minimum(jnp.where(spike, jnp.minimum(target, norm), norm), top)
        count = state.recorded + 1
        run, away = in_a_row(
            spike, norm, jnp.where(warm, 0.0, state.mean_norm), state.clipped_run,
            escape_steps,
        )  # fmt: skip

        main = followed(state, jnp.where(spike, target, norm), alpha, count, run)
        if skip_update_on_spike:
            main = jax.tree.map(
                lambda old, new: jnp.where(spike, old, new), state, main
            )
            main = main._replace(clipped_run=run)
        # Welford's recursion, of the deviation itself.
        share = (count - 1).astype(norm.dtype) / count
        value = norm
        if escape_steps is not None:  # one wild norm must not set the scale
            bound = jnp.where(state.recorded > 0, 10 * state.mean_norm, jnp.inf)
            value = jnp.minimum(norm, bound)
        step = value - state.mean_norm
        mean = state.mean_norm + step / count
        spread = rms_of_two(share, state.spread_norm, step * root_of(share))
        early = ScoreState(mean, spread, count, run)
        fresh = ScoreState(norm, jnp.zeros_like(norm), jnp.ones_like(count), run)
        after = jax.tree.map(
            lambda f, e, m: jnp.where(away, f, jnp.where(warm, e, m)),
            fresh, early, main,
        )  # fmt: skip
        return Limit(threshold, end), after

    def init(norm):
        return first_score(norm, escape_steps)

    return remembering(init, update, "ema_zscore", zeros=record_zeros)


def ema_sigma(
    sigmas: jax.typing.ArrayLike = 3.0,
    *,
    decay: jax.typing.ArrayLike = 0.99,
    first_cap: jax.typing.ArrayLike = 1.0,
    escape_steps: int | None = 50,
    record_zeros: bool = False,
) -> Rule:
    """Returns the rule of Open-Sora-Plan: mean plus some deviations, without outliers.

    threshold t = m + sigmas * s with running mean m and standard deviation s; norms
    above it are not recorded. At the first step nothing is clipped, s = 0 and
    m = min(3 * n, first_cap).

    Args:
        sigmas: Standard deviations above the mean, at least 0.
        decay: At least 0 and below 1.
        first_cap: The largest mean to begin with; above 0, also inf. (With the
            original's 1.0, a run whose norms are above 1 is clipped to 1 for ever.)
        escape_steps: After so many steps in a row that were clipped, or whose norm was
            a hundredth of the mean or less, the rule begins anew, with m = 3 * n. None:
            never, as the original.
        record_zeros: Record norms of zero too, as the original.

    Returns:
        A rule with two float32 and two int32 a group.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> import optclip
        >>> tx = optclip.clip(optclip.rules.ema_sigma(3.0))

    Reference:
        Lin et al., Open-Sora Plan: Open-Source Large Video Generation Model, 2024,
        https://arxiv.org/abs/2412.00131
    """
    _checks.non_negative(sigmas=sigmas)
    _checks.positive(first_cap=first_cap)
    check_escape(escape_steps)
    _checks.decay(decay=decay)

    def init(norm):
        return first_score(norm, escape_steps)

    def update(norm, state, context):
        del context
        start = state.recorded == 0
        threshold = state.mean_norm + sigmas * state.spread_norm
        threshold = jnp.where(start, jnp.inf, threshold)
        over = norm > threshold
        run, away = in_a_row(
            over, norm, state.mean_norm, state.clipped_run, escape_steps
        )
        count = state.recorded + 1
        after = followed(state, norm, decay, count, run)
        mean = jnp.where(over, state.mean_norm, after.mean_norm)
        spread = jnp.where(over, state.spread_norm, after.spread_norm)
        tripled = jnp.minimum(3 * norm, jnp.finfo(jnp.float32).max)
        first = jnp.where(away, tripled, jnp.minimum(tripled, first_cap))
        mean = jnp.where(start | away, first, mean)
        spread = jnp.where(start | away, 0.0, spread)
        return one(threshold), ScoreState(mean, spread, count, run)

    return remembering(init, update, "ema_sigma", zeros=record_zeros)
