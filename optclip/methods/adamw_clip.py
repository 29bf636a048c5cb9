"""AdamWClip: clips entries that are large relative to their own second moment."""

from __future__ import annotations

from typing import Any

import jax

from optclip import scopes
from optclip._engine.types import DType, NonfinitePolicy
from optclip.clipping import clip_by_rule
from optclip.methods._common import Clip
from optclip.methods.spam import second_moment

__all__ = ["adamw_clip"]


def adamw_clip(
    ratio: jax.typing.ArrayLike = 3.0,
    *,
    decay: jax.typing.ArrayLike = 0.999,
    floor: jax.typing.ArrayLike | None = None,
    original: bool = False,
    nonfinite: NonfinitePolicy = "propagate",
    axis_name: Any = None,
    update_dtype: DType = None,
) -> Clip:
    """Clips each entry to a multiple of its own root mean square (AdamWClip).

    Each entry u is clipped to u' = sign(u) * min(|u|, max(ratio * sqrt(v), floor)),
    where v is the bias-corrected moving average of the previous values of u'**2. An
    entry is not clipped while its v is 0. The method is scale invariant if ``floor=0``.

    Args:
        ratio: Ratio of the threshold to the root mean square, at least 0.
        decay: Decay rate of v, at least 0 and below 1; Adam's ``b2``.
        floor: Lower bound on the threshold, at least 0, in the units of the gradient.
            None means 0, or 1e-10 with ``original``.
        original: Whether to follow the original implementation, which clips an entry to
            ``floor`` while its v is 0. By default, the first updates are then 1e-10 and
            grow by a factor of at most ``ratio`` per step. With ``floor=0``, they stay
            zero permanently.
        nonfinite: As in `optclip.clip_by_rule`.
        axis_name: As in `optclip.clip_by_rule`.
        update_dtype: As in `optclip.clip_by_rule`.

    Returns:
        A gradient transformation whose state is a `ClipState`; ``params`` is not used.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import optclip
        >>> tx = optclip.adamw_clip(3.0)

    Reference:
        The package adamwclip, version 0.1.4.
    """
    if floor is None:
        floor = 1e-10 if original else 0.0
    rule = second_moment(
        ratio, decay=decay, floor=floor, debias=True, pass_unseen=not original
    )
    return clip_by_rule(
        rule._replace(name="adamw_clip"),
        scope=scopes.element(),
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )
