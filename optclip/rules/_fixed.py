"""Rules without memory: thresholds given by the user, or by the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optclip import _checks
from optclip.rules._base import Limit, Rule

__all__ = [
    "constant",
    "interval",
    "relative_to_params",
    "schedule",
]


def _stateless(limit_of: Callable, name: str, *, needs_norms: bool = False) -> Rule:
    return Rule(
        init=lambda norm: (),
        update=lambda norm, state, context: (limit_of(norm, context), state),
        name=name,
        needs_norms=needs_norms,
    )


def _both(threshold: jax.typing.ArrayLike, norm: jax.Array) -> Limit:
    value = jnp.asarray(threshold).astype(norm.dtype)
    return Limit(value, value)


def constant(value: jax.typing.ArrayLike) -> Rule:
    """Returns the rule whose threshold is ``value``, always.

    Args:
        value: The threshold, in the units of the norm: a number of at least 0, or an
            array that broadcasts against the norms (in leaf scope, one a leaf). 0 clips
            everything to zero, inf nothing. An array is not checked; its entries that
            are negative or NaN count as 0.

    Returns:
        A stateless rule.

    Raises:
        ValueError: If a number is negative or NaN.
        TypeError: If it is no number.

    Example:
        >>> import optclip
        >>> tx = optclip.clip(optclip.rules.constant(1.0))
    """
    _checks.threshold(value=value)
    return _stateless(lambda norm, context: _both(value, norm), "constant")


def schedule(fn: Callable[[jax.Array], Any]) -> Rule:
    """Returns the rule whose threshold is ``fn(step)``: any Optax schedule.

    Args:
        fn: A function from the number of updates so far (int32, 0 at the first) to the
            threshold. Values that are negative or NaN count as 0.

    Returns:
        A stateless rule; the step is counted by the clip.

    Raises:
        TypeError: If ``fn`` can't be called.

    Example:
        >>> import optax, optclip
        >>> warm_up = optax.linear_schedule(10.0, 1.0, transition_steps=100)
        >>> tx = optclip.clip(optclip.rules.schedule(warm_up))
    """
    if not callable(fn):
        raise TypeError(f"`fn` must be a function of the step, got {fn!r}.")

    def limit_of(norm, context):
        value = fn(context.step)
        if isinstance(value, tuple):
            raise TypeError(
                "The threshold is a function, and so a schedule: it must return a "
                f"number for each step, got a {type(value).__name__}. If it makes a "
                "rule, call it, as in `optclip.rules.constant(1.0)`."
            )
        return _both(value, norm)

    return _stateless(limit_of, "schedule")


def interval(low: jax.typing.ArrayLike, high: jax.typing.ArrayLike) -> Rule:
    """Returns the rule that allows values between ``low`` and ``high``: element scope.

    Args:
        low: The smallest value allowed.
        high: The largest value allowed.

    Returns:
        A stateless rule, for `scopes.element` and real leaves only.

    Raises:
        ValueError: If ``low`` is above ``high``, or one of them is NaN.
    """
    _checks.ordered(low=low, high=high)

    def limit_of(norm, context):
        del context
        top, bottom = jnp.asarray(high, norm.dtype), jnp.asarray(low, norm.dtype)
        return Limit(jnp.maximum(jnp.abs(top), jnp.abs(bottom)), top, bottom)

    return _stateless(limit_of, "interval")._replace(elements_only=True)


def relative_to_params(
    ratio: jax.typing.ArrayLike, *, floor: jax.typing.ArrayLike = 1e-3
) -> Rule:
    """Returns the rule of AGC: a share of the norm of the group's parameters.

    The threshold is ``ratio * max(norm of the parameters, floor)``, so that parameters
    that are still zero can move.

    Args:
        ratio: The share; a number of at least 0.
        floor: The least norm that parameters count with; at least 0.

    Returns:
        A stateless rule that needs ``params``.

    Raises:
        ValueError: If a number is negative or NaN; in ``update``, if ``params`` are
            missing.

    Example:
        >>> import optclip
        >>> rule = optclip.rules.relative_to_params(0.01)
        >>> tx = optclip.clip(rule, scope=optclip.scopes.leaf())

    Reference:
        Brock et al., High-Performance Large-Scale Image Recognition Without
        Normalization, 2021, https://arxiv.org/abs/2102.06171
    """
    _checks.threshold(ratio=ratio)
    _checks.non_negative(floor=floor)

    def limit_of(norm, context):
        size = jnp.maximum(context.params_norm().astype(norm.dtype), floor)
        return _both(ratio * size, norm)

    return _stateless(limit_of, "relative_to_params", needs_norms=True)
