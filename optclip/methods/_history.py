"""What all rules with memory share: what is recorded, counters, and restarts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optclip._engine import validation
from optclip._engine.numerics import LAST_COUNT, increment, root_of, usable_unit
from optclip._engine.rule import Limit, Rule, keep_where

__all__ = [
    "check_escape",
    "count_consecutive",
    "counts",
    "ema_weight_sum",
    "floats",
    "guard_statistics",
    "init_consecutive",
    "next_place",
    "one",
    "recorded_norm",
    "rms_of_two",
]

LARGEST, SMALLEST = (float(getattr(jnp.finfo(jnp.float32), n)) for n in ("max", "tiny"))


def guard_statistics(
    init: Callable, update: Callable, name: str, *, zeros: bool
) -> Rule:
    """Returns a rule that records no zero norm, unless ``zeros``, and nothing infinite.

    The engine passes neither NaN nor inf; what is caught here is an overflow of the
    statistics themselves. These are float32: a float64 norm above the largest float32
    counts as that, and one below the smallest normal float32 counts as zero, whose
    threshold is infinite.
    """

    def guarded(norm, state, context):
        value, seen, zero = norm, state, norm == 0
        wide = jnp.finfo(norm.dtype).bits > 32
        if wide:
            zero = jnp.abs(norm) < SMALLEST
            value = jnp.clip(norm, -LARGEST, LARGEST)
            value = jnp.where(zero, 0.0, value).astype(norm.dtype)
            # Or a multiple of a large statistic would overflow in float32.
            seen = jax.tree.map(lambda x: _in_dtype_of(norm, x), state)
        limit, after = update(value, seen, context)
        if wide:
            free = zero & (norm > 0)
            limit = limit._replace(threshold=jnp.where(free, jnp.inf, limit.threshold))
        # A group is not recorded if any part of its new state would be infinite.
        overflow = jnp.zeros(norm.shape, bool)
        for old, new in zip(
            jax.tree.leaves(state), jax.tree.leaves(after), strict=True
        ):
            bad = ~jnp.isfinite(new.astype(old.dtype))
            own = tuple(range(norm.ndim, bad.ndim))
            bad = jnp.any(bad, axis=own) if bad.ndim >= norm.ndim else jnp.any(bad)
            overflow |= bad
        kept = overflow if zeros else overflow | zero
        return limit, keep_where(kept, state, after, context.across)

    return Rule(init, guarded, name)


def _in_dtype_of(norm: jax.Array, x: jax.Array) -> jax.Array:
    return x.astype(norm.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x


def one(value: jax.Array) -> Limit:
    """Returns the limit whose target is its threshold."""
    return Limit(value, value)


def ema_weight_sum(decay: Any, count: jax.Array, dtype: Any) -> jax.Array:
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


def next_place(count: jax.Array, size: Any) -> jax.Array:
    """Returns ``count + 1``, or at the end of int32 a smaller count in the same phase.

    So ``count % size`` keeps advancing, and a count of at least ``size`` remains one.
    """
    return jnp.where(count < LAST_COUNT, count, LAST_COUNT - size) + 1


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


def count_consecutive(
    over: jax.Array, norm: jax.Array, level: jax.Array, run: Any, steps: Any
) -> tuple[Any, Any]:
    """Counts consecutive steps on which a rule has lost the norm.

    These are steps that are clipped (``over``), or on which the norm is at most a
    hundredth of the rule's ``level``. Returns the new count, and where ``steps`` of
    them call for a restart; with ``steps=None`` there never is one.
    """
    if steps is None:
        return None, jnp.zeros_like(over)
    lost = over | (norm < 0.01 * level)
    run = jnp.where(lost, increment(run), 0)
    away = run >= steps
    return jnp.where(away, 0, run), away


def init_consecutive(norm: jax.Array, steps: Any) -> Any:
    """Returns the counter that `count_consecutive` starts with."""
    return None if steps is None else jnp.zeros(norm.shape, jnp.int32)


def check_escape(steps: Any) -> None:
    """Raises unless ``escape_steps`` is None or a whole number of steps."""
    if steps is not None:
        validation.steps(escape_steps=steps)


RECORDS = ("raw", "clipped")


def counts(norm: jax.Array) -> jax.Array:
    return jnp.zeros(norm.shape, jnp.int32)


def floats(norm: jax.Array) -> jax.Array:
    return jnp.zeros(norm.shape, jnp.float32)
