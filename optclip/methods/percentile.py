"""Percentile clipping, as in bitsandbytes."""

from __future__ import annotations

from typing import Any

import jax

from optclip import scopes
from optclip._engine.types import DType, NonfinitePolicy
from optclip._engine.validation import Static
from optclip.clipping import clip_by_rule
from optclip.methods._common import Clip
from optclip.methods.autoclip import window_percentile

__all__ = ["percentile_clip"]

# An int default would be converted to an array by `optax.inject_hyperparams`.
WINDOW: Any = Static(100)


def percentile_clip(
    percentile: jax.typing.ArrayLike = 5.0,
    *,
    window: int = WINDOW,
    scope: scopes.Scope = scopes.leaf(),
    original: bool = False,
    nonfinite: NonfinitePolicy = "propagate",
    axis_name: Any = None,
    update_dtype: DType = None,
) -> Clip:
    """Clips to a percentile of the last hundred norms, as in bitsandbytes.

    u' = u * min(1, t / n), where t is a percentile of the last ``window`` norms,
    including the current norm. These norms are sorted in ascending order, and t is the
    norm at index ``percentile * window / 100``, rounded down. The first norm fills the
    whole window, so it determines the threshold of the first steps. The method is scale
    invariant. bitsandbytes removed this option in 2026.

    Args:
        percentile: The percentile, between 0 and 100.
        window: Number of norms in the window, at least 1.
        scope: A scope from `optclip.scopes`, which determines the entries that share
            one norm.
        original: Whether to record norms of zero, as in the original implementation.
        nonfinite: As in `optclip.clip_by_rule`.
        axis_name: As in `optclip.clip_by_rule`.
        update_dtype: As in `optclip.clip_by_rule`.

    Returns:
        A gradient transformation whose state is a `ClipState`; ``params`` is not used.

    Raises:
        ValueError: If an argument is out of range, or ``window`` is not an int.

    Example:
        >>> import optclip
        >>> tx = optclip.percentile_clip(5)

    Reference:
        Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022,
        https://arxiv.org/abs/2110.02861 (the paper does not describe this option)
    """
    rule = window_percentile(
        percentile, window=window, by_rank=True, record_zeros=original
    )
    return clip_by_rule(
        rule._replace(name="percentile_clip"),
        scope=scope,
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )
