"""Types of arguments that are shared by many functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias

import jax

__all__ = [
    "Axis",
    "DType",
    "NonfinitePolicy",
    "Order",
    "RecordedNorm",
    "StackAxes",
]

# What happens to a group that contains NaN or infinity.
NonfinitePolicy: TypeAlias = Literal["propagate", "zero", "drop", "skip"]
# The order of a norm: a number that is at least 1, inf or "rms".
Order: TypeAlias = float | Literal["rms"]
# Which norm a rule adds to its history: the norm before or after clipping.
RecordedNorm: TypeAlias = Literal["raw", "clipped"]
# The dtype in which updates are returned, or None to keep their dtype.
DType: TypeAlias = jax.typing.DTypeLike | None
# The axes that a unit is summed over: the same for all leaves, a function of the path,
# or a map from regular expressions. None means the default axes.
Axes: TypeAlias = int | Sequence[int] | None
Axis: TypeAlias = Axes | Callable[[str], Axes] | Mapping[str, Axes]
# The number of leading axes that index layers, given in the same ways. None means 0.
StackAxes: TypeAlias = int | Callable[[str], int | None] | Mapping[str, int]
