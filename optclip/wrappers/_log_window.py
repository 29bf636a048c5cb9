"""The default rule of `skip_steps`: standard deviations of the log norm."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from optclip._engine import validation
from optclip._engine.numerics import root_of
from optclip._engine.rule import Rule
from optclip._engine.validation import Static
from optclip.methods._history import guard_statistics, one, places
from optclip.methods.autoclip import empty, put

__all__ = ["log_window_sigma"]

# Not a plain int, which `optax.inject_hyperparams` would convert to an array.
WINDOW: Any = Static(128)
# Bounds on the logarithm of a norm. Both are slightly inside the range of the normal
# float32 numbers, so that `exp` of the upper bound is finite.
LEAST_LOG, LARGEST_LOG = -87.3, 88.7


def log_window_sigma(
    sigmas: jax.typing.ArrayLike = 5.0,
    *,
    window: int = WINDOW,
    min_ratio: jax.typing.ArrayLike = 2.0,
) -> Rule:
    """Returns the default rule of `skip_steps`: standard deviations of the log norm.

    Let m be the mean and s the standard deviation of the logarithms of the previous
    ``window`` norms. The threshold is

        t = exp(m + max(sigmas * s, log(min_ratio)))

    There is no threshold until half the window, and at least two norms, have been
    recorded. The norms of a training run are approximately log-normal, so large norms
    that are part of the typical noise are not outliers on a logarithmic scale. The rule
    is scale invariant. Zero norms and subnormal norms (below 1.2e-38) are not recorded.

    Args:
        sigmas: Number of standard deviations above the mean, at least 0.
        window: Number of norms kept, at least 2.
        min_ratio: Lower bound on the threshold relative to the geometric mean of the
            norms, above 0. It takes effect when the norms hardly vary.

    Returns:
        A rule whose state is ``window`` float32 values and one int32 value per group.

    Raises:
        ValueError: If an argument is out of range, or ``window`` is not an int.

    Example:
        >>> import optclip
        >>> tx = optclip.clip_by_rule(optclip.rules.log_window_sigma(3.0))
    """
    validation.non_negative(sigmas=sigmas)
    validation.positive(min_ratio=min_ratio)
    window = validation.size("window", window, least=2)

    def update(norm, state, context):
        del context
        ring, count = state
        known = jnp.minimum(count, window)
        valid = places(ring) < known[..., None]
        # Unused entries are 0, whose logarithm is not finite.
        logs = jnp.log(jnp.where(valid, jnp.maximum(ring, math.exp(LEAST_LOG)), 1.0))
        number = jnp.maximum(known, 1).astype(logs.dtype)
        mean = jnp.sum(logs, axis=-1) / number
        apart = jnp.where(valid, logs - mean[..., None], 0.0)
        spread = root_of(jnp.sum(jnp.square(apart), axis=-1) / number)
        above = jnp.maximum(sigmas * spread, jnp.log(min_ratio))
        threshold = jnp.exp(jnp.minimum(mean + above, LARGEST_LOG))
        ready = count >= max(2, window // 2)
        limit = one(jnp.where(ready, threshold, jnp.inf))
        return limit, put(state, norm)

    def init(norm):
        return empty(norm, window)

    return guard_statistics(init, update, "log_window_sigma", zeros=False)
