"""Bounds the update relative to the parameters."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optclip import scopes
from optclip._engine import validation
from optclip._engine.numerics import increment, quotient
from optclip._engine.rule import Rule
from optclip._engine.types import DType, NonfinitePolicy
from optclip.clipping import clip_by_rule
from optclip.methods._common import Clip
from optclip.methods._history import counts, guard_statistics, one

__all__ = ["UpdateCapState", "cap_update", "update_cap"]

# One step counts as at most this multiple of the average excess m so far, or of 1 if m
# is smaller. A spike in step k therefore multiplies an average above 1 by at most
# 1 + 2 / k, and a persistent excess E is reached after about sqrt(2 * E) steps.
LARGEST_JUMP = 3.0


class UpdateCapState(NamedTuple):
    """State of `optclip.rules.update_cap`.

    Attributes:
        mean_excess: float32, one per group. Average ratio of the update to its cap.
        recorded: int32, one per group. Number of updates recorded.
    """

    mean_excess: jax.Array
    recorded: jax.Array


def update_cap(
    ratio: jax.typing.ArrayLike = 0.04,
    *,
    floor: jax.typing.ArrayLike | None = None,
    ramp_steps: jax.typing.ArrayLike = 200,
    lasting: bool = True,
) -> Rule:
    """Returns the rule of `optclip.cap_update`.

    With the norm r of the update in step k, the norm w of the parameters, and the
    average excess m over all steps so far (initially 1):

        c = ratio * max(w, floor)
        m = m + (min(r / c, 3 * max(m, 1)) - m) / k
        d = ratio * w * max(0, 1 - k / ramp_steps)
        t = c - d if m <= 1 else min(c - d, r / m)

    Args:
        ratio: As in `optclip.cap_update`.
        floor: As in `optclip.cap_update`, in the units of the norm.
        ramp_steps: As in `optclip.cap_update`.
        lasting: As in `optclip.cap_update`.

    Returns:
        A rule whose state is an `UpdateCapState`; it requires ``params``.

    Raises:
        ValueError: If an argument is out of range, or if ``update`` is called without
            ``params``.

    Example:
        >>> import optclip
        >>> tx = optclip.clip_by_rule(optclip.rules.update_cap(0.04), ord="rms")
    """
    validation.threshold(ratio=ratio)
    if floor is not None:
        validation.non_negative(floor=floor)
    validation.steps(ramp_steps=ramp_steps)

    def init(norm):
        ones = jnp.ones(norm.shape, jnp.float32)
        return UpdateCapState(ones, counts(norm))

    def update(norm, state, context):
        # Arguments may be arrays of other dtypes, which strict promotion rejects.
        share, steps, lower = (
            jnp.asarray(x).astype(norm.dtype)
            for x in (
                ratio,
                jnp.maximum(ramp_steps, 1),
                context.initial_norm() if floor is None else floor,
            )
        )
        size = context.params_norm().astype(norm.dtype)
        cap = share * jnp.maximum(size, lower)
        count = increment(state.recorded)
        number = count.astype(norm.dtype)
        excess = jnp.where(cap > 0, quotient(norm, jnp.where(cap > 0, cap, 1)), 0)
        most = LARGEST_JUMP * jnp.maximum(state.mean_excess, 1)
        mean = state.mean_excess
        mean = mean + (jnp.minimum(excess, most) - mean) / number
        grown = jnp.minimum(1, number / steps)
        # The floor has no ramp: steps that are small relative to a typical initial
        # scale are safe, and parameters that start at zero need them.
        limit = share * jnp.maximum(grown * size, lower - (1 - grown) * size)
        if lasting:
            lowered = jnp.minimum(limit, norm / jnp.maximum(mean, 1))
            limit = jnp.where(mean > 1, lowered, limit)
        return one(limit), UpdateCapState(mean, count)

    return guard_statistics(init, update, "update_cap", zeros=False)


def cap_update(
    ratio: jax.typing.ArrayLike = 0.04,
    *,
    floor: jax.typing.ArrayLike | None = None,
    ramp_steps: jax.typing.ArrayLike = 200,
    lasting: bool = True,
    scope: scopes.Scope = scopes.tree(),
    nonfinite: NonfinitePolicy = "propagate",
    axis_name: Any = None,
    update_dtype: DType = None,
) -> Clip:
    """Bounds the final update relative to the norm of the parameters.

    In step k, u' = u * min(1, c / r, 1 / m) with the cap c = ratio * max(w, floor), the
    root mean squares r of the update and w of the parameters, and the average m of r /
    c over all steps so far. In the first ``ramp_steps`` steps, the first factor has a
    smaller cap, c - ratio * w * (1 - k / ramp_steps).

    Chain it last, after the learning rate: there, updates have the units of the
    parameters, so the same ratio fits any optimizer, loss and schedule. It prevents the
    divergence caused by a learning rate that is too high, which clipping the gradients
    cannot prevent. The factor 1 / m lowers a learning rate that is too high instead of
    making all updates equally large, so that a schedule still decays them. The
    contribution of a single update to m is capped at 3 * max(m, 1).

    Args:
        ratio: Largest ratio of the update to the parameters, at least 0. A
            value of 0 sets all updates to zero, which stops training; inf disables the
            cap.
        floor: Lower bound on the root mean square of the parameters, at least 0, in the
            units of the parameters, so that parameters that are zero can change. None
            means that each entry of a leaf with N entries counts as N**(-1/4), which
            for a square matrix is the typical scale of its initialization.
        ramp_steps: Number of steps in which the cap rises linearly to its full value,
            as in a warm-up of the learning rate; 0 for no ramp. It rises from
            ``ratio * max(0, floor - w)``, so parameters that are zero have no ramp.
        lasting: Whether to divide updates by the average excess m if it is above 1.
        scope: Which entries share one ratio; a scope from `optclip.scopes`.
        nonfinite: As in `optclip.clip_by_rule`.
        axis_name: As in `optclip.clip_by_rule`.
        update_dtype: As in `optclip.clip_by_rule`.

    Returns:
        A gradient transformation whose state is a `ClipState`, in which norms are root
        mean squares; it needs ``params``.

    Raises:
        ValueError: If an argument is negative or NaN, or ``params`` are missing.

    Example:
        >>> import optax, optclip
        >>> tx = optax.chain(optax.adam(1e-3), optclip.cap_update(0.04))

    Reference:
        You et al., Large Batch Training of Convolutional Networks, 2017,
        https://arxiv.org/abs/1708.03888 (LARS, whose ratio this bounds)
    """
    rule = update_cap(ratio, floor=floor, ramp_steps=ramp_steps, lasting=lasting)
    return clip_by_rule(
        rule._replace(name="cap_update"),
        scope=scope,
        ord="rms",
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )
