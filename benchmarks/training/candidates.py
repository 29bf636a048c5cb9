"""Candidates for `optclip.stabilize`: other clips of the gradients, other caps.

They are prototypes, and are compared on the tuning tasks only. All have the skipping
and restarting of `stabilize`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optclip
from optclip import rules
from optclip.wrappers.stabilize import guarded

__all__ = ["CANDIDATES"]


def _fan_in_floor(x: jax.Array) -> float:
    """Returns the RMS that weights of this shape typically start with.

    That is one over the root of the number of inputs of a unit. A vector is treated as
    one unit.
    """
    return 1 / np.sqrt(max(int(np.prod(x.shape[:-1])) if x.ndim > 1 else x.size, 1))


def _rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x)))


def cap(
    ratio: float, floor: Callable[[jax.Array], float], *, per_leaf: bool = False
) -> optax.GradientTransformation:
    """Returns `cap_update` with a floor per leaf, for the tree or for each leaf."""

    def update(updates, state, params=None):
        sizes = jax.tree.map(lambda p: jnp.maximum(_rms(p), floor(p)), params)
        if per_leaf:
            scale = jax.tree.map(
                lambda u, s: jnp.minimum(1, ratio * s / jnp.maximum(_rms(u), 1e-30)),
                updates,
                sizes,
            )
            return jax.tree.map(jnp.multiply, updates, scale), state

        def whole(tree, weights):
            pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(weights), strict=True)
            total = sum(w * jnp.square(x) for x, w in pairs)
            return jnp.sqrt(total / sum(jax.tree.leaves(weights)))

        counts = jax.tree.map(lambda p: p.size, params)
        size = whole(sizes, counts)
        change = whole(jax.tree.map(_rms, updates), counts)
        scale = jnp.minimum(1, ratio * size / jnp.maximum(change, 1e-30))
        return jax.tree.map(lambda u: u * scale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def candidate(
    rule: Any, last: optax.GradientTransformation
) -> Callable[[optax.GradientTransformation, Any], optax.GradientTransformation]:
    """Returns the method with this rule for the gradients and this cap of updates."""

    def build(optimizer, value):
        del value
        first = optclip.clip_by_rule(rule, nonfinite="skip")
        return guarded(optax.with_extra_args_support(optimizer), first, last, 5, None)

    return build


DEFAULT = functools.partial(rules.geometric_quantile, 0.1, margin=2.0)
CONSTANT = lambda x: 0.01  # noqa: E731
# Each name says what differs from `stabilize`.
CANDIDATES = {
    "fan-in floor": candidate(DEFAULT(), cap(0.02, _fan_in_floor)),
    "fan-in floor, ratio 0.05": candidate(DEFAULT(), cap(0.05, _fan_in_floor)),
    "fan-in floor, per leaf": candidate(
        DEFAULT(), cap(0.02, _fan_in_floor, per_leaf=True)
    ),
    "fan-in floor, per leaf, ratio 0.05": candidate(
        DEFAULT(), cap(0.05, _fan_in_floor, per_leaf=True)
    ),
    "quantile 0.25, margin 4, fan-in floor": candidate(
        rules.geometric_quantile(0.25, margin=4.0), cap(0.02, _fan_in_floor)
    ),
    "median, margin 2, fan-in floor": candidate(
        rules.geometric_quantile(0.5, margin=2.0), cap(0.02, _fan_in_floor)
    ),
    "quantile 0.25, margin 2, fan-in floor": candidate(
        rules.geometric_quantile(0.25, margin=2.0), cap(0.02, _fan_in_floor)
    ),
    "quantile 0.1, faster, fan-in floor": candidate(
        rules.geometric_quantile(0.1, margin=2.0, rate=0.2), cap(0.02, _fan_in_floor)
    ),
    "zclip, fan-in floor": candidate(rules.ema_zscore(), cap(0.02, _fan_in_floor)),
    "log window, fan-in floor": candidate(
        rules.log_window_sigma(2.0), cap(0.02, _fan_in_floor)
    ),
    "no cap": candidate(DEFAULT(), optax.identity()),
    "no clip, fan-in floor": candidate(np.inf, cap(0.02, _fan_in_floor)),
}
