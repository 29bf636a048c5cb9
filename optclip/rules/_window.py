"""Rules that keep the last norms: percentiles, and mean plus deviations."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optclip import _checks
from optclip._checks import Static
from optclip._numbers import root_of, usable_unit
from optclip.rules._base import Rule
from optclip.rules._memory import (
    next_place,
    one,
    places,
    recorded_norm,
    remembering,
)

__all__ = ["WindowState", "log_window_sigma", "window_percentile", "window_sigma"]

# No plain ints: `optax.inject_hyperparams` would make them arrays.
WINDOW, SHORT_WINDOW = Static(1000), Static(128)
# Differences below this share of the largest norm are rounding.
ROUNDING = 1e-6


class WindowState(NamedTuple):
    """State of the rules with a window.

    Attributes:
        recent_norms: float32, one row of ``window`` per group: the last norms, in a
            ring buffer.
        recorded: int32, one per group. How many norms were recorded; at the end of
            int32, a smaller number at the same place of the ring.
    """

    recent_norms: jax.Array
    recorded: jax.Array


def _put(state: WindowState, value: jax.Array, first_fills: bool = False):
    """Returns the state after ``value``, written over the oldest norm."""
    ring, count = state
    at = places(ring)
    here = at == (count % ring.shape[-1])[..., None]
    if first_fills:
        here |= (count == 0)[..., None]
    put = jnp.where(here, value.astype(ring.dtype)[..., None], ring)
    return WindowState(put, next_place(count, ring.shape[-1]))


def _empty(norm: jax.Array, window: int) -> WindowState:
    ring = jnp.zeros((*norm.shape, window), jnp.float32)
    return WindowState(ring, jnp.zeros(norm.shape, jnp.int32))


def _sorted(state: WindowState, full: bool) -> tuple[jax.Array, jax.Array]:
    """Returns the norms in ascending order, the missing ones last, and their number."""
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
    window: Any = WINDOW,
    include_current: bool = True,
    by_rank: bool = False,
    record: str = "raw",
    record_zeros: bool = False,
) -> Rule:
    """Returns the rule of AutoClip: a percentile of the last ``window`` norms.

    The threshold is that of ``numpy.percentile``, with linear interpolation. With
    ``by_rank``, bitsandbytes' rule: the first norm fills the whole window, and the
    threshold is entry ``percentile * window / 100`` of the sorted norms. Scale
    invariant.

    Args:
        percentile: Between 0 and 100.
        window: How many norms are kept, at least 1.
        include_current: Whether this step's norm counts for its own threshold. If not,
            nothing is clipped at the first step.
        by_rank: See above.
        record: "raw" or "clipped": the norm before or after the clip.
        record_zeros: Record norms of zero too.

    Returns:
        A rule with ``window`` float32 and one int32 per group.

    Raises:
        ValueError: If a number is out of range, or ``window`` is not an int.

    Example:
        >>> import optclip
        >>> tx = optclip.clip(optclip.rules.window_percentile(10.0, window=100))

    Reference:
        Seetharaman et al., AutoClip: Adaptive Gradient Clipping for Source Separation
        Networks, 2020, https://arxiv.org/abs/2007.14469
    """
    _checks.percentile(percentile=percentile)
    _checks.one_of("record", record, ("raw", "clipped"))
    window = _checks.size("window", window)
    wanted = (
        jnp.floor(jnp.asarray(percentile) * window / 100) if by_rank else percentile
    )

    def update(norm, state, context):
        del context
        seen = _put(state, norm, by_rank)
        used = seen if include_current else state
        threshold = _percentile(used, wanted, by_rank)
        threshold = jnp.where(used.recorded == 0, jnp.inf, threshold)
        limit = one(threshold)
        if record == "clipped":
            seen = _put(state, recorded_norm(norm, limit, record), by_rank)
        return limit, seen

    def init(norm):
        return _empty(norm, window)

    return remembering(init, update, "window_percentile", zeros=record_zeros)


def window_sigma(
    sigmas: jax.typing.ArrayLike = 3.0,
    *,
    window: Any = SHORT_WINDOW,
    floor: jax.typing.ArrayLike | None = None,
    unbiased: bool = False,
    record: str = "raw",
    record_zeros: bool = False,
) -> Rule:
    """Returns the rule of Levanter: mean plus deviations of the last ``window`` norms.

    The threshold is t = m + sigmas * max(s, floor) with the mean m and the standard
    deviation s of the norms before this one; nothing is clipped before half the window,
    at least two norms, is filled. It is the only rule with a history that can judge
    numbers which may be negative, such as losses. Scale invariant with the default
    ``floor``.

    Args:
        sigmas: Standard deviations above the mean, at least 0.
        window: How many norms are kept, at least 2.
        floor: The smallest deviation that counts, at least 0: a norm, such as
            Levanter's 1e-6. None: a millionth of the largest magnitude in the window,
            so that a norm above a constant history by rounding only is not clipped.
        unbiased: Whether the squares in s are divided by one less than their number, as
            OLMo-core and MaxText do, and not by it, as Levanter does.
        record: "raw" or "clipped": the norm before or after the clip.
        record_zeros: Record norms of zero too, as the original does.

    Returns:
        A rule with ``window`` float32 and one int32 per group.

    Raises:
        ValueError: If a number is out of range, or ``window`` is not an int.

    Example:
        >>> import optclip
        >>> tx = optclip.clip(optclip.rules.window_sigma(3.0))
    """
    _checks.non_negative(sigmas=sigmas)
    if floor is not None:
        _checks.non_negative(floor=floor)
    _checks.one_of("record", record, ("raw", "clipped"))
    window = _checks.size("window", window, least=2)

    def update(norm, state, context):
        del context
        ring, count = state
        known = jnp.minimum(count, window)
        valid = places(ring) < known[..., None]
        # In units of the largest, whose square can't overflow.
        largest = jnp.max(jnp.where(valid, jnp.abs(ring), 0.0), axis=-1)
        unit = usable_unit(largest)
        share = jnp.where(valid, ring / unit[..., None], 0.0)
        number = jnp.maximum(known, 1).astype(ring.dtype)
        mean = jnp.sum(share, axis=-1) / number
        apart = jnp.where(valid, share - mean[..., None], 0.0)
        freedom = jnp.maximum(number - 1, 1) if unbiased else number
        spread = root_of(jnp.sum(jnp.square(apart), axis=-1) / freedom)
        least = ROUNDING * largest if floor is None else floor
        threshold = unit * mean + sigmas * jnp.maximum(unit * spread, least)
        ready = count >= max(2, window // 2)
        limit = one(jnp.where(ready, threshold, jnp.inf))
        return limit, _put(state, recorded_norm(norm, limit, record))

    def init(norm):
        return _empty(norm, window)

    rule = remembering(init, update, "window_sigma", zeros=record_zeros)
    return rule._replace(signed=True)


# The least and the largest logarithm of a norm: those of normal float32 numbers, a
# little inside, so that `exp` of the second is finite.
LEAST_LOG, LARGEST_LOG = -87.3, 88.7


def log_window_sigma(
    sigmas: jax.typing.ArrayLike = 5.0,
    *,
    window: Any = SHORT_WINDOW,
    min_ratio: jax.typing.ArrayLike = 2.0,
) -> Rule:
    """Returns the rule of `skip_steps`: deviations of the logarithm of the norm.

    With the mean m and the standard deviation s of the logarithms of the last
    ``window`` norms, before this one,

        t = exp(m + max(sigmas * s, log(min_ratio)))

    and no threshold before half the window, at least two norms, is filled. The norms of
    a training run are nearly log-normal: on this scale large norms that belong to the
    noise are not outliers, and the rule has no unit. Norms of zero are not recorded,
    nor are subnormal ones, below 1.2e-38, where the device flushes them to zero.

    Args:
        sigmas: Standard deviations above the mean, at least 0.
        window: How many norms are kept, at least 2.
        min_ratio: The least threshold, relative to the geometric mean of the norms;
            above 0. It matters where the norms hardly vary.

    Returns:
        A rule with ``window`` float32 and one int32 per group.

    Raises:
        ValueError: If a number is out of range, or ``window`` is not an int.

    Example:
        >>> import optclip
        >>> tx = optclip.clip(optclip.rules.log_window_sigma(3.0))
    """
    _checks.non_negative(sigmas=sigmas)
    _checks.positive(min_ratio=min_ratio)
    window = _checks.size("window", window, least=2)

    def update(norm, state, context):
        del context
        ring, count = state
        known = jnp.minimum(count, window)
        valid = places(ring) < known[..., None]
        # The places that are not filled yet hold 0, whose logarithm is not finite.
        logs = jnp.log(jnp.where(valid, jnp.maximum(ring, math.exp(LEAST_LOG)), 1.0))
        number = jnp.maximum(known, 1).astype(logs.dtype)
        mean = jnp.sum(logs, axis=-1) / number
        apart = jnp.where(valid, logs - mean[..., None], 0.0)
        spread = root_of(jnp.sum(jnp.square(apart), axis=-1) / number)
        above = jnp.maximum(sigmas * spread, jnp.log(min_ratio))
        threshold = jnp.exp(jnp.minimum(mean + above, LARGEST_LOG))
        ready = count >= max(2, window // 2)
        limit = one(jnp.where(ready, threshold, jnp.inf))
        return limit, _put(state, norm)

    def init(norm):
        return _empty(norm, window)

    return remembering(init, update, "log_window_sigma", zeros=False)
