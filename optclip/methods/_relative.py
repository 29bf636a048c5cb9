"""Clips whose threshold is found in the parameters."""

from typing import Any

import jax

from optclip import _checks, actions, rules, scopes
from optclip._checks import EUCLIDEAN
from optclip.clipping import clip
from optclip.methods._fixed import Clip

__all__ = ["adaptive_grad_clip"]


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
    """Scales each output unit down whose norm is large beside that of its weights: AGC.

    For each unit with gradient norm n and weight norm w, u' = u * min(1, t / n) with
    t = clipping * max(w, eps). Put it before weight decay, and leave the last linear
    layer out with `optax.masked`, as the paper does.

    Units are the official code's and Optax's: a scalar or vector is one unit, a matrix
    is summed over axis 0, a kernel HWIO over axes 0 to 2. A leaf of rank 3 is summed
    over axis 0; for scan-stacked layers [layer, in, out] give ``axis``.

    Args:
        clipping: The largest ratio of the norms, at least 0.
        eps: The least norm that weights count with, at least 0, so that weights that
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
    _checks.non_negative(clipping=clipping, eps=eps)
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
