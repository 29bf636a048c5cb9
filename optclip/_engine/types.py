"""Types of arguments that many functions share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias

import jax

__all__ = ["Axis", "DType", "NonfinitePolicy", "Order", "RecordedNorm"]

# What happens to a group that holds a NaN or an infinity.
NonfinitePolicy: TypeAlias = Literal["propagate", "zero", "drop", "skip"]
# The order of a norm: a number of at least 1, inf or "rms".
Order: TypeAlias = float | Literal["rms"]
# Which norm enters the history of a rule: the norm before clipping, or after it.
RecordedNorm: TypeAlias = Literal["raw", "clipped"]
# The dtype that updates are returned in, or None for the dtype that they have.
DType: TypeAlias = jax.typing.DTypeLike | None
# The axes that a unit is summed over: of all leaves, by a function of the path, or by a
# map from regular expression. None stands for the default axes.
Axes: TypeAlias = int | Sequence[int] | None
Axis: TypeAlias = Axes | Callable[[str], Axes] | Mapping[str, Axes]
