"""Rules that compute the threshold of each group from its norm.

A `Rule` is a pair of pure functions that operate on *one* array of norms. It does not
depend on pytrees, sharding or Optax, so the same rule works in every scope. For
example:

    def half_of_first(fraction=0.5):
        def init(norm):
            return jnp.zeros_like(norm)  # 0: no norm so far

        def update(norm, first, context):
            first = jnp.where(first == 0, norm, first)
            limit = jnp.where(first == 0, jnp.inf, fraction * first)
            return Limit(limit, limit), first

        return Rule(init, update)

The state of a rule is float32. Float64 norms above the largest float32 are treated as
the largest float32, and norms below the smallest normal float32 (1e-38) are treated as
zero. With their default arguments, rules that keep a history are scale invariant: if
all norms are multiplied by a constant, the thresholds are multiplied by it too.
"""

from __future__ import annotations

from optclip._engine.rule import Context, Limit, Rule
from optclip._engine.thresholds import (
    as_rule,
    by_name,
    constant,
    fixed,
    interval,
    schedule,
)
from optclip.methods.adagc import ema_ratio
from optclip.methods.adagn import smoothed_norm
from optclip.methods.agc import relative_to_params
from optclip.methods.autoclip import log_histogram_percentile, window_percentile
from optclip.methods.cap_update import update_cap
from optclip.methods.dual_ema import dual_ema
from optclip.methods.ema_sigma import ema_sigma
from optclip.methods.norm_growth_limiter import previous_norm
from optclip.methods.quantile import geometric_quantile
from optclip.methods.rolling_sigma import window_sigma
from optclip.methods.spam import second_moment
from optclip.methods.stable_spam import max_ema
from optclip.methods.zclip import ema_zscore
from optclip.wrappers._log_window import log_window_sigma

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
    "update_cap",
    "window_percentile",
    "window_sigma",
]
