"""AutoClip: clips to a percentile of the norms so far."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optclip import actions, scopes
from optclip._engine import validation
from optclip._engine.rule import Rule
from optclip._engine.types import DType, NonfinitePolicy, RecordedNorm
from optclip._engine.validation import Static
from optclip.clipping import clip_by_rule
from optclip.methods._common import Clip, hard
from optclip.methods._history import (
    RECORDS,
    count_consecutive,
    guard_statistics,
    next_place,
    one,
    places,
    recorded_norm,
)
from optclip.methods.quantile import LEAST

__all__ = [
    "HistogramState",
    "WindowState",
    "autoclip",
    "empty",
    "log_histogram_percentile",
    "put",
    "window_percentile",
]

# Static, since `optax.inject_hyperparams` would convert a plain int to an array.
WINDOW: Any = Static(1000)
# Differences below this fraction of the largest norm are rounding errors.
ROUNDING = 1e-6


class WindowState(NamedTuple):
    """State of the rules that keep a window of norms.

    Attributes:
        recent_norms: float32, ``window`` entries per group. Ring buffer of the most
            recent norms.
        recorded: int32, one per group. Number of norms recorded. After the largest
            int32, it continues from a smaller number with the same position in the ring
            buffer.
    """

    recent_norms: jax.Array
    recorded: jax.Array


def put(state: WindowState, value: jax.Array, first_fills: bool = False):
    """Returns the state with the oldest norm replaced by ``value``.

    If ``first_fills`` is True, the first norm fills the whole window.
    """
    ring, count = state
    at = places(ring)
    here = at == (count % ring.shape[-1])[..., None]
    if first_fills:
        here |= (count == 0)[..., None]
    put = jnp.where(here, value.astype(ring.dtype)[..., None], ring)
    return WindowState(put, next_place(count, ring.shape[-1]))


def empty(norm: jax.Array, window: int) -> WindowState:
    """Returns the initial state, in which no norms are recorded."""
    ring = jnp.zeros((*norm.shape, window), jnp.float32)
    return WindowState(ring, jnp.zeros(norm.shape, jnp.int32))


def _sorted(state: WindowState, full: bool) -> tuple[jax.Array, jax.Array]:
    """Returns the norms in ascending order, padded with inf, and their number."""
    ring, count = state
    window = ring.shape[-1]
    known = jnp.full_like(count, window) if full else jnp.minimum(count, window)
    valid = places(ring) < known[..., None]
    return jnp.sort(jnp.where(valid, ring, jnp.inf), axis=-1), known


def _percentile(state: WindowState, percentile: Any, by_rank: bool) -> jax.Array:
    values, known = _sorted(state, by_rank)

    def at(index):
        index = jnp.clip(index, 0, values.shape[-1] - 1).astype(jnp.int32)
        return jnp.take_along_axis(values, index[..., None], axis=-1)[..., 0]

    if by_rank:
        return at(jnp.broadcast_to(jnp.asarray(percentile), known.shape))
    place = percentile / 100 * jnp.maximum(known - 1, 0).astype(values.dtype)
    low = jnp.floor(place).astype(jnp.int32)
    below, above = at(low), at(jnp.minimum(low + 1, jnp.maximum(known - 1, 0)))
    return below + (above - below) * (place - low.astype(place.dtype))


def window_percentile(
    percentile: jax.typing.ArrayLike,
    *,
    window: int = WINDOW,
    include_current: bool = True,
    by_rank: bool = False,
    record: RecordedNorm = "raw",
    record_zeros: bool = False,
) -> Rule:
    """Returns the AutoClip rule: a percentile of the last ``window`` norms.

    The threshold is computed as in ``numpy.percentile``, with linear interpolation. If
    ``by_rank`` is True, it is computed as in bitsandbytes: the first norm fills the
    whole window, the norms are sorted, and the threshold is the norm at index
    ``percentile * window / 100``, rounded down. The rule is scale invariant.

    Args:
        percentile: The percentile, between 0 and 100.
        window: Number of norms in the window, at least 1.
        include_current: Whether the percentile includes the current norm. If False, the
            first step is not clipped.
        by_rank: Whether to select the threshold by its rank, as in bitsandbytes.
        record: "raw" records the norm before clipping, and "clipped" the norm after
            clipping.
        record_zeros: Whether norms of zero are recorded.

    Returns:
        A rule whose state holds ``window`` float32 values and one int32 value per
        group.

    Raises:
        ValueError: If an argument is out of range, or ``window`` is not an int.

    Example:
        >>> import optclip
        >>> tx = optclip.clip_by_rule(optclip.rules.window_percentile(10.0, window=100))

    Reference:
        Seetharaman et al., AutoClip: Adaptive Gradient Clipping for Source Separation
        Networks, 2020, https://arxiv.org/abs/2007.14469
    """
    validation.percentile(percentile=percentile)
    validation.one_of("record", record, RECORDS)
    window = validation.size("window", window)
    wanted = (
        jnp.floor(jnp.asarray(percentile) * window / 100) if by_rank else percentile
    )

    def update(norm, state, context):
        del context
        seen = put(state, norm, by_rank)
        used = seen if include_current else state
        threshold = _percentile(used, wanted, by_rank)
        threshold = jnp.where(used.recorded == 0, jnp.inf, threshold)
        limit = one(threshold)
        if record == "clipped":
            seen = put(state, recorded_norm(norm, limit, record), by_rank)
        return limit, seen

    def init(norm):
        return empty(norm, window)

    return guard_statistics(init, update, "window_percentile", zeros=record_zeros)


class HistogramState(NamedTuple):
    """State of `log_histogram_percentile`.

    Attributes:
        norm_counts: float32, 1,000 entries per group. Number of norms in each bin. All
            counts are halved when one of them reaches 2**23.
        first_log: float32, one per group. Base-2 logarithm of the first norm, which is
            the center of the middle bin.
        outside_run: int32, one per group. Number of consecutive norms outside the range
            of the bins.
    """

    norm_counts: jax.Array
    first_log: jax.Array
    outside_run: jax.Array


BINS = 1000  # 4 KB of float32 counts per group
OCTAVES = 80  # each bin spans a factor of 2**0.08, which is 5.7%
OUTSIDE_STEPS = 50  # the default `escape_steps` of most other rules
FIRST_BIN = BINS // 2 + 0.5  # puts the first norm at the center of the middle bin
FULL_BIN = 2.0**23  # adding 1 to a float32 count of 2**24 has no effect


def log_histogram_percentile(
    percentile: jax.typing.ArrayLike, *, forgetting: jax.typing.ArrayLike = 0.0
) -> Rule:
    """Returns the AutoClip rule over the whole history, using 4 KB per group.

    The threshold is the given percentile of all norms so far, including the current
    one. It is computed from a histogram of log n with 1,000 bins, each 5.7% wide, which
    cover 80 octaves around the first norm. If all norms are between 2**-40 and 2**40
    times the first norm, the threshold is within 6% of a norm adjacent to the exact
    percentile. Norms outside this range are counted in the outermost bins. After 50
    consecutive norms outside the range, the history restarts. The rule is scale
    invariant.

    When a bin reaches 2**23 norms, which takes at least eight million steps, all counts
    are halved. From then on, recent norms have more weight than older norms.

    Args:
        percentile: The percentile, between 0 and 100.
        forgetting: Fraction of the history that is discarded at each step, at least 0
            and below 1. The threshold then depends on about the last ``1 / forgetting``
            norms. A value of 0 keeps the whole history.

    Returns:
        A rule whose state holds 1,001 float32 values and one int32 value per group.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import optclip
        >>> tx = optclip.clip_by_rule(optclip.rules.log_histogram_percentile(10.0))

    Reference:
        Seetharaman et al., AutoClip, 2020, https://arxiv.org/abs/2007.14469
    """
    validation.percentile(percentile=percentile)
    validation.decay(forgetting=forgetting)

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
        run, away = count_consecutive(
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
        # The zero-based rank of the percentile among the sorted norms.
        wanted = percentile / 100 * jnp.maximum(upto[..., -1] - 1, 0.0)
        bin_of = jnp.sum(upto <= wanted[..., None], axis=-1, dtype=jnp.int32)
        bin_of = jnp.minimum(bin_of, jnp.max(jnp.where(counts > 0, numbers, 0), -1))
        pick = numbers == bin_of[..., None]
        inside = jnp.sum(jnp.where(pick, counts, 0.0), axis=-1)
        before = jnp.sum(jnp.where(pick, upto, 0.0), axis=-1) - inside
        part = (wanted - before + 0.5) / jnp.where(inside > 0, inside, 1.0)
        height = bin_of.astype(part.dtype) + jnp.clip(part, 0.0, 1.0) - FIRST_BIN
        threshold = jnp.exp2(first + height * (OCTAVES / BINS))
        # Use the exact norm, so that rounding errors do not clip the first norm.
        threshold = jnp.where(start | away, norm, threshold)
        return one(threshold), HistogramState(counts, first, run)

    return guard_statistics(init, update, "log_histogram_percentile", zeros=False)


def autoclip(
    percentile: jax.typing.ArrayLike = 10.0,
    *,
    window: int | None = WINDOW,
    scope: scopes.Scope = scopes.tree(),
    original: bool = False,
    nonfinite: NonfinitePolicy = "propagate",
    axis_name: Any = None,
    update_dtype: DType = None,
) -> Clip:
    """Clips updates to a percentile of their norms so far (AutoClip).

    Updates u with norm n are scaled to u' = u * min(1, t / n), where t is the given
    percentile of the last ``window`` norms before clipping, including the current one.
    The percentile is computed as in `numpy.percentile`. With the published value of 10,
    nine out of ten steps are clipped, so choose the learning rate as for normalized
    gradients. The method is scale invariant unless ``original`` is set.

    Args:
        percentile: The percentile, between 0 and 100. The tenth percentile is 10, not
            0.1.
        window: Number of norms in the window. Until the window is full, the result is
            the same as in the original implementation, which keeps the whole history.
            None uses a histogram of the whole history, which takes 4 KB per group and
            is accurate to within 6%; see `optclip.rules.log_histogram_percentile`.
        scope: Which entries share one norm; a scope from `optclip.scopes`.
        original: Whether to follow the original implementation: record norms of zero
            (if there is a window), and divide by n + 1e-6. This epsilon also scales
            down norms that are not much larger than 1e-6.
        nonfinite: As in `optclip.clip_by_rule`.
        axis_name: As in `optclip.clip_by_rule`.
        update_dtype: As in `optclip.clip_by_rule`.

    Returns:
        A gradient transformation whose state is a `ClipState`; ``params`` is not used.

    Raises:
        ValueError: If an argument is out of range, or ``window`` is not an int.

    Example:
        >>> import optclip
        >>> tx = optclip.autoclip(10.0)

    Reference:
        Seetharaman et al., AutoClip: Adaptive Gradient Clipping for Source Separation
        Networks, 2020, https://arxiv.org/abs/2007.14469
    """
    rule = (
        log_histogram_percentile(percentile)
        if window is None
        else window_percentile(percentile, window=window, record_zeros=original)
    )
    return clip_by_rule(
        rule._replace(name="autoclip"),
        scope=scope,
        action=hard(1e-6) if original else actions.rescale,
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )
