"""Clips of each leaf by its own past, by published name."""

from __future__ import annotations

from typing import Any

import jax

from optclip import _checks, actions, rules, scopes
from optclip.clipping import clip
from optclip.methods._fixed import Clip

__all__ = ["adagc", "adagn", "norm_growth_limiter"]


def adagc(
    lambda_rel: jax.typing.ArrayLike = 1.05,
    *,
    beta: jax.typing.ArrayLike = 0.98,
    lambda_abs: jax.typing.ArrayLike = 1.0,
    warmup_steps: jax.typing.ArrayLike = 100,
    scope: scopes.Scope = scopes.leaf(),
    original: bool = False,
    nonfinite: str = "propagate",
    axis_name: Any = None,
    update_dtype: Any = None,
) -> Clip:
    """Clips each leaf to a little above the running average of its own norm (AdaGC).

    With the average g of the clipped norms of a leaf: u' = u * min(1, lambda_rel * g /
    n) and g = beta * g + (1 - beta) * n'. In the warm-up all leaves are clipped
    together, by the norm of the whole tree, to ``lambda_abs``, and g is the smallest
    norm of a leaf. As in the reference code, ``warmup_steps=100`` means 99 steps, and
    thresholds rise by at most 0.1% per step: after a lasting rise of the gradients they
    take long to follow. Apart from ``lambda_abs``, the clip is scale invariant.

    Args:
        lambda_rel: The threshold in units of the average, at least 0.
        beta: Decay of the average, at least 0 and below 1.
        lambda_abs: Bound on the norm of the tree in the warm-up, at least 0; inf for
            none. It has the unit of the gradient.
        warmup_steps: See above.
        scope: Which entries share one norm, from `optclip.scopes`.
        original: Record zero norms and add 1e-8, as the original does: a leaf without
            gradient in the warm-up is then held at zero permanently. If False, the
            average is set to the current norm after 200 consecutive clipped steps.
        nonfinite: As in `optclip.clip`.
        axis_name: As in `optclip.clip`.
        update_dtype: As in `optclip.clip`.

    Returns:
        A transformation with `ClipState`; ``params`` is not used.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> import optclip
        >>> tx = optclip.adagc(scope=optclip.scopes.layer({"blocks/": 1}))

    Reference:
        Wang et al., AdaGC: Improving Training Stability for Large Language Model
        Pretraining, 2025, https://arxiv.org/abs/2502.11034
    """
    _checks.non_negative(lambda_rel=lambda_rel, lambda_abs=lambda_abs)
    _checks.decay(beta=beta)
    rule = rules.ema_ratio(
        lambda_rel, decay=beta, warmup_steps=warmup_steps,
        warmup_threshold=lambda_abs, eps=1e-8 if original else 0.0,
        escape_steps=None if original else 200, record_zeros=original,
    )  # fmt: skip
    return clip(
        rule._replace(name="adagc"),
        scope=scope,
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )


def norm_growth_limiter(
    gamma: jax.typing.ArrayLike = 1.01,
    *,
    scope: scopes.Scope = scopes.leaf(),
    original: bool = False,
    nonfinite: str = "propagate",
    axis_name: Any = None,
    update_dtype: Any = None,
) -> Clip:
    """Lets a norm grow by at most a factor from one step to the next (Fira, APOLLO).

    u' = u * min(1, gamma * n0 / n) with n0 the norm of the step before, after its own
    clipping. The papers put it after the scaling of Adam, on the updates. Scale
    invariant.

    Args:
        gamma: The largest factor, at least 0.
        scope: Which entries share one norm, from `optclip.scopes`.
        original: Record zero norms and take gamma * (n0 + 1e-8), as the originals do:
            after one zero gradient a leaf starts again at about 1e-8. If False, n0 is
            set to the current norm after 200 consecutive clipped steps.
        nonfinite: As in `optclip.clip`.
        axis_name: As in `optclip.clip`.
        update_dtype: As in `optclip.clip`.

    Returns:
        A transformation with `ClipState`; ``params`` is not used.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> import optclip
        >>> tx = optclip.norm_growth_limiter(1.01)

    Reference:
        Chen et al., Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank
        Constraint?, 2024, https://arxiv.org/abs/2410.01623
    """
    _checks.non_negative(gamma=gamma)
    rule = rules.previous_norm(
        gamma, eps=1e-8 if original else 0.0,
        escape_steps=None if original else 200, record_zeros=original,
    )  # fmt: skip
    return clip(
        rule._replace(name="norm_growth_limiter"),
        scope=scope,
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )


def adagn(
    gamma1: jax.typing.ArrayLike = 0.7,
    *,
    gamma2: jax.typing.ArrayLike = 0.9,
    eps: jax.typing.ArrayLike | None = None,
    scope: scopes.Scope = scopes.leaf(),
    original: bool = False,
    nonfinite: str = "propagate",
    axis_name: Any = None,
    update_dtype: Any = None,
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
        nonfinite: As in `optclip.clip`.
        axis_name: As in `optclip.clip`.
        update_dtype: As in `optclip.clip`.

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
    _checks.decay(gamma1=gamma1, gamma2=gamma2)
    if eps is None:
        eps = 1e-8 if original else 0.0
    rule = rules.smoothed_norm(
        gamma1, second_decay=gamma2, eps=eps,
        escape_steps=None if original else 50, record_zeros=original,
    )  # fmt: skip
    return clip(
        rule._replace(name="adagn"),
        scope=scope,
        action=actions.normalize,
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )
