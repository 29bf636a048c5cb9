"""Levanter's clipping, based on the mean and standard deviation of recent norms."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from optclip import scopes
from optclip._engine import validation
from optclip._engine.numerics import root_of, usable_unit
from optclip._engine.rule import Rule
from optclip._engine.types import DType, NonfinitePolicy, RecordedNorm
from optclip._engine.validation import Static
from optclip.clipping import clip_by_rule
from optclip.methods._common import Clip
from optclip.methods._history import (
    RECORDS,
    guard_statistics,
    one,
    places,
    recorded_norm,
)
from optclip.methods.autoclip import ROUNDING, empty, put

__all__ = ["rolling_sigma_clip", "window_sigma"]

# An int default would be converted to an array by `optax.inject_hyperparams`.
WINDOW: Any = Static(128)


def window_sigma(
    sigmas: jax.typing.ArrayLike = 3.0,
    *,
    window: int = WINDOW,
    floor: jax.typing.ArrayLike | None = None,
    unbiased: bool = False,
    record: RecordedNorm = "raw",
    record_zeros: bool = False,
) -> Rule:
    """Returns Levanter's rule, based on the mean and deviation of recent norms.

    The threshold is t = m + sigmas * max(s, floor), where m and s are the mean and the
    standard deviation of the previous ``window`` norms. Nothing is clipped until the
    window is half full and contains at least two norms. Unlike the other rules that
    keep a history, this rule also accepts values that can be negative, such as losses.
    With the default ``floor``, the rule is scale invariant.

    Args:
        sigmas: Number of standard deviations above the mean, at least 0.
        window: Number of norms in the window, at least 2.
        floor: Lower bound on s, at least 0, in the units of the norm, such as
            Levanter's 1e-6. None uses a millionth of the largest magnitude in the
            window. If all norms in the window are equal, a norm that exceeds them only
            by a rounding error is then not clipped.
        unbiased: Whether to divide the sum of squares by the number of norms minus one,
            as in OLMo-core and MaxText. If False, the sum is divided by the number of
            norms, as in Levanter.
        record: "raw" records the norm before clipping, and "clipped" the norm after
            clipping.
        record_zeros: Whether to record norms of zero, as in the original
            implementation.

    Returns:
        A rule whose state consists of ``window`` float32 values and one int32 value per
        group.

    Raises:
        ValueError: If an argument is out of range, or ``window`` is not an int.

    Example:
        >>> import optclip
        >>> tx = optclip.clip_by_rule(optclip.rules.window_sigma(3.0))
    """
    validation.non_negative(sigmas=sigmas)
    if floor is not None:
        validation.non_negative(floor=floor)
    validation.one_of("record", record, RECORDS)
    window = validation.size("window", window, least=2)

    def update(norm, state, context):
        del context
        ring, count = state
        known = jnp.minimum(count, window)
        valid = places(ring) < known[..., None]
        # Divide by the largest magnitude, so that the squares can't overflow.
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
        return limit, put(state, recorded_norm(norm, limit, record))

    def init(norm):
        return empty(norm, window)

    rule = guard_statistics(init, update, "window_sigma", zeros=record_zeros)
    return rule._replace(signed=True)


def rolling_sigma_clip(
    sigmas: jax.typing.ArrayLike = 3.0,
    *,
    window: int = WINDOW,
    scope: scopes.Scope = scopes.tree(),
    original: bool = False,
    nonfinite: NonfinitePolicy = "propagate",
    axis_name: Any = None,
    update_dtype: DType = None,
) -> Clip:
    """Clips to the mean plus three standard deviations of recent norms (Levanter).

    u' = u * min(1, t / n) with t = m + sigmas * s, where m and s are the mean and the
    standard deviation of the previous ``window`` norms before clipping. Nothing is
    clipped until the window is half full. Levanter applies this method to the updates
    after Adam. The lower bound on s is a millionth of the largest norm in the window,
    which keeps the method scale invariant.

    Args:
        sigmas: Number of standard deviations above the mean, at least 0.
        window: Number of norms in the window, at least 2.
        scope: A scope from `optclip.scopes`, which determines the entries that share
            one norm.
        original: Whether to follow the original implementation: record norms of zero,
            and use a lower bound of 1e-6 on s.
        nonfinite: As in `optclip.clip_by_rule`.
        axis_name: As in `optclip.clip_by_rule`.
        update_dtype: As in `optclip.clip_by_rule`.

    Returns:
        A gradient transformation whose state is a `ClipState`; ``params`` is not used.

    Raises:
        ValueError: If an argument is out of range, or ``window`` is not an int.

    Example:
        >>> import optclip
        >>> tx = optclip.rolling_sigma_clip(3.0)

    Reference:
        The Levanter trainer, `ClipUpdateNorm`,
        https://github.com/stanford-crfm/levanter
    """
    rule = window_sigma(
        sigmas, window=window, floor=1e-6 if original else None, record_zeros=original
    )
    return clip_by_rule(
        rule._replace(name="rolling_sigma_clip"),
        scope=scope,
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )
