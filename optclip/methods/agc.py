"""AGC: clips the gradient of each unit relative to the norm of its parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from optclip import actions, scopes
from optclip._engine import validation
from optclip._engine.rule import Rule
from optclip._engine.thresholds import limit_at, stateless
from optclip._engine.types import Axis, DType, NonfinitePolicy, Order
from optclip._engine.validation import EUCLIDEAN
from optclip.clipping import clip_by_rule
from optclip.methods._common import Clip

__all__ = ["adaptive_grad_clip", "relative_to_params"]


def relative_to_params(
    ratio: jax.typing.ArrayLike, *, floor: jax.typing.ArrayLike = 1e-3
) -> Rule:
    """Returns the AGC rule: a fraction of the norm of the group's parameters.

    The threshold is ``ratio * max(norm of the parameters, floor)``. The floor allows
    updates to parameters that are zero.

    Args:
        ratio: Ratio of the threshold to the norm of the parameters, at least 0.
        floor: Lower bound on the norm of the parameters, at least 0.

    Returns:
        A stateless rule that requires ``params``.

    Raises:
        ValueError: If an argument is negative or NaN, or if ``update`` is called
            without ``params``.

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
    axis: Axis = None,
    *,
    ord: Order = EUCLIDEAN,
    nonfinite: NonfinitePolicy = "propagate",
    axis_name: Any = None,
    update_dtype: DType = None,
) -> Clip:
    """Clips each output unit relative to the norm of its weights (AGC).

    The gradient u of a unit with gradient norm n and weight norm w is scaled to u' =
    u * min(1, t / n), with the threshold t = clipping * max(w, eps). Chain this
    transformation before weight decay, and use `optax.masked` to exclude the last
    linear layer, as in the paper.

    Units are defined as in the official implementation and in Optax. A scalar or vector
    is a single unit. Norms are computed over axis 0 for leaves of rank 2 and 3, and
    over axes 0 to 2 for HWIO kernels. For scan-stacked layers of shape [layer, in,
    out], pass ``axis``. For an embedding of shape [vocab, dim], a unit is by default a
    column across the whole vocabulary. Pass ``axis={"embedding": 1}`` to make each row
    a unit.

    Args:
        clipping: Maximum ratio of the gradient norm to the weight norm, at least 0. A
            value of 0 sets all updates to zero, which stops training; inf disables
            clipping.
        eps: Lower bound on the weight norm, at least 0. It allows updates to weights
            that are zero.
        axis: Axes over which the norm of a unit is computed, as in
            `optclip.scopes.unit`.
        ord: As in `optclip.clip_by_global_norm`.
        nonfinite: As in `optclip.clip_by_rule`.
        axis_name: As in `optclip.clip_by_rule`, but not "auto".
        update_dtype: As in `optclip.clip_by_rule`.

    Returns:
        A gradient transformation whose state is a `ClipState`; it requires ``params``.

    Raises:
        ValueError: If an argument is negative or NaN, if ``axis`` does not match the
            leaves, or if ``params`` are missing.

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
