"""Clips by a low quantile of the norm, estimated on a logarithmic scale."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optclip import scopes
from optclip._engine import validation
from optclip._engine.numerics import increment
from optclip._engine.rule import Rule
from optclip._engine.types import DType, NonfinitePolicy
from optclip.clipping import clip_by_rule
from optclip.methods._common import Clip
from optclip.methods._history import guard_statistics, one

__all__ = ["QuantileState", "geometric_quantile", "quantile_clip"]

# Lower bound on the norm. It keeps the logarithm finite, and it lets the estimate
# recover from a tiny first norm within 1,500 steps.
LEAST = 1e-30


class QuantileState(NamedTuple):
    """State of `geometric_quantile`.

    Attributes:
        log_quantile: float32, one per group. The natural logarithm of the quantile.
        recorded: int32, one per group. The number of norms recorded so far.
    """

    log_quantile: jax.Array
    recorded: jax.Array


def geometric_quantile(
    quantile: jax.typing.ArrayLike = 0.1,
    *,
    margin: jax.typing.ArrayLike = 2.0,
    rate: jax.typing.ArrayLike = 0.05,
    warmup_steps: jax.typing.ArrayLike = 5,
) -> Rule:
    """Returns a rule that tracks a quantile of the norm with a single number.

    Let n be the norm, x = log(n), and q an estimate of the quantile of x. Each step
    computes the threshold t and updates q:

        t = margin * exp(q)
        q = q + max(rate, 1 / step) * (quantile if x > q else quantile - 1)

    During the first ``warmup_steps`` steps, q is instead the smallest x so far. After
    the warm-up, if n is more than ten times the threshold, q rises by
    max(rate, 1 / step). This lets the estimate recover from a tiny first norm. A spike
    of any size therefore raises q by at most 1 / step in the first ``1 / rate`` steps,
    and by at most ``rate`` after that. A norm above exp(q) that is less than ten times
    the threshold raises q by only ``quantile`` times as much, so the estimate of a low
    quantile rises slowly and falls quickly. The rule is scale invariant: multiplying
    all gradients by a constant multiplies all thresholds by the same constant.

    Args:
        quantile: The quantile to track, between 0 and 1.
        margin: Ratio of the threshold to the quantile, above 0.
        rate: The largest change in q per step, above 0. This limit applies after the
            first ``1 / rate`` steps.
        warmup_steps: Number of initial steps in which q is the smallest x so far. A
            value of 0 is treated as 1.

    Returns:
        A rule whose state consists of one float32 and one int32 value per group.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import optclip
        >>> tx = optclip.clip_by_rule(optclip.rules.geometric_quantile(0.1))

    Reference:
        Andrew et al., Differentially Private Learning with Adaptive Clipping, 2021,
        https://arxiv.org/abs/1905.03871 (the threshold update, without noise)
    """
    validation.fraction(quantile=quantile)
    validation.positive(margin=margin, rate=rate)
    validation.steps(warmup_steps=warmup_steps)

    def init(norm):
        zeros = jnp.zeros(norm.shape, jnp.float32)
        return QuantileState(zeros, jnp.zeros(norm.shape, jnp.int32))

    def update(norm, state, context):
        del context
        x = jnp.log(jnp.maximum(norm, LEAST))
        count = increment(state.recorded)
        warm = count <= jnp.maximum(warmup_steps, 1)
        level: Any = jnp.where(
            warm, jnp.minimum(state.log_quantile, x), state.log_quantile
        )
        level = jnp.where(count == 1, x, level)
        level = jnp.where(norm > 0, level, state.log_quantile)
        pull = jnp.where(x > level, quantile, quantile - 1.0)
        far = x > level + jnp.log(margin) + math.log(10.0)
        pull = jnp.where(far, 1.0, pull)
        moved = level + jnp.maximum(rate, 1.0 / count.astype(x.dtype)) * pull
        after = QuantileState(jnp.where(warm, level, moved), count)
        threshold: Any = margin * jnp.exp(level)
        unknown = (norm == 0) & (state.recorded == 0)
        return one(jnp.where(unknown, jnp.inf, threshold)), after

    return guard_statistics(init, update, "geometric_quantile", zeros=False)


def quantile_clip(
    quantile: jax.typing.ArrayLike = 0.1,
    *,
    margin: jax.typing.ArrayLike = 2.0,
    rate: jax.typing.ArrayLike = 0.05,
    warmup_steps: jax.typing.ArrayLike = 5,
    scope: scopes.Scope = scopes.tree(),
    nonfinite: NonfinitePolicy = "propagate",
    axis_name: Any = None,
    update_dtype: DType = None,
) -> Clip:
    """Clips to twice a low quantile of the norm, estimated during training.

    u' = u * min(1, t / n) with t = margin * exp(q), where n is the norm and q is an
    estimate of a quantile of log(n). See `optclip.rules.geometric_quantile` for how q
    is updated. After step 20, a spike of any size raises q by at most 0.05, and the
    threshold by 5%. Between the warm-up and step 20, a spike raises q by at most
    1 / step, so the threshold rises by at most 18% at step 6. If all norms are below
    ten times the threshold, exp(q) takes 140 steps to double and 15 steps to halve. No
    argument is in the units of the gradient, so the defaults work with any loss scale.

    This transformation limits the effect of bad batches. It does not help if the
    learning rate is too high, because a permanent increase in the norm also raises the
    threshold. Use `optclip.cap_update` in that case, or `optclip.stabilize`, which
    wraps an optimizer in both transformations.

    Args:
        quantile: The quantile to track, between 0 and 1.
        margin: Ratio of the threshold to the quantile, above 0.
        rate: The largest change in q per step, above 0. This limit applies after the
            first ``1 / rate`` steps.
        warmup_steps: Number of initial steps in which exp(q) is the smallest norm so
            far.
        scope: A scope from `optclip.scopes`, which determines the entries that share
            one norm.
        nonfinite: As in `optclip.clip_by_rule`.
        axis_name: As in `optclip.clip_by_rule`.
        update_dtype: As in `optclip.clip_by_rule`.

    Returns:
        A gradient transformation whose state is a `ClipState`; ``params`` is not used.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import optax, optclip
        >>> tx = optax.chain(optclip.quantile_clip(), optax.sgd(0.1))

    Reference:
        Andrew et al., Differentially Private Learning with Adaptive Clipping, 2021,
        https://arxiv.org/abs/1905.03871 (the threshold update, without noise)
    """
    rule = geometric_quantile(
        quantile, margin=margin, rate=rate, warmup_steps=warmup_steps
    )
    return clip_by_rule(
        rule._replace(name="quantile_clip"),
        scope=scope,
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )
