"""ZClip: clips norms with a high z-score relative to the previous norms."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp

from optclip import actions, scopes
from optclip._engine import validation
from optclip._engine.numerics import increment, quotient, root_of
from optclip._engine.rule import Limit, Rule
from optclip._engine.types import DType, NonfinitePolicy
from optclip.clipping import clip_by_rule
from optclip.methods._common import Clip, strict
from optclip.methods._history import (
    check_escape,
    count_consecutive,
    guard_statistics,
    init_consecutive,
    rms_of_two,
)

__all__ = ["ScoreState", "ema_zscore", "zclip"]

Mode: TypeAlias = Literal["zscore", "percentile"]
ClipOption: TypeAlias = Literal["adaptive_scaling", "mean"]
# Fraction of the mean that is added to the standard deviation, so that a norm that
# exceeds the mean only by rounding is not a spike. The standard deviation alone is 0 if
# all previous norms were equal.
ROUNDING = 1e-6


class ScoreState(NamedTuple):
    """State of `ema_zscore` and `ema_sigma`.

    Attributes:
        mean_norm: float32, one per group. The moving average of the norms; initially 0.
        spread_norm: float32, one per group. The moving standard deviation of the norms;
            initially 0.
        recorded: int32, one per group. The number of norms recorded so far.
        clipped_run: int32, one per group. The number of consecutive steps that count
            toward ``escape_steps``; None if ``escape_steps`` is None.
    """

    mean_norm: jax.Array
    spread_norm: jax.Array
    recorded: jax.Array
    clipped_run: Any = None


def first_score(norm: jax.Array, escape_steps: Any) -> ScoreState:
    """Returns the initial `ScoreState`, in which no norm has been recorded."""
    run = init_consecutive(norm, escape_steps)
    return ScoreState(
        jnp.zeros(norm.shape, jnp.float32),
        jnp.zeros(norm.shape, jnp.float32),
        jnp.zeros(norm.shape, jnp.int32),
        run,
    )


def followed(state: ScoreState, value: jax.Array, decay: Any, count: Any, run: Any):
    """Returns the state after recording ``value``."""
    # Written this way, the weights of the average sum to 1 even in float32. The spread
    # is computed relative to the new mean.
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
    mode: Mode = "zscore",
    clip_option: ClipOption = "adaptive_scaling",
    clip_factor: jax.typing.ArrayLike = 1.0,
    skip_update_on_spike: bool = False,
    eps: jax.typing.ArrayLike | None = None,
    escape_steps: int | None = 50,
    record_zeros: bool = False,
) -> Rule:
    """Returns the rule of ZClip, which scales down norms far above the moving mean.

    Let n be the norm of a group, m and s the moving mean and standard deviation of the
    recorded norms, and z = (n - m) / (s + eps). A group with z > z_thresh is a spike,
    and it is scaled to the target norm:

    | mode         | clip_option        | target                                  |
    | ------------ | ------------------ | --------------------------------------- |
    | "zscore"     | "adaptive_scaling" | (m + z_thresh**2 * s / z) * clip_factor |
    | "zscore"     | "mean"             | m                                       |
    | "percentile" | either             | m + z_thresh * s                        |

    In mode "percentile", the target is also the norm above which a group is a spike.
    The norm of every group is also bounded by ``max_grad_norm``.

    The recorded value x is the norm of the group, or the target if the group is a
    spike. Each step updates m = alpha * m + (1 - alpha) * x, and then, with the new m,
    s**2 = alpha * s**2 + (1 - alpha) * (x - m)**2. In the first ``warmup_steps`` steps,
    only ``max_grad_norm`` applies, and m and s are the mean and standard deviation of
    all norms so far.

    The rule is scale invariant with the default ``eps`` and without ``max_grad_norm``,
    which has the units of the norm. The state stores s instead of s**2, because s**2
    could overflow or underflow.

    Args:
        z_thresh: The z-score above which a norm is a spike, greater than 0.
        alpha: Decay rate of the averages, at least 0 and below 1.
        warmup_steps: Number of warm-up steps, at least 1.
        max_grad_norm: An additional constant bound on the norm, at least 0. None means
            that there is no such bound.
        mode: "zscore" or "percentile".
        clip_option: "adaptive_scaling" or "mean".
        clip_factor: Factor that multiplies the target in "adaptive_scaling", above 0.
        skip_update_on_spike: Whether to leave spikes out of the statistics.
        eps: Value added to s in mode "zscore", at least 0, in the units of the norm.
            The original implementation uses 1e-6. None adds 1e-6 * m in both modes, so
            that a norm that exceeds a constant mean only by rounding is not a spike.
        escape_steps: Number of consecutive steps after which the rule restarts with its
            warm-up. A step is counted if it is a spike or if its norm is below 1% of
            the mean. During the warm-up, each norm is capped at ten times the previous
            mean before it is recorded. None disables the restart and the cap, as in the
            original implementation, in which a standard deviation of zero stays zero.
        record_zeros: Whether to record norms of zero, as in the original
            implementation.

    Returns:
        A rule whose state consists of two float32 and two int32 values per group.

    Raises:
        ValueError: If an argument is out of range, or ``mode`` or ``clip_option`` is
            unknown.

    Example:
        >>> import optclip
        >>> tx = optclip.clip_by_rule(optclip.rules.ema_zscore(2.5))

    Reference:
        Kumar et al., ZClip: Adaptive Spike Mitigation for LLM Pre-Training, 2025,
        https://arxiv.org/abs/2504.02507
    """
    validation.positive(
        z_thresh=z_thresh, clip_factor=clip_factor, warmup_steps=warmup_steps
    )
    if eps is not None:
        validation.non_negative(eps=eps)
    validation.decay(alpha=alpha)
    validation.steps(warmup_steps=warmup_steps)
    validation.one_of("mode", mode, get_args(Mode))
    check_escape(escape_steps)
    validation.one_of("clip_option", clip_option, get_args(ClipOption))
    top = jnp.inf
    if max_grad_norm is not None:
        validation.non_negative(max_grad_norm=max_grad_norm)
        top = max_grad_norm

    def spike_of(norm, state):
        mean, spread = state.mean_norm, state.spread_norm
        size = spread + (ROUNDING * mean if eps is None else eps)
        trigger = mean + z_thresh * size
        if mode == "percentile":
            target = mean + z_thresh * spread
            return (trigger if eps is None else target), target
        if clip_option == "mean":
            return trigger, mean
        above = (norm > trigger) & (size > 0)
        z = quotient(jnp.where(above, norm - mean, 1.0), jnp.where(above, size, 1.0))
        return trigger, (mean + z_thresh * spread * (z_thresh / z)) * clip_factor

    def update(norm, state, context):
        del context
        warm = state.recorded < warmup_steps
        trigger, target = spike_of(norm, state)
        spike = ~warm & (norm > trigger)
        threshold = jnp.minimum(jnp.where(warm, jnp.inf, trigger), top)
        end = jnp.minimum(jnp.where(spike, jnp.minimum(target, norm), norm), top)
        count = increment(state.recorded)
        run, away = count_consecutive(
            spike,
            norm,
            jnp.where(warm, 0.0, state.mean_norm),
            state.clipped_run,
            escape_steps,
        )

        main = followed(state, jnp.where(spike, target, norm), alpha, count, run)
        if skip_update_on_spike:
            main = jax.tree.map(
                lambda old, new: jnp.where(spike, old, new), state, main
            )
            main = main._replace(clipped_run=run)
        # Welford's algorithm for the mean of all norms, with the standard deviation
        # instead of the variance.
        number = count.astype(norm.dtype)
        share = (number - 1) / number
        value = norm
        if escape_steps is not None:  # limit the effect of a single outlier
            bound = jnp.where(state.recorded > 0, 10 * state.mean_norm, jnp.inf)
            value = jnp.minimum(norm, bound)
        step = value - state.mean_norm
        mean = state.mean_norm + step / number
        spread = rms_of_two(share, state.spread_norm, step * root_of(share))
        early = ScoreState(mean, spread, count, run)
        fresh = ScoreState(norm, jnp.zeros_like(norm), jnp.ones_like(count), run)
        after = jax.tree.map(
            lambda f, e, m: jnp.where(away, f, jnp.where(warm, e, m)),
            fresh,
            early,
            main,
        )
        return Limit(threshold, end), after

    def init(norm):
        return first_score(norm, escape_steps)

    return guard_statistics(init, update, "ema_zscore", zeros=record_zeros)


def zclip(
    z_thresh: jax.typing.ArrayLike = 2.5,
    *,
    alpha: jax.typing.ArrayLike = 0.97,
    warmup_steps: jax.typing.ArrayLike = 25,
    max_grad_norm: jax.typing.ArrayLike | None = 1.0,
    clip_option: ClipOption = "adaptive_scaling",
    mode: Mode = "zscore",
    clip_factor: jax.typing.ArrayLike = 1.0,
    skip_update_on_spike: bool = False,
    scope: scopes.Scope = scopes.tree(),
    original: bool = False,
    nonfinite: NonfinitePolicy = "propagate",
    axis_name: Any = None,
    update_dtype: DType = None,
) -> Clip:
    """Clips norms that are many standard deviations above their moving mean (ZClip).

    Let n be the norm, m and s its moving mean and standard deviation, and
    z = (n - m) / s. If z > z_thresh, the norm is a spike and u' = u * t / n, where
    t = m + z_thresh**2 * s / z. Larger spikes are therefore clipped closer to the mean.
    `optclip.rules.ema_zscore` lists the formulas for all options. If the paper and the
    official code differ, the formulas follow the code.

    With the published value ``max_grad_norm=1.0``, all norms above 1 are also clipped
    to 1, as in `clip_by_global_norm`. Pass None to use only the z-score, which is scale
    invariant.

    Args:
        z_thresh: The z-score above which a norm is a spike, greater than 0.
        alpha: Decay rate of the averages, at least 0 and below 1.
        warmup_steps: Number of initial steps in which only ``max_grad_norm`` applies,
            at least 1.
        max_grad_norm: An additional constant bound on the norm, at least 0, in the
            units of the gradient. None means that there is no such bound.
        clip_option: The norm that a spike is scaled to, "adaptive_scaling" or "mean".
        mode: "zscore", or "percentile" to use t = m + z_thresh * s.
        clip_factor: Factor that multiplies t in "adaptive_scaling", above 0.
        skip_update_on_spike: Whether to leave spikes out of the statistics.
        scope: A scope from `optclip.scopes`, which determines the entries that share
            one norm.
        original: Whether to follow the original implementation: record norms of zero,
            add 1e-6 to s and n, and never restart. If False, the statistics restart
            after 50 consecutive norms that are spikes or at most m / 100, and 1e-6 * m
            is added to s, which keeps the z-score scale invariant.
        nonfinite: As in `optclip.clip_by_rule`.
        axis_name: As in `optclip.clip_by_rule`.
        update_dtype: As in `optclip.clip_by_rule`.

    Returns:
        A gradient transformation whose state is a `ClipState`; ``params`` is not used.

    Raises:
        ValueError: If an argument is out of range, or ``mode`` or ``clip_option`` is
            unknown.

    Example:
        >>> import optax, optclip
        >>> tx = optax.chain(optclip.zclip(max_grad_norm=None), optax.adamw(3e-4))

    Reference:
        Kumar et al., ZClip: Adaptive Spike Mitigation for LLM Pre-Training, 2025,
        https://arxiv.org/abs/2504.02507
    """
    rule = ema_zscore(
        z_thresh,
        alpha=alpha,
        warmup_steps=warmup_steps,
        max_grad_norm=max_grad_norm,
        mode=mode,
        clip_option=clip_option,
        clip_factor=clip_factor,
        skip_update_on_spike=skip_update_on_spike,
        eps=1e-6 if original else None,
        escape_steps=None if original else 50,
        record_zeros=original,
    )
    return clip_by_rule(
        rule._replace(name="zclip"),
        scope=scope,
        action=strict(1e-6) if original else actions.rescale,
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )
