"""Clips of entries by their own size so far, by published name."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from optclip import _checks, rules, scopes
from optclip.clipping import clip
from optclip.methods._fixed import Clip

__all__ = ["adamw_clip", "spam_clip", "stable_spam_clip"]


def spam_clip(
    threshold: jax.typing.ArrayLike = 5000.0,
    *,
    decay: jax.typing.ArrayLike = 0.999,
    warmup_steps: jax.typing.ArrayLike = 20,
    reset_every: jax.typing.ArrayLike | None = None,
    original: bool = False,
    nonfinite: str = "propagate",
    axis_name: Any = None,
    update_dtype: Any = None,
) -> Clip:
    """Clips each entry whose square is thousands of times its mean square (SPAM).

    With the running mean square v of an entry, clipped values recorded:
    u' = sign(u) * min(|u|, sqrt(threshold * v)). SPAM also resets the optimizer's
    momentum; this only resets v in the same rhythm, with ``reset_every``. Scale
    invariant.

    Args:
        threshold: Largest ratio of a square to the mean square, at least 0.
        decay: Decay of v, at least 0 and below 1: Adam's second.
        warmup_steps: The first update that may be clipped: one fewer passes unclipped.
        reset_every: v and the warm-up restart after so many updates; SPAM's 500.
        original: Clip an entry whose v is 0 to 0, as the original does: an entry
            without gradient in the warm-up then stays at zero.
        nonfinite: As in `optclip.clip`.
        axis_name: As in `optclip.clip`.
        update_dtype: As in `optclip.clip`.

    Returns:
        A transformation with `ClipState`; ``params`` is not used.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> import optclip
        >>> tx = optclip.spam_clip(5000.0)

    Reference:
        Huang et al., SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM
        Training, 2025, https://arxiv.org/abs/2501.06842
    """
    _checks.threshold(threshold=threshold)
    _checks.steps(warmup_steps=warmup_steps)
    rule = rules.second_moment(
        jnp.sqrt(threshold), decay=decay, warmup_steps=warmup_steps,
        reset_every=reset_every, pass_unseen=not original,
    )  # fmt: skip
    return clip(
        rule._replace(name="spam_clip"),
        scope=scopes.element(),
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )


def adamw_clip(
    ratio: jax.typing.ArrayLike = 3.0,
    *,
    decay: jax.typing.ArrayLike = 0.999,
    floor: jax.typing.ArrayLike | None = None,
    original: bool = False,
    nonfinite: str = "propagate",
    axis_name: Any = None,
    update_dtype: Any = None,
) -> Clip:
    """Clips each entry to three times its own root mean square (AdamWClip).

    u' = sign(u) * min(|u|, max(ratio * sqrt(v), floor)) with the bias-corrected running
    mean square v of the clipped entry. An entry whose v is 0 passes. Scale invariant
    with ``floor=0``.

    Args:
        ratio: The threshold in root mean squares, at least 0.
        decay: Decay of v, at least 0 and below 1: Adam's second.
        floor: The smallest threshold, at least 0, in the unit of the gradient. None: 0,
            or the original's 1e-10 with ``original``.
        original: Clip an entry whose v is 0 to ``floor``, as the original does: the
            first gradients are 1e-10 and grow from there, by a factor of at most
            ``ratio`` per step. With ``floor=0`` they stay zero permanently.
        nonfinite: As in `optclip.clip`.
        axis_name: As in `optclip.clip`.
        update_dtype: As in `optclip.clip`.

    Returns:
        A transformation with `ClipState`; ``params`` is not used.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> import optclip
        >>> tx = optclip.adamw_clip(3.0)

    Reference:
        The package adamwclip, version 0.1.4.
    """
    if floor is None:
        floor = 1e-10 if original else 0.0
    rule = rules.second_moment(
        ratio, decay=decay, floor=floor, debias=True, pass_unseen=not original
    )
    return clip(
        rule._replace(name="adamw_clip"),
        scope=scopes.element(),
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )


def stable_spam_clip(
    theta: jax.typing.ArrayLike = 0.999,
    *,
    original: bool = False,
    nonfinite: str = "propagate",
    axis_name: Any = None,
    update_dtype: Any = None,
) -> Clip:
    """Brings entries above the running average of their leaf's maximum to it (AdaClip).

    With G the largest magnitude of a leaf and T its bias-corrected running average,
    this step's included: where |u| > T, u' = u * T / G. The first half of Stable-SPAM;
    chain `adagn` after it for the second. Official code resets T's correction by
    mistake when momentum is reset; this follows the fixed version.

    Args:
        theta: Decay of the average, at least 0 and below 1.
        original: Record leaves that are zero, as the official code does.
        nonfinite: As in `optclip.clip`.
        axis_name: As in `optclip.clip`.
        update_dtype: As in `optclip.clip`.

    Returns:
        A transformation with `ClipState`; ``params`` is not used.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> import optax, optclip
        >>> halves = optclip.stable_spam_clip(), optclip.adagn()
        >>> tx = optax.chain(*halves, optax.adam(1e-3))

    Reference:
        Huang et al., Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam,
        2025, https://arxiv.org/abs/2502.17055
    """
    _checks.decay(theta=theta)
    rule = rules.max_ema(theta, record_zeros=original)
    return clip(
        rule._replace(name="stable_spam_clip"),
        scope=scopes.element(),
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )
