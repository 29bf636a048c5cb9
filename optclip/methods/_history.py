"""Helpers shared by the stateful rules: recorded norms, counters and restarts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp

from optclip._engine import validation
from optclip._engine.numerics import LAST_COUNT, increment, root_of, usable_unit
from optclip._engine.rule import Limit, Rule, keep_where
from optclip._engine.types import RecordedNorm

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
    """Returns a rule that never records zeros (unless ``zeros``) or non-finite values.

    Rules never receive NaN or inf, so only overflow in the statistics themselves has to
    be handled here. The statistics are stored in float32, so a float64 norm above the
    largest float32 is treated as the largest float32. A norm below the smallest normal
    float32 is explicitly treated as zero, since GPUs do not flush subnormal numbers to
    zero. A positive float64 norm in this range gets an infinite threshold.
    """

    def guarded(norm, state, context):
        seen, zero = state, jnp.abs(norm) < SMALLEST
        value = jnp.where(zero, 0.0, norm).astype(norm.dtype)
        wide = jnp.finfo(norm.dtype).bits > 32
        if wide:
            value = jnp.clip(value, -LARGEST, LARGEST)
            # Compute in float64, since a multiple of a large statistic may overflow in
            # float32.
            seen = jax.tree.map(lambda x: _in_dtype_of(norm, x), state)
        limit, after = update(value, seen, context)
        if wide:
            free = zero & (norm > 0)
            limit = limit._replace(threshold=jnp.where(free, jnp.inf, limit.threshold))
        # A group keeps its old state if any part of its new state would be non-finite.
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
    """Returns a limit whose threshold and target are both ``value``."""
    return Limit(value, value)


def ema_weight_sum(decay: Any, count: jax.Array, dtype: Any) -> jax.Array:
    """Returns 1 - decay**count, or 1 if ``count`` is 0.

    This is the sum of the weights of ``count`` values in an exponential moving average.
    Dividing the average by this sum corrects its bias. The result has full precision
    even if ``decay`` is close to 1.
    """
    known = isinstance(decay, (int, float))
    log = (math.log(decay) if decay else -math.inf) if known else jnp.log1p(decay - 1)
    return jnp.where(
        count > 0, -jnp.expm1(jnp.maximum(count, 1).astype(dtype) * log), 1
    )


def places(rows: jax.Array) -> jax.Array:
    """Returns the index of each entry along the last axis of ``rows``."""
    return jax.lax.broadcasted_iota(jnp.int32, rows.shape, rows.ndim - 1)


def next_place(count: jax.Array, size: Any) -> jax.Array:
    """Returns ``count + 1``, minus ``size`` if the sum would exceed int32.

    This way, ``count % size`` keeps advancing, and a count that has reached ``size``
    never falls below ``size`` again.
    """
    return jnp.where(count < LAST_COUNT, count, LAST_COUNT - size) + 1


def recorded_norm(norm: jax.Array, limit: Limit, record: str) -> jax.Array:
    """Returns the norm to record: the norm before or after clipping."""
    if record == "raw":
        return norm
    return jnp.where(norm > limit.threshold, jnp.minimum(norm, limit.target), norm)


def rms_of_two(share: jax.typing.ArrayLike, a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns sqrt(share * a**2 + (1 - share) * b**2) without overflow."""
    top = jnp.maximum(jnp.abs(a), jnp.abs(b))
    unit = usable_unit(jax.lax.stop_gradient(top))
    mean: Any = share * jnp.square(a / unit) + (1 - share) * jnp.square(b / unit)
    return unit * root_of(mean)


def count_consecutive(
    over: jax.Array, norm: jax.Array, level: jax.Array, run: Any, steps: Any
) -> tuple[Any, Any]:
    """Counts consecutive steps whose norm is far from the statistics of a rule.

    A step is counted if it is clipped (``over``) or if its norm is below 1% of
    ``level``. Returns the new count and a mask of the groups that must restart, because
    they have reached ``steps`` consecutive steps. With ``steps=None``, no group ever
    restarts.
    """
    if steps is None:
        return None, jnp.zeros_like(over)
    lost = over | (norm < 0.01 * level)
    run = jnp.where(lost, increment(run), 0)
    away = run >= steps
    return jnp.where(away, 0, run), away


def init_consecutive(norm: jax.Array, steps: Any) -> Any:
    """Returns the initial counter of `count_consecutive`."""
    return None if steps is None else jnp.zeros(norm.shape, jnp.int32)


def check_escape(steps: Any) -> None:
    """Raises an error unless ``escape_steps`` is None or a valid number of steps."""
    if steps is not None:
        validation.steps(escape_steps=steps)


RECORDS = get_args(RecordedNorm)


def counts(norm: jax.Array) -> jax.Array:
    return jnp.zeros(norm.shape, jnp.int32)


def floats(norm: jax.Array) -> jax.Array:
    return jnp.zeros(norm.shape, jnp.float32)
