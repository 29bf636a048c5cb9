"""Rules: how the threshold of a group is found.

A `Rule` is a pair of pure functions on *one* array of norms; it knows neither trees nor
sharding nor Optax, so one rule works in every scope. Write your own:

    def half_of_first(fraction=0.5):
        def init(norm):
            return jnp.zeros_like(norm)  # 0: not seen yet

        def update(norm, first, context):
            first = jnp.where(first == 0, norm, first)
            limit = jnp.where(first == 0, jnp.inf, fraction * first)
            return Limit(limit, limit), first

        return Rule(init, update)

What a rule remembers is float32: a float64 norm above the largest float32 counts as
that, one below the smallest normal float32 (1e-38) as zero. Rules with a history are
scale invariant at their defaults: norms times a constant have thresholds times it.
"""

from __future__ import annotations

from optclip.rules._base import Context, Limit, Rule
from optclip.rules._fixed import constant, interval, relative_to_params, schedule
from optclip.rules._named import as_rule, by_name, fixed
from optclip.rules._quantile import geometric_quantile, log_histogram_percentile
from optclip.rules._running import dual_ema, ema_ratio, previous_norm
from optclip.rules._scores import ema_sigma, ema_zscore
from optclip.rules._second_moment import max_ema, second_moment
from optclip.rules._smoothed import smoothed_norm
from optclip.rules._window import (
    log_window_sigma,
    window_percentile,
    window_sigma,
)

__all__ = [
    "Context",
    "Limit",
    "Rule",
    "as_rule",
    "by_name",
    "constant",
    "dual_ema",
    "ema_ratio",
    "ema_sigma",
    "ema_zscore",
    "fixed",
    "geometric_quantile",
    "interval",
    "log_histogram_percentile",
    "log_window_sigma",
    "max_ema",
    "previous_norm",
    "relative_to_params",
    "schedule",
    "second_moment",
    "smoothed_norm",
    "window_percentile",
    "window_sigma",
]
