"""Clips of units and blocks, and the actions other than hard clipping, by name."""

from __future__ import annotations

import functools
from typing import Any

import jax

from optclip import _checks, actions, rules, scopes
from optclip._checks import EUCLIDEAN
from optclip.clipping import clip
from optclip.methods._fixed import Clip, Threshold, hard

__all__ = ["clip_by_block_rms", "clip_by_unit_norm", "normalize_by_norm", "soft_clip"]


def clip_by_unit_norm(
    max_norm: Threshold,
    *,
    axis: Any = None,
    ord: float | str = EUCLIDEAN,
    eps: jax.typing.ArrayLike = 0.0,
    nonfinite: str = "propagate",
    axis_name: Any = None,
    update_dtype: Any = None,
) -> Clip:
    """Scales down each output unit (neuron, filter) whose norm is above ``max_norm``.

    For each unit, u' = u * min(1, max_norm / (n + eps)) with n the norm of its entries.
    By default a matrix [in, out] is summed over axis 0. For an embedding [vocab, dim]
    that makes one unit of a column across the whole vocabulary, so that one bad row
    scales down all rows: give ``axis={"embedding": 1}`` to make each row a unit.

    Args:
        max_norm: The largest norm of a unit, at least 0: a number or schedule. 0 gives
            zeros, which stops training; inf switches the clip off.
        axis: The axes that a unit sums over, as in `optclip.scopes.unit`.
        ord: As in `clip_by_global_norm`.
        eps: As in `clip_by_global_norm`.
        nonfinite: As in `optclip.clip`.
        axis_name: As in `optclip.clip`, but not "auto".
        update_dtype: As in `optclip.clip`.

    Returns:
        A transformation with `ClipState`; ``params`` is not used.

    Raises:
        ValueError: As `clip_by_global_norm`, and in ``init`` if ``axis`` does not fit.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> tx = optclip.clip_by_unit_norm(1.0)
        >>> grads = jnp.array([[0.0, 0.1], [4.0, 0.0]])  # [in, out]
        >>> tx.update(grads, tx.init(grads))[0].round(3).tolist()
        [[0.0, 0.10000000149011612], [1.0, 0.0]]
        >>> tx = optclip.clip_by_unit_norm(1.0, axis={"embedding": 1})
        >>> grads = {"embedding": jnp.array([[0.0, 0.5], [0.0, 8.0]])}  # [vocab, dim]
        >>> tx.update(grads, tx.init(grads))[0]["embedding"].tolist()
        [[0.0, 0.5], [0.0, 1.0]]
    """
    return clip(
        rules.fixed(max_norm, "max_norm"),
        scope=scopes.unit(axis),
        ord=ord,
        action=hard(eps),
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )


def clip_by_block_rms(
    threshold: Threshold = 1.0,
    *,
    nonfinite: str = "propagate",
    axis_name: Any = None,
    update_dtype: Any = None,
) -> Clip:
    """Scales down each leaf whose root mean square is above ``threshold``.

    For each leaf, u' = u / max(1, rms(u) / threshold): Adafactor's update clipping, and
    with ``threshold=1.0`` its default. Placed after `optax.scale_by_adam`, it is the
    composable form of StableAdamW's.

    Args:
        threshold: The largest root mean square, at least 0: a number, array (one entry
            per leaf) or schedule. 0 gives zeros, which stops training; inf switches the
            clip off.
        nonfinite: As in `optclip.clip`.
        axis_name: As in `optclip.clip`.
        update_dtype: As in `optclip.clip`.

    Returns:
        A transformation with `ClipState`; ``params`` is not used.

    Raises:
        ValueError: If ``threshold`` is negative or NaN.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> tx = optclip.clip_by_block_rms(1.0)
        >>> grads = jnp.array([2.0, -2.0])
        >>> tx.update(grads, tx.init(grads))[0].tolist()
        [1.0, -1.0]

    Reference:
        Shazeer and Stern, Adafactor, 2018, https://arxiv.org/abs/1804.04235
    """
    return clip(
        rules.fixed(threshold, "threshold"),
        scope=scopes.leaf(),
        ord="rms",
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )


def normalize_by_norm(
    target: Threshold = 1.0,
    *,
    eps: jax.typing.ArrayLike = 0.0,
    scope: scopes.Scope = scopes.tree(),
    ord: float | str = EUCLIDEAN,
    nonfinite: str = "propagate",
    axis_name: Any = None,
    update_dtype: Any = None,
) -> Clip:
    """Scales each group, up or down, to the norm ``target``: normalised gradients.

    u' = u * target / (n + eps); a zero group stays zero. With ``eps=1e-6`` this is
    `optax.normalize_by_update_norm`. The norm of a gradient no longer counts, so the
    learning rate has to be tuned again, and should decay.

    Args:
        target: The norm to scale to, at least 0: a number, array or schedule. 0 gives
            zeros, which stops training; inf leaves the updates as they are.
        eps: Added to the norm, at least 0.
        scope: Which entries share one norm, from `optclip.scopes`.
        ord: As in `clip_by_global_norm`.
        nonfinite: As in `optclip.clip`.
        axis_name: As in `optclip.clip`.
        update_dtype: As in `optclip.clip`.

    Returns:
        A transformation with `ClipState`; ``params`` is not used.

    Raises:
        ValueError: If a number is negative or NaN.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> tx = optclip.normalize_by_norm()
        >>> grads = jnp.array([0.0, 0.01])
        >>> tx.update(grads, tx.init(grads))[0].tolist()
        [0.0, 1.0]

    Reference:
        Cutkosky and Mehta, Momentum Improves Normalized SGD, 2020,
        https://arxiv.org/abs/2002.03305
    """
    _checks.non_negative(eps=eps)
    return clip(
        rules.fixed(target, "target"),
        scope=scope,
        ord=ord,
        action=functools.partial(actions.normalize, eps=eps),
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )


def soft_clip(
    max_norm: Threshold,
    *,
    kind: str = "rational",
    scope: scopes.Scope = scopes.tree(),
    ord: float | str = EUCLIDEAN,
    nonfinite: str = "propagate",
    axis_name: Any = None,
    update_dtype: Any = None,
) -> Clip:
    """Scales every group down smoothly, so that no norm reaches ``max_norm``.

    With r = n / max_norm, a group of norm n is scaled to ``max_norm * f(r)``; the four
    curves f are those of `optclip.actions.soften`. There is no kink at the threshold,
    and every group is scaled down a little: small ones hardly, large ones a lot.

    Args:
        max_norm: The bound, at least 0: a number, array or schedule. 0 gives zeros,
            which stops training; inf switches the clip off.
        kind: "rational", "tanh", "atan" or "sqrt".
        scope: Which entries share one norm, from `optclip.scopes`.
        ord: As in `clip_by_global_norm`.
        nonfinite: As in `optclip.clip`.
        axis_name: As in `optclip.clip`.
        update_dtype: As in `optclip.clip`.

    Returns:
        A transformation with `ClipState`; ``params`` is not used.

    Raises:
        ValueError: If ``max_norm`` is negative or NaN, or there is no such kind.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> tx = optclip.soft_clip(1.0)
        >>> grads = jnp.array([0.0, 3.0])
        >>> tx.update(grads, tx.init(grads))[0].tolist()
        [0.0, 0.75]
    """
    return clip(
        rules.fixed(max_norm, "max_norm"),
        scope=scope,
        ord=ord,
        action=actions.soften(kind),
        nonfinite=nonfinite,
        axis_name=axis_name,
        update_dtype=update_dtype,
    )
