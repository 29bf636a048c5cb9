"""Rules that follow a quantile of the norms without keeping them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optclip import _checks
from optclip._numbers import increment
from optclip.rules._base import Rule
from optclip.rules._memory import in_a_row, one, places, remembering

__all__ = [
    "HistogramState",
    "QuantileState",
    "geometric_quantile",
    "log_histogram_percentile",
]

# Norms below this count as this: its logarithm is finite, and a tiny first norm is
# forgotten within 1,500 steps.
LEAST = 1e-30


class QuantileState(NamedTuple):
    """State of `geometric_quantile`.

    Attributes:
        log_quantile: float32, one per group. Natural logarithm of the quantile.
        recorded: int32, one per group. How many norms were recorded.
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
    """Returns the rule that follows a quantile of the norm in one number.

    With x = log n and the estimate q, at first the smallest x of ``warmup_steps``
    steps:

        t = margin * exp(q)
        q = q + max(rate, 1 / step) * (quantile if x > q else quantile - 1)

    except that q rises by max(rate, 1 / step) where n is more than ten times the
    threshold: the way out after a tiny first norm. So a spike of any size raises q by
    at most 1 / step in the first ``1 / rate`` steps, and by at most ``rate`` from then
    on; a norm within ten thresholds raises q by only ``quantile`` of that, so a low
    quantile is slow to rise and quick to fall. The rule is scale invariant: gradients a
    hundred times as large have thresholds a hundred times as large.

    Args:
        quantile: Between 0 and 1.
        margin: The threshold in units of the quantile, above 0.
        rate: The largest change of q per step, above 0, after the first ``1 / rate``
            steps.
        warmup_steps: Steps in which q is the smallest x; at least 1 counts.

    Returns:
        A rule with one float32 and one int32 per group.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> import optclip
        >>> tx = optclip.clip(optclip.rules.geometric_quantile(0.1))

    Reference:
        Andrew et al., Differentially Private Learning with Adaptive Clipping, 2021,
        https://arxiv.org/abs/1905.03871 (the update of its threshold, without noise)
    """
    _checks.fraction(quantile=quantile)
    _checks.positive(margin=margin, rate=rate)
    _checks.steps(warmup_steps=warmup_steps)

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

    return remembering(init, update, "geometric_quantile", zeros=False)


class HistogramState(NamedTuple):
    """State of `log_histogram_percentile`.

    Attributes:
        norm_counts: float32, a row of 1,000 per group: how many norms fell into each
            bin. All are halved when one reaches 2**23.
        first_log: float32, one per group: log2 of the first norm, in the middle bin.
        outside_run: int32, one per group. Consecutive norms that fell into no bin.
    """

    norm_counts: jax.Array
    first_log: jax.Array
    outside_run: jax.Array


BINS = 1000
OCTAVES = 80  # so a bin is 2**0.08 wide, 5.7%
OUTSIDE_STEPS = 50
FIRST_BIN = BINS // 2 + 0.5  # the first norm lies in the middle of its bin
FULL_BIN = 2.0**23  # adding 1 to a float32 count changes nothing from 2**24 on


def log_histogram_percentile(
    percentile: jax.typing.ArrayLike, *, forgetting: jax.typing.ArrayLike = 0.0
) -> Rule:
    """Returns the rule of AutoClip over the whole history, in 4 KB per group.

    The threshold is the given percentile of all norms so far, this one included, read
    from a histogram of log n: 1,000 bins over 80 octaves around the first norm, each
    5.7% wide. So it is within 6% of a norm next to the exact percentile, for norms
    between 2**-40 and 2**40 times the first. Norms beyond that count in the last bins;
    after fifty consecutive ones the history restarts. Scale invariant.

    When a bin holds 2**23 norms, all counts are halved: from then on, after at least
    eight million steps, recent norms weigh more than old ones.

    Args:
        percentile: Between 0 and 100.
        forgetting: Share of the history forgotten each step, at least 0 and below 1; a
            history of about ``1 / forgetting`` norms then counts. 0: nothing is.

    Returns:
        A rule with 1,001 float32 and one int32 per group.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> import optclip
        >>> tx = optclip.clip(optclip.rules.log_histogram_percentile(10.0))

    Reference:
        Seetharaman et al., AutoClip, 2020, https://arxiv.org/abs/2007.14469
    """
    _checks.percentile(percentile=percentile)
    _checks.decay(forgetting=forgetting)

    def init(norm):
        counts = jnp.zeros((*norm.shape, BINS), jnp.float32)
        return HistogramState(
            counts,
            jnp.zeros(norm.shape, jnp.float32),
            jnp.zeros(norm.shape, jnp.int32),
        )

    def update(norm, state, context):
        del context
        x: Any = jnp.log2(jnp.maximum(norm, LEAST)).astype(state.first_log.dtype)
        start = jnp.sum(state.norm_counts, axis=-1) == 0
        outside = ~start & (jnp.abs(x - state.first_log) > OCTAVES / 2)
        run, away = in_a_row(
            outside, norm, jnp.zeros_like(norm), state.outside_run, OUTSIDE_STEPS
        )
        first = jnp.where(start | away, x, state.first_log)
        place = (x - first) * (BINS / OCTAVES) + FIRST_BIN
        at = jnp.clip(jnp.floor(place), 0, BINS - 1).astype(jnp.int32)
        numbers = places(state.norm_counts)
        hit = numbers == at[..., None]
        kept = jnp.where(away[..., None], 0.0, state.norm_counts)
        counts = kept * (1 - forgetting) + hit.astype(kept.dtype)
        full = jnp.max(counts, axis=-1, keepdims=True) >= FULL_BIN
        counts = jnp.where(full, 0.5 * counts, counts)
        upto = jnp.cumsum(counts, axis=-1)
        # The place of the percentile among the norms, where the first is number 0.
        wanted = percentile / 100 * jnp.maximum(upto[..., -1] - 1, 0.0)
        bin_of = jnp.sum(upto <= wanted[..., None], axis=-1, dtype=jnp.int32)
        bin_of = jnp.minimum(bin_of, jnp.max(jnp.where(counts > 0, numbers, 0), -1))
        pick = numbers == bin_of[..., None]
        inside = jnp.sum(jnp.where(pick, counts, 0.0), axis=-1)
        before = jnp.sum(jnp.where(pick, upto, 0.0), axis=-1) - inside
        part = (wanted - before + 0.5) / jnp.where(inside > 0, inside, 1.0)
        height = bin_of.astype(part.dtype) + jnp.clip(part, 0.0, 1.0) - FIRST_BIN
        threshold = jnp.exp2(first + height * (OCTAVES / BINS))
        threshold = jnp.where(start | away, norm, threshold)  # rounding clips no first
        return one(threshold), HistogramState(counts, first, run)

    return remembering(init, update, "log_histogram_percentile", zeros=False)
