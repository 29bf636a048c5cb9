"""Rules for entries: bounds by their own second moment, or by their leaf's maximum."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optclip import _checks
from optclip._numbers import increment, quotient
from optclip.rules._base import Limit, Rule
from optclip.rules._memory import (
    next_place,
    one,
    recorded_norm,
    remembering,
    rms_of_two,
    weight_of,
)

__all__ = ["MaximumState", "SecondMomentState", "max_ema", "second_moment"]


class SecondMomentState(NamedTuple):
    """State of `second_moment`.

    Attributes:
        root_moment: float32, as large as the leaf. Root of the running mean square.
        recorded: int32, one per leaf. Updates so far; with ``reset_every``, at the end
            of int32, a smaller number in the same phase.
    """

    root_moment: jax.Array
    recorded: jax.Array


def second_moment(
    ratio: jax.typing.ArrayLike,
    *,
    decay: jax.typing.ArrayLike = 0.999,
    floor: jax.typing.ArrayLike = 0.0,
    debias: bool = False,
    warmup_steps: jax.typing.ArrayLike = 0,
    reset_every: jax.typing.ArrayLike | None = None,
    pass_unseen: bool = True,
) -> Rule:
    """Returns the rule of SPAM and AdamWClip: a multiple of each entry's own size.

    With the running mean square v of an entry, clipped values recorded, the threshold
    is t = max(ratio * sqrt(v), floor), and then v = decay * v + (1 - decay) * u'**2.
    Scale invariant with ``floor=0``.

    Args:
        ratio: The multiple, at least 0: SPAM's is the root of its 5000.
        decay: At least 0 and below 1.
        floor: The smallest threshold, at least 0, in the unit of the entries.
        debias: Divide v by 1 - decay**step, as AdamWClip does and SPAM does not.
        warmup_steps: Number of the first update that may be clipped, counted from 1
            (SPAM: 20).
        reset_every: v restarts from 0 at each update whose number is a multiple of
            this; then ``warmup_steps`` updates are not clipped.
        pass_unseen: Pass an entry through whose v is 0. The originals clip it to the
            floor: with ``floor=0`` an entry that was zero so far then stays zero.

    Returns:
        A rule for `optclip.scopes.element`, with one float32 per entry and one int32
        per leaf.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> import optclip
        >>> rule = optclip.rules.second_moment(3.0, debias=True)
        >>> tx = optclip.clip(rule, scope=optclip.scopes.element())

    Reference:
        Huang et al., SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM
        Training, 2025, https://arxiv.org/abs/2501.06842
    """
    _checks.non_negative(ratio=ratio, floor=floor)
    _checks.decay(decay=decay)
    _checks.steps(warmup_steps=warmup_steps)
    if reset_every is not None:
        _checks.steps(reset_every=reset_every)
        _checks.positive(reset_every=reset_every)

    def init(norm):
        root = jnp.zeros(norm.shape, jnp.float32)
        return SecondMomentState(root, jnp.zeros([], jnp.int32))

    def update(norm, state, context):
        del context
        root, earlier = state
        number: Any = increment(state.recorded)
        phase = number
        if reset_every is not None:
            period = jnp.asarray(reset_every).astype(jnp.int32)
            number = next_place(state.recorded, period)
            phase = number % period
            root = jnp.where(phase == 0, 0.0, root)
            earlier = jnp.where(number < period, earlier, phase)
        size: Any = root
        if debias:
            size = root / jnp.sqrt(weight_of(decay, earlier, root.dtype))
        threshold = jnp.maximum(ratio * size, floor)
        if pass_unseen:
            threshold = jnp.where(root > 0, threshold, jnp.inf)
        threshold = jnp.where(
            jnp.minimum(phase, number) < warmup_steps, jnp.inf, threshold
        )
        limit = one(threshold)
        root = rms_of_two(decay, root, recorded_norm(norm, limit, "clipped"))
        return limit, SecondMomentState(root, number)

    return remembering(init, update, "second_moment", zeros=True)


class MaximumState(NamedTuple):
    """State of `max_ema`.

    Attributes:
        ema_maximum: float32 scalar, one per leaf. Running average of the largest entry.
        recorded: int32 scalar, one per leaf. Updates so far.
    """

    ema_maximum: jax.Array
    recorded: jax.Array


def max_ema(decay: jax.typing.ArrayLike = 0.999, *, record_zeros: bool = False) -> Rule:
    """Returns the rule of Stable-SPAM's AdaClip: an average of a leaf's largest entry.

    With G the largest magnitude of a leaf and T the bias-corrected running average of
    G, this step's included, an entry above T is multiplied by T / G: the largest entry
    becomes T, and what lies between shrinks with it. (So this is not a clamp: an entry
    just above T ends below one just under it, as in the original.) Entries that are NaN
    or infinite do not count for G, and an infinite entry is brought to T.

    Args:
        decay: At least 0 and below 1.
        record_zeros: Record leaves that are zero too, as the official code.

    Returns:
        A rule for `optclip.scopes.element`, with one float32 and one int32 per leaf.

    Raises:
        ValueError: If ``decay`` is out of range.

    Example:
        >>> import optclip
        >>> tx = optclip.clip(optclip.rules.max_ema(), scope=optclip.scopes.element())

    Reference:
        Huang et al., Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam,
        2025, https://arxiv.org/abs/2502.17055
    """
    _checks.decay(decay=decay)

    def init(norm):
        del norm
        return MaximumState(jnp.zeros([], jnp.float32), jnp.zeros([], jnp.int32))

    def update(norm, state, context):
        top = context.across(jnp.max(norm, initial=0.0))
        level = decay * state.ema_maximum + (1 - decay) * top
        count = increment(state.recorded)
        threshold = level / weight_of(decay, count, level.dtype)
        # At the first step both are the same number, up to rounding.
        threshold = jnp.where(state.recorded == 0, top, threshold)
        # Entries are divided first: their sum, in a derivative, might overflow.
        unit = jnp.broadcast_to(jnp.where(top > 0, top, 1.0), norm.shape)
        target = jnp.where(threshold < top, quotient(norm, unit) * threshold, norm)
        return Limit(threshold, target), MaximumState(level, count)

    rule = remembering(init, update, "max_ema", zeros=record_zeros)
    return rule._replace(elements_only=True)
