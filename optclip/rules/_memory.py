"""What all rules with memory share: what is recorded, and the way out of a lock."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optclip import _checks
from optclip._numbers import root_of, usable_unit
from optclip.rules._base import Limit, Rule, hold

__all__ = [
    "check_escape",
    "first_run",
    "in_a_row",
    "one",
    "recorded_norm",
    "remembering",
    "rms_of_two",
    "weight_of",
]


def remembering(init: Callable, update: Callable, name: str, *, zeros: bool) -> Rule:
    """Returns a rule that records no zero norm, unless ``zeros``, and nothing infinite.

    (The engine has seen to NaN and inf already; what is caught here is an overflow of
    the statistics themselves.)
    """

    def guarded(norm, state, context):
        limit, after = update(norm, state, context)
        # A group of which a part would be infinite is not recorded at all.
        wild = jnp.zeros(norm.shape, bool)
        for old, new in zip(
            jax.tree.leaves(state), jax.tree.leaves(after), strict=True
        ):
            bad = ~jnp.isfinite(new.astype(old.dtype))
            own = tuple(range(norm.ndim, bad.ndim))
            wild |= jnp.any(bad, axis=own) if bad.ndim >= norm.ndim else jnp.any(bad)
        kept = wild if zeros else wild | (norm == 0)
        return limit, hold(kept, state, after, context.across)

    return Rule(init, guarded, name)


def one(value: jax.Array) -> Limit:
    """Returns the limit whose target is its threshold."""
    return Limit(value, value)


def weight_of(decay: Any, count: jax.Array, dtype: Any) -> jax.Array:
    """Returns 1 - decay**count, to all digits also for a decay near 1; 1 for count 0.

    It is the sum of the weights of ``count`` numbers in a running average.
    """
    known = isinstance(decay, (int, float))
    log = (math.log(decay) if decay else -math.inf) if known else jnp.log1p(decay - 1)
    return jnp.where(
        count > 0, -jnp.expm1(jnp.maximum(count, 1).astype(dtype) * log), 1
    )


def places(rows: jax.Array) -> jax.Array:
    """Returns the number of each place along the last axis of ``rows``."""
    return jax.lax.broadcasted_iota(jnp.int32, rows.shape, rows.ndim - 1)


def recorded_norm(norm: jax.Array, limit: Limit, record: str) -> jax.Array:
    """Returns what enters the history: the norm before the clip, or that after it."""
    if record == "raw":
        return norm
    return jnp.where(norm > limit.threshold, jnp.minimum(norm, limit.target), norm)


def rms_of_two(share: jax.typing.ArrayLike, a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns sqrt(share * a**2 + (1 - share) * b**2), whose squares can't overflow."""
    top = jnp.maximum(jnp.abs(a), jnp.abs(b))
    unit = usable_unit(jax.lax.stop_gradient(top))
    mean: Any = share * jnp.square(a / unit) + (1 - share) * jnp.square(b / unit)
    return unit * root_of(mean)


def in_a_row(
    over: jax.Array, norm: jax.Array, level: jax.Array, run: Any, steps: Any
) -> tuple[Any, Any]:
    """Counts steps in a row on which a rule has lost the norm.

    These are steps that are clipped (``over``), or on which the norm is a hundredth of
    the ``level`` that the rule believes in, or less. Returns the new count, and where
    ``steps`` of them call for a restart. With ``steps=None`` there never is one.
    """
    if steps is None:
        return None, jnp.zeros_like(over)
    lost = over | (norm < 0.01 * level)
    run = jnp.where(lost, run + 1, 0)
    away = run >= steps
    return jnp.where(away, 0, run), away


def first_run(norm: jax.Array, steps: Any) -> Any:
    """Returns the counter that `in_a_row` starts with."""
    return None if steps is None else jnp.zeros(norm.shape, jnp.int32)


def check_escape(steps: Any) -> None:
    """Raises unless ``escape_steps`` is None or a whole number of steps."""
    if steps is not None:
        _checks.steps(escape_steps=steps)
