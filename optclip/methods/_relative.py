"""Clips whose threshold is found in the parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from optclip import _checks, actions, rules, scopes
from optclip._checks import EUCLIDEAN
from optclip.clipping import clip
from optclip.methods._fixed import Clip

__all__ = ["adaptive_grad_clip", "cap_update", "trust_ratio_clip"]


def adaptive_grad_clip(
    clipping: jax.typing.ArrayLike = 0.01,
    *,
    eps: jax.typing.ArrayLike = 1e-3,
    axis: Any = None,
    ord: float | str = EUCLIDEAN,
    nonfinite: str = "propagate",
    axis_name: Any = None,
    update_dtype: Any = None,
) -> Clip:
    """Scales down each output unit whose norm is large relative to its weights: AGC.

    For each unit with gradient norm n and weight norm w, u' = u * min(1, t / n) with
    t = clipping * max(w, eps). Put it before weight decay, and leave the last linear
    layer out with `optax.masked`, as the paper does.

    Units are the official code's and Optax's: a scalar or vector is one unit, a matrix
    is summed over axis 0, a kernel HWIO over axes 0 to 2. A leaf of rank 3 is summed
    over axis 0; for scan-stacked layers [layer, in, out] give ``axis``. An embedding
    [vocab, dim] has no output units in this sense: by default one unit is a column
    across the whole vocabulary. Give ``axis={"embedding": 1}`` to make each row a unit.

    Args:
        clipping: The largest ratio of the norms, at least 0. 0 gives zeros, which stops
            training; inf switches the clip off.
        eps: The smallest norm that weights count with, at least 0, so that weights that
            are zero can move.
        axis: The axes that a unit sums over, as in `optclip.scopes.unit`.
        ord: As in `optclip.clip_by_global_norm`.
        nonfinite: As in `optclip.clip`.
        axis_name: As in `optclip.clip`, but not "auto".
        update_dtype: As in `optclip.clip`.

    Returns:
        A transformation with `ClipState` that needs ``params``.

    Raises:
        ValueError: If a number is negative or NaN, ``axis`` does not fit, or ``params``
            are missing.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> tx = optclip.adaptive_grad_clip(0.1)
        >>> params = jnp.array([3.0, 4.0])
        >>> updates, _ = tx.update(jnp.array([0.0, 2.0]), tx.init(params), params)
        >>> updates.tolist()
        [0.0, 0.5]

    Reference:
        Brock et al., High-Performance Large-Scale Image Recognition Without
        Normalization, 2021, https://arxiv.org/abs/2102.06171
    """
    _checks.threshold(clipping=clipping)
    _checks.non_negative(eps=eps)
    rule = rules.relative_to_params(clipping, floor=eps)
    return clip(
        rule._replace(name="adaptive_grad_clip"),
        scope=scopes.unit(axis),
        ord=ord,
        action=actions.rescale,
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )


def cap_update(
    ratio: jax.typing.ArrayLike = 0.02,
    *,
    floor: jax.typing.ArrayLike = 1e-2,
    scope: scopes.Scope = scopes.tree(),
    nonfinite: str = "propagate",
    axis_name: Any = None,
    update_dtype: Any = None,
) -> Clip:
    """Bounds the final update to a share of the norm of the parameters.

    u' = u * min(1, ratio * max(w, floor) / r) with the root mean squares r of the
    update and w of the parameters; apart from the floor, the ratio of the norms. Put it
    last, after the learning rate: it is in the units of the parameters, so that one
    ratio fits any optimizer, loss and schedule. It prevents the divergence caused by a
    learning rate that is too high, which a clip of gradients can't see.

    Args:
        ratio: The largest ratio of update to parameters, at least 0. 0 gives zeros,
            which stops training; inf switches the cap off.
        floor: The smallest root mean square that parameters count with, at least 0, in
            the unit of the parameters, so that parameters that are zero can move.
        scope: Which entries share one ratio, from `optclip.scopes`.
        nonfinite: As in `optclip.clip`.
        axis_name: As in `optclip.clip`.
        update_dtype: As in `optclip.clip`.

    Returns:
        A transformation with `ClipState`, whose norms are root mean squares; it needs
        ``params``.

    Raises:
        ValueError: If a number is negative or NaN, or ``params`` are missing.

    Example:
        >>> import optax, optclip
        >>> tx = optax.chain(optax.adam(1e-3), optclip.cap_update(0.02))

    Reference:
        You et al., Large Batch Training of Convolutional Networks, 2017,
        https://arxiv.org/abs/1708.03888 (LARS, whose ratio this bounds)
    """
    rule = rules.relative_to_params(ratio, floor=floor)
    return clip(
        rule._replace(name="cap_update"),
        scope=scope,
        ord="rms",
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )


def trust_ratio_clip(
    coefficient: jax.typing.ArrayLike = 1.0,
    *,
    scope: scopes.Scope = scopes.leaf(),
    nonfinite: str = "propagate",
    axis_name: Any = None,
    update_dtype: Any = None,
) -> Clip:
    """Scales each leaf by its trust ratio, but never up: LAMBC, and LARC's clipping.

    u' = u * min(1, coefficient * w / n) with the norms n of the leaf and w of its
    parameters; unchanged where w is 0. After `optax.scale_by_adam` and the weight decay
    it is LAMB with the trust ratio clipped at 1. For LARC's, put it after the gradient
    with ``coefficient`` = its trust coefficient divided by the learning rate.

    Args:
        coefficient: At least 0. 0 gives zeros, which stops training; inf switches the
            clip off.
        scope: Which entries share one ratio, from `optclip.scopes`.
        nonfinite: As in `optclip.clip`.
        axis_name: As in `optclip.clip`.
        update_dtype: As in `optclip.clip`.

    Returns:
        A transformation with `ClipState` that needs ``params``.

    Raises:
        ValueError: If ``coefficient`` is negative or NaN, or ``params`` are missing.

    Example:
        >>> import optax, optclip
        >>> adam = optax.scale_by_adam()
        >>> tx = optax.chain(adam, optclip.trust_ratio_clip(), optax.scale(-1e-3))

    Reference:
        You et al., Large Batch Optimization for Deep Learning, 2020,
        https://arxiv.org/abs/1904.00962
    """
    _checks.threshold(coefficient=coefficient)

    def update(norm, state, context):
        size = context.params_norm().astype(norm.dtype)
        limit = jnp.where(size > 0, coefficient * size, jnp.inf)
        return rules.Limit(limit, limit), state

    rule = rules.Rule(lambda norm: (), update, "trust_ratio_clip")
    return clip(
        rule,
        scope=scope,
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )
