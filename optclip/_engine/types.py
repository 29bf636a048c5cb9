"""Types of arguments that many functions share."""

from __future__ import annotations

from typing import Literal, TypeAlias

import jax

__all__ = ["DType", "NonfinitePolicy", "Order", "RecordedNorm"]

# What happens to a group that holds a NaN or an infinity.
NonfinitePolicy: TypeAlias = Literal["propagate", "zero", "drop", "skip"]
# The order of a norm: a number of at least 1, inf or "rms".
Order: TypeAlias = float | Literal["rms"]
# Which norm enters the history of a rule: the norm before clipping, or after it.
RecordedNorm: TypeAlias = Literal["raw", "clipped"]
# The dtype that updates are returned in, or None for the dtype that they have.
DType: TypeAlias = jax.typing.DTypeLike | None
