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
"""

from optclip.rules._base import Context, Limit, Rule
from optclip.rules._fixed import constant, fixed, interval, relative_to_params, schedule

__all__ = [
    "Context",
    "Limit",
    "Rule",
    "constant",
    "fixed",
    "interval",
    "relative_to_params",
    "schedule",
]
