"""AGC: the norm of a unit's gradient, relative to that of its parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from optclip import actions, scopes
from optclip._engine import validation
from optclip._engine.rule import Rule
from optclip._engine.thresholds import limit_at, stateless
from optclip._engine.types import DType, NonfinitePolicy, Order
from optclip._engine.validation import EUCLIDEAN
from optclip.clipping import clip_by_rule
from optclip.methods._common import Clip

__all__ = ["adaptive_grad_clip", "relative_to_params"]


def relative_to_params(
    ratio: jax.typing.ArrayLike, *, floor: jax.typing.ArrayLike = 1e-3
) -> Rule:
    """Returns the rule of AGC: a share of the norm of the group's parameters.

    The threshold is ``ratio * max(norm of the parameters, floor)``, so that parameters
    that are still zero can move.

    Args:
        ratio: The share; a number of at least 0.
        floor: The least norm that parameters count with; at least 0.

    Returns:
        A stateless rule that needs ``params``.

    Raises:
        ValueError: If a number is negative or NaN; in ``update``, if ``params`` are
            missing.

    Example:
        >>> import optclip
        >>> rule = optclip.rules.relative_to_params(0.01)
        >>> tx = optclip.clip_by_rule(rule, scope=optclip.scopes.leaf())

    Reference:
        Brock et al., High-Performance Large-Scale Image Recognition Without
        Normalization, 2021, https://arxiv.org/abs/2102.06171
    """
    validation.threshold(ratio=ratio)
    validation.non_negative(floor=floor)

    def limit_of(norm, context):
        size = jnp.maximum(context.params_norm().astype(norm.dtype), floor)
        return limit_at(ratio * size, norm)

    return stateless(limit_of, "relative_to_params", needs_norms=True)


def adaptive_grad_clip(
    clipping: jax.typing.ArrayLike = 0.01,
    eps: jax.typing.ArrayLike = 1e-3,
    axis: Any = None,
    *,
    ord: Order = EUCLIDEAN,
    nonfinite: NonfinitePolicy = "propagate",
    axis_name: Any = None,
    update_dtype: DType = None,
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
        nonfinite: As in `optclip.clip_by_rule`.
        axis_name: As in `optclip.clip_by_rule`, but not "auto".
        update_dtype: As in `optclip.clip_by_rule`.

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
    validation.threshold(clipping=clipping)
    validation.non_negative(eps=eps)
    rule = relative_to_params(clipping, floor=eps)
    return clip_by_rule(
        rule._replace(name="adaptive_grad_clip"),
        scope=scopes.unit(axis),
        ord=ord,
        action=actions.rescale,
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )
