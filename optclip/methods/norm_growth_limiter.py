"""The norm-growth limiter of Fira and APOLLO, relative to the previous norm."""

from __future__ import annotations

from typing import Any

import jax

from optclip import scopes
from optclip._engine import validation
from optclip._engine.rule import Rule
from optclip._engine.types import DType, NonfinitePolicy, RecordedNorm
from optclip.clipping import clip_by_rule
from optclip.methods._common import Clip
from optclip.methods.adagc import level_rule

__all__ = ["norm_growth_limiter", "previous_norm"]


def previous_norm(
    growth: jax.typing.ArrayLike = 1.01,
    *,
    record: RecordedNorm = "clipped",
    eps: jax.typing.ArrayLike = 0.0,
    escape_steps: int | None = 200,
    record_zeros: bool = False,
) -> Rule:
    """Returns the rule that limits the growth of the norm from step to step.

    The threshold is t = growth * (s + eps), where s is the norm of the previous step.
    Nothing is clipped in the first step. This is `ema_ratio` with ``decay=0``, except
    that ``eps`` is added to the norm, as in Fira and APOLLO. The rule is scale
    invariant with ``eps=0``.

    Args:
        growth: Largest ratio of the norm to the previous one, at least 0.
        record: "clipped" or "raw": record the norm after or before clipping.
        eps: Added to the previous norm, at least 0; the originals use 1e-8.
        escape_steps: As in `ema_ratio`.
        record_zeros: As in `ema_ratio`.

    Returns:
        A rule whose state is one float32 and two int32 values per group.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import optclip
        >>> tx = optclip.clip_by_rule(optclip.rules.previous_norm(1.01))

    Reference:
        Chen et al., Fira, 2024, https://arxiv.org/abs/2410.01623
    """
    validation.non_negative(growth=growth, eps=eps)
    return level_rule(
        growth,
        lambda level: level + eps,
        decay=0.0,
        record=record,
        warmup_steps=0,
        warmup_threshold=None,
        eps=eps,
        floor=0.0,
        escape_steps=escape_steps,
        record_zeros=record_zeros,
        name="previous_norm",
    )


def norm_growth_limiter(
    gamma: jax.typing.ArrayLike = 1.01,
    *,
    scope: scopes.Scope = scopes.leaf(),
    original: bool = False,
    nonfinite: NonfinitePolicy = "propagate",
    axis_name: Any = None,
    update_dtype: DType = None,
) -> Clip:
    """Limits the growth of the norm from one step to the next (Fira, APOLLO).

    u' = u * min(1, gamma * n0 / n), where n0 is the norm of the previous step after
    clipping. The papers apply it to the updates, after Adam's scaling. The method is
    scale invariant.

    Args:
        gamma: Largest ratio of the norm to the previous one, at least 0.
        scope: Which entries share one norm; a scope from `optclip.scopes`.
        original: Whether to follow the original implementations: record norms of zero,
            and use gamma * (n0 + 1e-8). After one zero gradient, the norm of a leaf
            restarts at about 1e-8. If False, n0 is reset to the current norm after 200
            consecutive clipped steps.
        nonfinite: As in `optclip.clip_by_rule`.
        axis_name: As in `optclip.clip_by_rule`.
        update_dtype: As in `optclip.clip_by_rule`.

    Returns:
        A gradient transformation whose state is a `ClipState`; ``params`` is not used.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import optclip
        >>> tx = optclip.norm_growth_limiter(1.01)

    Reference:
        Chen et al., Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank
        Constraint?, 2024, https://arxiv.org/abs/2410.01623
    """
    validation.non_negative(gamma=gamma)
    rule = previous_norm(
        gamma,
        eps=1e-8 if original else 0.0,
        escape_steps=None if original else 200,
        record_zeros=original,
    )
    return clip_by_rule(
        rule._replace(name="norm_growth_limiter"),
        scope=scope,
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )
