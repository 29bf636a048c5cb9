"""The clip with nothing to pick: both halves around any optimizer."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optclip import _checks, _state, _trees, methods, scopes
from optclip._state import ClipState

__all__ = ["StabilizeState", "stabilize"]


class StabilizeState(NamedTuple):
    """State of `stabilize`.

    Attributes:
        gradient_clip: `ClipState` of the quantile clip, `clip` in the metrics.
        optimizer_state: State of the optimizer inside.
        update_cap: `ClipState` of the cap on the update, `clip_2` in the metrics.
    """

    gradient_clip: ClipState
    optimizer_state: Any
    update_cap: ClipState


def stabilize(
    optimizer: optax.GradientTransformation,
    *,
    quantile: jax.typing.ArrayLike = 0.1,
    margin: jax.typing.ArrayLike = 2.0,
    rate: jax.typing.ArrayLike = 0.05,
    warmup_steps: jax.typing.ArrayLike = 5,
    max_ratio: jax.typing.ArrayLike = 0.02,
    floor: jax.typing.ArrayLike = 1e-2,
    scope: scopes.Scope = scopes.tree(),
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that neither bad batches nor large steps derail it.

    Three guards, and no threshold in the unit of your gradients:

    1. the gradients are clipped to ``margin`` times a low quantile of their norm so
       far (`quantile_clip`), against bad batches, at any loss scale;
    2. a step whose gradients hold NaN or inf, or are longer than 1e18 even when
       clipped, is left out: zero updates, and the optimizer's state as it was;
    3. the final update is at most ``max_ratio`` of the parameters in root mean square
       (`cap_update`), against a learning rate that is too high.

    Each of the first and third fails alone where the other holds. In the metrics they
    are the first and the last clip: `clip` and `clip_2`, unless the optimizer has clips
    of its own.

    Args:
        optimizer: Any Optax optimizer, its learning rate included.
        quantile: As in `quantile_clip`.
        margin: As in `quantile_clip`.
        rate: As in `quantile_clip`.
        warmup_steps: As in `quantile_clip`.
        max_ratio: The ratio of `cap_update`.
        floor: As in `cap_update`.
        scope: Which entries share one norm, in both clips: `optclip.scopes.tree()`, or
            `optclip.scopes.leaf()` for a quantile and a cap of each leaf.
        axis_name: As in `optclip.clip`.

    Returns:
        A transformation with `StabilizeState` that needs ``params``. It is the whole
        optimizer: chain nothing after it.

    Raises:
        ValueError: If a number is out of range, or ``params`` are missing.

    Example:
        >>> import jax.numpy as jnp, optax, optclip
        >>> tx = optclip.stabilize(optax.adamw(1e-3))
        >>> params = jnp.ones(3)
        >>> updates, state = tx.update(jnp.ones(3), tx.init(params), params)
        >>> sorted(optclip.metrics(state))[:2]
        ['clip/clipped', 'clip/clipped_fraction']
    """
    inner: Any = _checks.transformation(optimizer=optimizer)
    _checks.non_negative(max_ratio=max_ratio)
    first: Any = methods.quantile_clip(
        quantile, margin=margin, rate=rate, warmup_steps=warmup_steps, scope=scope,
        nonfinite="skip", axis_name=axis_name,
    )  # fmt: skip
    last: Any = methods.cap_update(
        max_ratio, floor=floor, scope=scope, nonfinite="skip", axis_name=axis_name
    )

    def init_fn(params) -> Any:
        return StabilizeState(first.init(params), inner.init(params), last.init(params))

    def update_fn(updates, state, params=None, **extra_args) -> Any:
        if params is None:
            raise ValueError(
                "`stabilize` compares the update with the parameters: call "
                "`update(updates, state, params)`."
            )
        # The clips look at their own states, and the optimizer at its own.
        parts = StabilizeState._fields
        state = _state.own(state, lambda: StabilizeState._make(((), (), ())), parts)
        clip_state: Any
        cap_state: Any
        clipped, clip_state = first.update(updates, state.gradient_clip, params)
        before = state.gradient_clip.seen.nonfinite_steps
        bad = clip_state.seen.nonfinite_steps != before
        # An optimizer that squares such a gradient would keep an infinity for good.
        bad |= clip_state.norm_after > 1e18
        out, after = inner.update(clipped, state.optimizer_state, params, **extra_args)
        if isinstance(out, optax.LookaheadParams):
            raise ValueError(
                "`stabilize` can't wrap `optax.lookahead`, whose updates come in "
                "pairs. Put it inside: `optax.lookahead(optclip.stabilize(...), ...)`."
            )

        after = _state.chosen(bad, state.optimizer_state, after)
        out = jax.tree.map(lambda u: jnp.where(bad, jnp.zeros_like(u), u), out)
        # Optimizers give floats for integer leaves, which pass through as they came.
        out = _trees.leaves_of(updates).rebuild(_trees.matching(updates, out))
        capped, cap_state = last.update(out, state.update_cap, params)
        return capped, StabilizeState(clip_state, after, cap_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
