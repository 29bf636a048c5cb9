"""Clips with a threshold given by the user: a number, an array or a schedule.

All take the engine's common options, which `optclip.clip` explains: ``nonfinite``,
``axis_name`` and ``update_dtype``. A threshold of 0 gives zeros, and so stops training;
inf switches a clip off, and None is an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from optclip import _checks, actions, rules, scopes
from optclip._checks import EUCLIDEAN
from optclip.clipping import clip

__all__ = [
    "clip_by_global_norm",
    "clip_by_leaf_norm",
    "clip_by_value",
    "clip_per_layer",
]

Threshold: TypeAlias = (
    jax.typing.ArrayLike | Callable[[jax.Array], jax.typing.ArrayLike]
)
Clip: TypeAlias = optax.GradientTransformationExtraArgs


def hard(eps: Any) -> actions.Action:
    """Returns the action of hard clipping with ``eps`` added to the norm, as torch."""
    _checks.non_negative(eps=eps)
    exact = isinstance(eps, (int, float)) and eps == 0
    return actions.rescale if exact else functools.partial(actions.rescale, eps=eps)


def strict(eps: float) -> actions.Action:
    """Returns the same, but only for norms that are above the threshold without eps."""

    def action(norm, limit):
        scale = actions.rescale(norm, limit, eps=eps)
        return jnp.where(norm > limit.threshold, scale, 1.0)

    return action


def clip_by_value(
    max_value: Threshold | tuple[jax.typing.ArrayLike, jax.typing.ArrayLike],
    *,
    nonfinite: str = "propagate",
    axis_name: Any = None,
    update_dtype: Any = None,
    record: bool = False,
) -> Clip:
    """Clips each entry to [-max_value, max_value], or to [low, high].

    u' = sign(u) * min(|u|, max_value). A complex entry keeps its direction, and its
    magnitude is bounded. Infinite entries become the bound; NaN stays NaN unless
    ``nonfinite`` says otherwise.

    Args:
        max_value: The largest magnitude, at least 0: a number, an array, a schedule; or
            a pair (low, high) of numbers or arrays, for real updates. 0 gives zeros,
            which stops training; inf switches the clip off.
        nonfinite: As in `optclip.clip`.
        axis_name: As in `optclip.clip`.
        update_dtype: As in `optclip.clip`.
        record: Whether to keep figures for `metrics` and `culprits`, whose norms are
            largest magnitudes. That takes one more read of the updates; without it
            the clamp melts into the optimizer and costs nothing beside it.

    Returns:
        A transformation with `UnrecordedState`, or with ``record`` `ClipState`;
        ``params`` is not used.

    Raises:
        ValueError: If a bound is negative or NaN, or ``low`` is above ``high``.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> tx = optclip.clip_by_value(1.0)
        >>> grads = jnp.array([-3.0, 0.5, 2.0])
        >>> tx.update(grads, tx.init(grads))[0].tolist()
        [-1.0, 0.5, 1.0]

    Reference:
        Mikolov, Statistical Language Models Based on Neural Networks, 2012.
    """
    if isinstance(max_value, (tuple, list)):
        if len(max_value) != 2:
            raise ValueError(
                "`max_value` must be a number or a pair (low, high), got "
                f"{max_value!r}."
            )
        rule = rules.interval(*max_value)
    else:
        rule = rules.fixed(max_value, "max_value")
    return clip(
        rule,
        scope=scopes.element(),
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
        record=record,
    )


def clip_by_global_norm(
    max_norm: Threshold,
    *,
    ord: float | str = EUCLIDEAN,
    eps: jax.typing.ArrayLike = 0.0,
    nonfinite: str = "propagate",
    axis_name: Any = None,
    update_dtype: Any = None,
) -> Clip:
    """Scales all updates down together if their joint norm is above ``max_norm``.

    u' = u * min(1, max_norm / (n + eps)) with n the norm of all updates. With ``eps=0``
    this is what `optax.clip_by_global_norm` computes where that is right; with
    ``eps=1e-6``, ``torch.nn.utils.clip_grad_norm_``. Entries whose squares overflow or
    underflow are clipped like all others.

    Args:
        max_norm: The largest norm, at least 0: a number, an array or a schedule. 0
            gives zeros, which stops training; inf switches the clip off.
        ord: The norm's order: a number of at least 1, inf or "rms".
        eps: Added to the norm, at least 0, in the unit of the norm: norms that are not
            far above it are scaled down as well.
        nonfinite: As in `optclip.clip`.
        axis_name: As in `optclip.clip`.
        update_dtype: As in `optclip.clip`.

    Returns:
        A transformation with `ClipState`; ``params`` is not used.

    Raises:
        ValueError: If a number is negative or NaN, or an option is not one of those
            named.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> tx = optclip.clip_by_global_norm(1.0)
        >>> grads = {"w": jnp.array([0.0, 3.0]), "b": jnp.array(4.0)}
        >>> updates, state = tx.update(grads, tx.init(grads))
        >>> round(float(updates["w"][1]), 6), round(float(updates["b"]), 6)
        (0.6, 0.8)

    Reference:
        Pascanu et al., On the difficulty of training recurrent neural
        networks, 2013, https://arxiv.org/abs/1211.5063
    """
    return clip(
        rules.fixed(max_norm, "max_norm"),
        ord=ord,
        action=hard(eps),
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )


def clip_by_leaf_norm(
    max_norm: Threshold,
    *,
    ord: float | str = EUCLIDEAN,
    eps: jax.typing.ArrayLike = 0.0,
    nonfinite: str = "propagate",
    axis_name: Any = None,
    update_dtype: Any = None,
) -> Clip:
    """Scales down each leaf whose norm is above ``max_norm``.

    For each leaf, u' = u * min(1, max_norm / (n + eps)) with n its own norm. Prefer it
    where one part of a model explodes and should not slow down the others; it changes
    the direction of the whole update.

    Args:
        max_norm: The largest norm of a leaf, at least 0: a number, a schedule, or an
            array with one entry for each leaf. 0 gives zeros, which stops training; inf
            switches the clip off.
        ord: As in `clip_by_global_norm`.
        eps: As in `clip_by_global_norm`.
        nonfinite: As in `optclip.clip`.
        axis_name: As in `optclip.clip`.
        update_dtype: As in `optclip.clip`.

    Returns:
        A transformation with `ClipState`; ``params`` is not used.

    Raises:
        ValueError: As `clip_by_global_norm`.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> tx = optclip.clip_by_leaf_norm(1.0)
        >>> grads = {"w": jnp.array([0.0, 4.0]), "b": jnp.array(0.5)}
        >>> updates, _ = tx.update(grads, tx.init(grads))
        >>> updates["w"].tolist(), float(updates["b"])
        ([0.0, 1.0], 0.5)
    """
    return clip(
        rules.fixed(max_norm, "max_norm"),
        scope=scopes.leaf(),
        ord=ord,
        action=hard(eps),
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )


def clip_per_layer(
    max_norm: Threshold,
    stack_axes: Any,
    *,
    ord: float | str = EUCLIDEAN,
    eps: jax.typing.ArrayLike = 0.0,
    nonfinite: str = "propagate",
    axis_name: Any = None,
    update_dtype: Any = None,
) -> Clip:
    """Scales down each layer of scan-stacked leaves whose norm is above ``max_norm``.

    As `clip_by_leaf_norm`, but a leaf of shape [layers, ...] that ``jax.lax.scan`` runs
    over is clipped as that many leaves.

    Args:
        max_norm: The largest norm of a layer, at least 0: a number, array or schedule.
            0 gives zeros, which stops training; inf switches the clip off.
        stack_axes: How many leading axes count layers: an int for all leaves, a
            function of the path, or a map from regular expression to int.
        ord: As in `clip_by_global_norm`.
        eps: As in `clip_by_global_norm`.
        nonfinite: As in `optclip.clip`.
        axis_name: As in `optclip.clip`.
        update_dtype: As in `optclip.clip`.

    Returns:
        A transformation with `ClipState`; ``params`` is not used.

    Raises:
        ValueError: As `clip_by_global_norm`, and in ``init`` if a leaf has fewer axes.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> tx = optclip.clip_per_layer(1.0, {"blocks": 1})
        >>> grads = {"blocks": jnp.array([[0.0, 2.0], [0.0, 0.5]])}
        >>> tx.update(grads, tx.init(grads))[0]["blocks"].tolist()
        [[0.0, 1.0], [0.0, 0.5]]
    """
    return clip(
        rules.fixed(max_norm, "max_norm"),
        scope=scopes.layer(stack_axes),
        ord=ord,
        action=hard(eps),
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )
