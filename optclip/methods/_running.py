"""Clips whose threshold follows running averages of the norm, by published name."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from optclip import actions, rules, scopes
from optclip.clipping import clip
from optclip.methods._fixed import Clip, strict

__all__ = ["dual_ema_clip", "ema_sigma_clip", "zclip"]


def zclip(
    z_thresh: jax.typing.ArrayLike = 2.5,
    *,
    alpha: jax.typing.ArrayLike = 0.97,
    warmup_steps: jax.typing.ArrayLike = 25,
    max_grad_norm: jax.typing.ArrayLike | None = 1.0,
    clip_option: str = "adaptive_scaling",
    mode: str = "zscore",
    clip_factor: jax.typing.ArrayLike = 1.0,
    skip_update_on_spike: bool = False,
    scope: scopes.Scope = scopes.tree(),
    original: bool = False,
    nonfinite: str = "propagate",
    axis_name: Any = None,
    update_dtype: Any = None,
) -> Clip:
    """Clips spikes: norms many standard deviations above their running mean (ZClip).

    With running mean m and deviation s of the norm n, and z = (n - m) / s: where z >
    z_thresh, u' = u * t / n with t = m + z_thresh**2 * s / z, so that the larger the
    spike, the closer to the mean it ends. The formulas of every option are those of
    `optclip.rules.ema_zscore`, and follow the official code, not the paper.

    With the published ``max_grad_norm=1.0`` all norms above 1 are also clipped to 1, as
    by `clip_by_global_norm`; pass None for the z-score alone, which is scale invariant.

    Args:
        z_thresh: Standard deviations above the mean that make a spike, above 0.
        alpha: Decay of the averages, at least 0 and below 1.
        warmup_steps: Steps in which only ``max_grad_norm`` bounds; at least 1.
        max_grad_norm: A constant bound as well, at least 0, in the unit of the
            gradient; None for none.
        clip_option: What a spike is scaled to, "adaptive_scaling" or "mean".
        mode: "zscore", or "percentile" for t = m + z_thresh * s.
        clip_factor: Factor of t in "adaptive_scaling", above 0.
        skip_update_on_spike: Record nothing where there is a spike.
        scope: Which entries share one norm, from `optclip.scopes`.
        original: As the original, record zero norms, add 1e-6 to s and n, and never
            restart. If False, the statistics restart after 50 consecutive spikes, and
            1e-6 of m is added to s, so that the unit of the gradient does not matter.
        nonfinite: As in `optclip.clip`.
        axis_name: As in `optclip.clip`.
        update_dtype: As in `optclip.clip`.

    Returns:
        A transformation with `ClipState`; ``params`` is not used.

    Raises:
        ValueError: If a number is out of range, or there is no such option.

    Example:
        >>> import optax, optclip
        >>> tx = optax.chain(optclip.zclip(max_grad_norm=None), optax.adamw(3e-4))

    Reference:
        Kumar et al., ZClip: Adaptive Spike Mitigation for LLM Pre-Training, 2025,
        https://arxiv.org/abs/2504.02507
    """
    rule = rules.ema_zscore(
        z_thresh, alpha=alpha, warmup_steps=warmup_steps, max_grad_norm=max_grad_norm,
        mode=mode, clip_option=clip_option, clip_factor=clip_factor,
        skip_update_on_spike=skip_update_on_spike,
        eps=1e-6 if original else None, escape_steps=None if original else 50,
        record_zeros=original,
    )  # fmt: skip
    return clip(
        rule._replace(name="zclip"),
        scope=scope,
        action=strict(1e-6) if original else actions.rescale,
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )


def ema_sigma_clip(
    sigmas: jax.typing.ArrayLike = 3.0,
    *,
    decay: jax.typing.ArrayLike = 0.99,
    scope: scopes.Scope = scopes.tree(),
    original: bool = False,
    nonfinite: str = "propagate",
    axis_name: Any = None,
    update_dtype: Any = None,
) -> Clip:
    """Clips norms above their running mean plus three deviations (Open-Sora-Plan).

    u' = u * min(1, t / n) with t = m + sigmas * s of the norms that were not clipped:
    see `optclip.rules.ema_sigma`. Scale invariant, unless ``original``.

    Args:
        sigmas: Standard deviations above the mean, at least 0.
        decay: Decay of the averages, at least 0 and below 1.
        scope: Which entries share one norm, from `optclip.scopes`.
        original: As the original, divide by n + 1e-6, begin with a mean of at most 1
            and never restart: a run whose norms are above 1 is clipped to 1
            permanently. If False, the first mean is three times the first norm, and the
            statistics restart after 50 consecutive clipped steps.
        nonfinite: As in `optclip.clip`.
        axis_name: As in `optclip.clip`.
        update_dtype: As in `optclip.clip`.

    Returns:
        A transformation with `ClipState`; ``params`` is not used.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> import optclip
        >>> tx = optclip.ema_sigma_clip(3.0)

    Reference:
        Lin et al., Open-Sora Plan: Open-Source Large Video Generation Model, 2024,
        https://arxiv.org/abs/2412.00131
    """
    rule = rules.ema_sigma(
        sigmas, decay=decay, first_cap=1.0 if original else float("inf"),
        escape_steps=None if original else 50, record_zeros=original,
    )  # fmt: skip
    return clip(
        rule._replace(name="ema_sigma_clip"),
        scope=scope,
        action=strict(1e-6) if original else actions.rescale,
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )


def dual_ema_clip(
    trigger: jax.typing.ArrayLike = 2.0,
    target: jax.typing.ArrayLike = 1.1,
    *,
    fast_decay: jax.typing.ArrayLike = 0.9,
    slow_decay: jax.typing.ArrayLike = 0.99,
    scope: scopes.Scope = scopes.tree(),
    original: bool = False,
    nonfinite: str = "propagate",
    axis_name: Any = None,
    update_dtype: Any = None,
) -> Clip:
    """Clips norms above twice a slow average to a little above a fast one.

    Where n > trigger * s, u' = u * min(1, target * f / n), with the bias-corrected
    averages s (slow) and f (fast) of the clipped norms: the rule of PDE-Transformer's
    trainer. Nothing is clipped at the first step. Scale invariant, unless ``original``.

    Args:
        trigger: Multiple of the slow average, at least 0.
        target: Multiple of the fast average, at least 0.
        fast_decay: At least 0 and below 1.
        slow_decay: At least 0 and below 1.
        scope: Which entries share one norm, from `optclip.scopes`.
        original: As the published trainer, clip a first norm above 10,000 to 1, divide
            by n + 1e-6, record ``target * f`` after a clip even if n is less, record
            zero norms, and never restart. If False, both averages restart after 50
            consecutive clipped steps.
        nonfinite: As in `optclip.clip`.
        axis_name: As in `optclip.clip`.
        update_dtype: As in `optclip.clip`.

    Returns:
        A transformation with `ClipState`; ``params`` is not used.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> import optclip
        >>> tx = optclip.dual_ema_clip()

    Reference:
        Holzschuh et al., PDE-Transformer: Efficient and Versatile Transformers for
        Physics Simulations, 2025, https://arxiv.org/abs/2505.24717
    """
    rule = rules.dual_ema(
        trigger, target, fast_decay=fast_decay, slow_decay=slow_decay,
        record="target" if original else "clipped",
        escape_steps=None if original else 50, record_zeros=original,
    )  # fmt: skip
    if original:
        rule = _first_bounded(rule)
    return clip(
        rule._replace(name="dual_ema_clip"),
        scope=scope,
        action=strict(1e-6) if original else actions.rescale,
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )


def _first_bounded(rule: rules.Rule) -> rules.Rule:
    """Returns `rules.dual_ema` with the trainer's limits while its averages are 0."""

    def update(norm, state, context):
        limit, after = rule.update(norm, state, context)
        start = state.slow_ema == 0
        threshold = jnp.where(start, 1e4, limit.threshold)
        target = jnp.where(start, 1.0, limit.target)
        return rules.Limit(threshold, target), after

    return rule._replace(update=update)
