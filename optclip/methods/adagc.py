"""AdaGC: clips each leaf relative to the moving average of its clipped norms."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optclip import scopes
from optclip._engine import validation
from optclip._engine.numerics import increment, quotient
from optclip._engine.rule import Rule
from optclip._engine.types import DType, NonfinitePolicy, RecordedNorm
from optclip.clipping import clip_by_rule
from optclip.methods._common import Clip
from optclip.methods._history import (
    RECORDS,
    check_escape,
    count_consecutive,
    counts,
    floats,
    guard_statistics,
    init_consecutive,
    one,
    recorded_norm,
)

__all__ = ["LevelState", "adagc", "ema_ratio", "level_rule"]


class LevelState(NamedTuple):
    """State of `ema_ratio` and `previous_norm`.

    Attributes:
        ema_norm: float32, one per group. Exponential moving average of the norm;
            initially 0.
        recorded: int32, one per group. Number of norms recorded.
        clipped_run: int32, one per group. Number of consecutive steps that count
            toward ``escape_steps``; None if ``escape_steps=None``.
    """

    ema_norm: jax.Array
    recorded: jax.Array
    clipped_run: Any = None


def ema_ratio(
    ratio: jax.typing.ArrayLike,
    *,
    decay: jax.typing.ArrayLike,
    record: RecordedNorm = "clipped",
    warmup_steps: jax.typing.ArrayLike = 0,
    warmup_threshold: jax.typing.ArrayLike | None = None,
    eps: jax.typing.ArrayLike = 0.0,
    floor: jax.typing.ArrayLike = 0.0,
    escape_steps: int | None = 200,
    record_zeros: bool = False,
) -> Rule:
    """Returns the AdaGC rule: a multiple of a moving average of the norm.

    The threshold is t = ratio * max(g, eps), where g is an exponential moving average
    of the recorded norms m: after each step, g = decay * g + (1 - decay) * m. The first
    step sets g = m and is not clipped unless there is a warm-up. If clipped norms are
    recorded, g grows by at most a factor of ``decay + (1 - decay) * ratio`` per step.
    With ``decay=0``, the rule limits the growth of the norm from one step to the next,
    as in Fira and APOLLO.

    A ``warmup_threshold`` enables AdaGC's warm-up, which lasts ``warmup_steps - 1``
    steps, but at least one. During the warm-up, all groups are scaled by the same
    factor min(1, warmup_threshold / (n + eps)), where n is the norm of the whole tree,
    and g is the smallest norm recorded so far.

    The rule is scale invariant: multiplying the gradients by a constant multiplies the
    thresholds by the same constant. The exceptions are ``eps``, ``floor`` and
    ``warmup_threshold``, which have the units of the norm.

    Args:
        ratio: Ratio of the threshold to the average, at least 0.
        decay: Decay rate of the average, at least 0 and below 1.
        record: "clipped" records the norm after clipping, and "raw" the norm before
            clipping.
        warmup_steps: One more than the number of steps in the warm-up.
        warmup_threshold: Upper bound on the global norm during the warm-up, at least 0.
            None disables the warm-up.
        eps: Lower bound on the average, at least 0; AdaGC uses 1e-8.
        floor: Lower bound on the threshold after the warm-up, at least 0.
        escape_steps: Number of consecutive steps after which the average is reset to
            the current norm. A step is counted if it is clipped or if its norm is below
            1% of the average. None disables the reset, as in the original
            implementation.
        record_zeros: Whether norms of zero are recorded, as in the original
            implementations. A zero gradient at the first step then keeps the threshold
            at about ``ratio * eps`` permanently.

    Returns:
        A rule whose state holds one float32 and two int32 values per group.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import optclip
        >>> rule = optclip.rules.ema_ratio(1.05, decay=0.98)
        >>> tx = optclip.clip_by_rule(rule, scope=optclip.scopes.leaf())

    Reference:
        Wang et al., AdaGC: Improving Training Stability for Large Language Model
        Pretraining, 2025, https://arxiv.org/abs/2502.11034
    """
    validation.non_negative(ratio=ratio, eps=eps)
    return level_rule(
        ratio,
        lambda level: jnp.maximum(level, eps),
        decay=decay,
        record=record,
        warmup_steps=warmup_steps,
        warmup_threshold=warmup_threshold,
        eps=eps,
        floor=floor,
        escape_steps=escape_steps,
        record_zeros=record_zeros,
        name="ema_ratio",
    )


def level_rule(
    ratio: Any,
    padded: Any,
    *,
    decay: Any,
    record: RecordedNorm,
    warmup_steps: Any,
    warmup_threshold: Any,
    eps: Any,
    floor: Any,
    escape_steps: Any,
    record_zeros: bool,
    name: str,
) -> Rule:
    """Returns a rule whose threshold is ``ratio * padded(average)``."""
    validation.non_negative(floor=floor)
    validation.decay(decay=decay)
    validation.steps(warmup_steps=warmup_steps)
    validation.one_of("record", record, RECORDS)
    check_escape(escape_steps)
    if warmup_threshold is not None:
        validation.non_negative(warmup_threshold=warmup_threshold)

    def init(norm):
        return LevelState(
            floats(norm), counts(norm), init_consecutive(norm, escape_steps)
        )

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
            # Divide the norm first: ``1 / whole`` may be subnormal, and XLA flushes
            # subnormal numbers to zero.
            share = quotient(norm, jnp.where(above, whole, 1.0).astype(norm.dtype))
            early = jnp.where(
                above, share * jnp.where(above, warmup_threshold, 0.0), norm
            )
            threshold = jnp.where(warm, early, threshold)
        limit = one(threshold)
        seen = recorded_norm(norm, limit, record)
        level = decay * state.ema_norm + (1 - decay) * seen
        level = jnp.where(warm, jnp.minimum(state.ema_norm, seen), level)
        run, away = count_consecutive(
            ~warm & (norm > threshold),
            norm,
            jnp.where(warm, 0.0, state.ema_norm),
            state.clipped_run,
            escape_steps,
        )
        level = jnp.where(start, seen, jnp.where(away, norm, level))
        return limit, LevelState(level, count, run)

    return guard_statistics(init, update, name, zeros=record_zeros)


def adagc(
    lambda_rel: jax.typing.ArrayLike = 1.05,
    *,
    beta: jax.typing.ArrayLike = 0.98,
    lambda_abs: jax.typing.ArrayLike = 1.0,
    warmup_steps: jax.typing.ArrayLike = 100,
    scope: scopes.Scope = scopes.leaf(),
    original: bool = False,
    nonfinite: NonfinitePolicy = "propagate",
    axis_name: Any = None,
    update_dtype: DType = None,
) -> Clip:
    """Clips each leaf to slightly above the moving average of its own norm (AdaGC).

    Each leaf u with norm n is scaled to u' = u * min(1, lambda_rel * g / n), where g is
    a moving average of the leaf's clipped norms. After each step, g = beta * g + (1 -
    beta) * n', where n' is the norm of u'. During the warm-up, all leaves are clipped
    together to a global norm of ``lambda_abs``, and g is the smallest clipped norm of
    the leaf so far. As in the reference implementation, ``warmup_steps=100`` gives 99
    warm-up steps.

    With the default arguments, thresholds rise by at most 0.1% per step, so they adapt
    slowly to a lasting increase in the gradient norm. The method is scale invariant
    except for ``lambda_abs``.

    Args:
        lambda_rel: Ratio of the threshold to the average, at least 0.
        beta: Decay rate of the average, at least 0 and below 1.
        lambda_abs: Upper bound on the global norm during the warm-up, at least 0, in
            the units of the gradient; inf means no bound.
        warmup_steps: One more than the number of steps in the warm-up.
        scope: Which entries share one norm; a scope from `optclip.scopes`.
        original: Whether to follow the original implementation: record norms of zero,
            use an epsilon of 1e-8, and never reset the average. A leaf that has no
            gradient during the warm-up is then held close to zero for thousands of
            steps. If False, norms of zero are not recorded, and the average is reset to
            the current norm after 200 consecutive clipped steps.
        nonfinite: As in `optclip.clip_by_rule`.
        axis_name: As in `optclip.clip_by_rule`.
        update_dtype: As in `optclip.clip_by_rule`.

    Returns:
        A gradient transformation whose state is a `ClipState`; ``params`` is not used.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import optclip
        >>> tx = optclip.adagc(scope=optclip.scopes.layer({"blocks/": 1}))

    Reference:
        Wang et al., AdaGC: Improving Training Stability for Large Language Model
        Pretraining, 2025, https://arxiv.org/abs/2502.11034
    """
    validation.non_negative(lambda_rel=lambda_rel, lambda_abs=lambda_abs)
    validation.decay(beta=beta)
    rule = ema_ratio(
        lambda_rel,
        decay=beta,
        warmup_steps=warmup_steps,
        warmup_threshold=lambda_abs,
        eps=1e-8 if original else 0.0,
        escape_steps=None if original else 200,
        record_zeros=original,
    )
    return clip_by_rule(
        rule._replace(name="adagc"),
        scope=scope,
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )
