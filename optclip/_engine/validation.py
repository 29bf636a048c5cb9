"""Validates hyperparameters once, when a transformation is built.

A hyperparameter may be a tracer, as under `optax.inject_hyperparams`, and a tracer does
not have a truth value. So only the values of Python and NumPy numbers are checked, not
the values of JAX arrays and tracers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax


def concrete(value: Any) -> Any:
    """Returns ``value`` if it is a Python number or a NumPy array, else None."""
    is_number = isinstance(value, (int, float, np.generic, np.ndarray))
    return None if isinstance(value, bool) or not is_number else value


def _require(rule: str, holds, named: dict[str, Any]) -> None:
    for name, value in named.items():
        if isinstance(value, (bool, str, bytes, type(None), complex)):
            raise TypeError(
                f"`{name}` must be a number {rule}, got {value!r} of type "
                f"{type(value).__name__}."
            )
        if callable(value):
            raise TypeError(
                f"`{name}` must be a number {rule}, got a function. To use a schedule, "
                "wrap the transformation in `optax.inject_hyperparams`."
            )
        if isinstance(value, Mapping):
            raise TypeError(
                f"`{name}` must be a number {rule} or an array, got a map. To use "
                "different values for different groups, give each group a rule: "
                "`optclip.clip_by_rule(optclip.rules.by_name({pattern: rule}), "
                "scope=...)`."
            )
        number = concrete(value)
        if number is None and not hasattr(value, "dtype"):
            raise TypeError(
                f"`{name}` must be a number {rule} or an array, got {value!r} of type "
                f"{type(value).__name__}."
            )
        if number is not None and not np.all(holds(number)):
            raise ValueError(f"`{name}` must be {rule}, got {value!r}.")


def positive(**named: Any) -> None:
    """Raises an error if any number is not positive. NaN is rejected."""
    _require("> 0", lambda x: x > 0, named)


def non_negative(**named: Any) -> None:
    """Raises an error if any number is negative or NaN."""
    _require(">= 0", lambda x: x >= 0, named)


def threshold(**named: Any) -> None:
    """Raises an error if any threshold is not a non-negative number."""
    for name, value in named.items():
        if value is None:
            raise TypeError(
                f"`{name}` must be a number >= 0, got None. Pass inf to switch "
                "clipping off."
            )
    non_negative(**named)


def fraction(**named: Any) -> None:
    """Raises an error if any number is not between 0 and 1. NaN is rejected."""
    _require("between 0 and 1", lambda x: (x >= 0) & (x <= 1), named)


def decay(**named: Any) -> None:
    """Raises an error if any number is not in [0, 1). NaN is rejected."""
    _require(">= 0 and < 1", lambda x: (x >= 0) & (x < 1), named)


def percentile(**named: Any) -> None:
    """Raises an error if any number is not between 0 and 100. NaN is rejected."""
    _require("between 0 and 100", lambda x: (x >= 0) & (x <= 100), named)


def not_nan(**named: Any) -> None:
    """Raises an error if any number is NaN."""
    _require("other than NaN", lambda x: x == x, named)


def size(name: str, value: Any, least: int = 1) -> int:
    """Validates an int that determines the shape of the state, and returns it."""
    value = value.value if isinstance(value, Static) else value
    known = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if known and value >= least:
        return int(value)
    hint = ""
    if hasattr(value, "dtype") and not known:
        hint = (
            " It determines the shape of the state, so it can't be an array. Under "
            f'`optax.inject_hyperparams` pass `static_args=("{name}",)`.'
        )
    raise ValueError(f"`{name}` must be an int >= {least}, got {value!r}.{hint}")


def steps(**named: Any) -> None:
    """Raises an error if any number is not a non-negative whole number."""
    _require("a whole number >= 0", lambda x: (x >= 0) & (x == np.floor(x)), named)


def one_of(name: str, value: Any, allowed: tuple) -> None:
    """Raises an error unless ``value`` is one of the ``allowed`` strings."""
    if value not in allowed:
        options = ", ".join(repr(a) for a in allowed)
        raise ValueError(f"`{name}` must be one of {options}, got {value!r}.")


class Static:
    """A default number that must be static, since compilation depends on it.

    `optax.inject_hyperparams` converts ints and floats to arrays, but not this class.
    """

    def __init__(self, value: int):
        """Stores ``value``."""
        self.value = value

    def __repr__(self) -> str:
        """Returns the repr of the number, for signatures."""
        return repr(self.value)

    def __float__(self) -> float:
        """Returns the number."""
        return float(self.value)


EUCLIDEAN: Any = Static(2)


def order(value: Any) -> float | str:
    """Returns the order of a norm as a static value: a float, inf or "rms"."""
    if isinstance(value, str) and value == "rms":
        return "rms"
    value = float(value) if isinstance(value, Static) else value
    known = isinstance(value, (int, float, np.generic)) and not isinstance(value, bool)
    if known and float(value) >= 1:
        return float(value)
    hint = ""
    if not known and hasattr(value, "dtype"):
        hint = (
            " The compiled program depends on the order, so it can't be an array. "
            'Under `optax.inject_hyperparams` pass `static_args=("ord",)`.'
        )
    raise ValueError(f'`ord` must be a number >= 1, inf or "rms", got {value!r}.{hint}')


def ordered(*, low: Any, high: Any) -> None:
    """Raises an error unless ``low <= high``. JAX arrays are not checked."""
    for name, value in (("low", low), ("high", high)):
        if isinstance(value, (bool, str, bytes, type(None), complex)):
            raise TypeError(f"`{name}` must be a number, got {value!r}.")
    a, b = concrete(low), concrete(high)
    if (a is not None and not a == a) or (b is not None and not b == b):
        raise ValueError(f"`low` and `high` must not be NaN, got {low!r} and {high!r}.")
    if a is not None and b is not None and not np.all(np.asarray(a) <= b):
        raise ValueError(f"`low` must be at most `high`, got {low!r} and {high!r}.")


def flag(name: str, value: Any) -> bool:
    """Returns ``value``, which must be True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"`{name}` must be True or False, got {value!r}.")
    return bool(value)


def instance(name: str, value: Any, kind: type, described: str) -> None:
    """Raises an error unless ``value`` is an instance of ``kind``."""
    if not isinstance(value, kind):
        raise TypeError(
            f"`{name}` must be a {kind.__name__} {described}, got {value!r}."
        )


def floating(name: str, value: Any) -> None:
    """Raises an error unless ``value`` is a real floating-point dtype."""
    try:
        known = jnp.issubdtype(jnp.dtype(value), jnp.floating)
    except TypeError:
        known = False
    if not known:
        raise ValueError(
            f"`{name}` must be a floating dtype such as jnp.float32, got {value!r}."
        )


def transformation(**named: Any) -> optax.GradientTransformationExtraArgs:
    """Returns the given transformation, with support for extra arguments."""
    ((name, value),) = named.items()
    if isinstance(value, optax.MultiSteps):
        raise TypeError(
            f"`{name}` must be a transformation, got `optax.MultiSteps`: pass what its "
            "method `gradient_transformation()` returns instead."
        )
    inner = getattr(value, "tx", None)
    if isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            f"`{name}` must be an Optax transformation, got {type(value).__name__}, "
            "which contains one: pass its `tx`."
        )
    if not isinstance(value, optax.GradientTransformation):
        raise TypeError(
            f"`{name}` must be an Optax transformation, such as `optax.adamw(1e-3)`, "
            f"got {value!r}."
        )
    return optax.with_extra_args_support(value)
