"""The norm-growth limiter of Fira and APOLLO, which bounds the norm's growth."""

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
    """Returns a rule that limits the growth of the norm from one step to the next.

    The threshold is t = growth * (s + eps), where s is the last recorded norm. The
    first step is not clipped. This is `ema_ratio` with ``decay=0``, except that ``eps``
    is added to the recorded norm, as in Fira and APOLLO. With ``eps=0``, the rule is
    scale invariant.

    Args:
        growth: The largest ratio of the norm to the last recorded norm, at least 0.
        record: "clipped" records the norm after clipping, and "raw" the norm before
            clipping.
        eps: Value added to the last recorded norm, at least 0. The original
            implementations use 1e-8.
        escape_steps: As in `ema_ratio`.
        record_zeros: As in `ema_ratio`.

    Returns:
        A rule whose state consists of one float32 and two int32 values per group.

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

    u' = u * min(1, gamma * n0 / n), where n is the norm of the update and n0 is the
    norm of the previous update after clipping. The papers apply the limiter to the
    updates after Adam's scaling. The method is scale invariant.

    Args:
        gamma: The largest ratio of the norm to the previous norm, at least 0.
        scope: A scope from `optclip.scopes`, which determines the entries that share
            one norm.
        original: Whether to follow the original implementations: record norms of zero,
            and use the threshold gamma * (n0 + 1e-8). After a single zero gradient, the
            norm of a leaf then restarts at about 1e-8. If False, n0 is reset to the
            current norm after 200 consecutive clipped steps.
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
