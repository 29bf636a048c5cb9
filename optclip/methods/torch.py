"""Pure counterparts of the gradient clipping functions in ``torch.nn.utils``."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from optclip import norms
from optclip.methods.global_norm import clip_by_global_norm
from optclip.methods.value import clip_by_value

__all__ = ["clip_grad_norm", "clip_grad_value"]


def clip_grad_norm(
    grads: Any,
    max_norm: jax.typing.ArrayLike,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> tuple[Any, jax.Array]:
    """Returns clipped gradients and their original norm, like ``clip_grad_norm_``.

    grads' = grads * min(1, max_norm / (n + 1e-6)), where n is the norm of all
    gradients, concatenated into a single vector. The results match
    ``torch.nn.utils.clip_grad_norm_``, but the gradients are not modified in place. In
    an optimizer, prefer `clip_by_global_norm`, which records the norms in its state.

    | gradients                     | returned                                       |
    | ----------------------------- | ---------------------------------------------- |
    | contain NaN                   | all entries NaN; norm NaN                      |
    | contain inf                   | NaN at infinite entries, 0 elsewhere; norm inf |
    | contain inf, ``max_norm=inf`` | all entries NaN; norm inf                      |

    Args:
        grads: A pytree of gradients.
        max_norm: The largest norm, at least 0. A value of 0 sets all gradients to zero,
            which stops training; inf disables clipping.
        norm_type: The order of the norm: a number that is at least 1, or inf.
        error_if_nonfinite: Whether to raise an error if the norm is NaN or inf. Under
            `jax.jit`, wrap the function in `jax.experimental.checkify.checkify`.

    Returns:
        The clipped gradients, and their norm before clipping.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If ``max_norm`` is not a number.
        checkify.JaxRuntimeError: If ``error_if_nonfinite`` is True and the norm is not
            finite.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> grads, norm = optclip.clip_grad_norm(jnp.array([3.0, 4.0]), 1.0)
        >>> float(norm), round(float(grads[1]), 4)
        (5.0, 0.8)
    """
    _check_not_a_pytree(max_norm=max_norm)
    norm = norms.global_norm(grads, ord=norm_type)
    if error_if_nonfinite:
        # Imported here because it would add a fifth to the import time of optclip.
        from jax.experimental import checkify

        checkify.check(
            jnp.isfinite(norm),
            "The norm of order {order} of the gradients is {norm}, so they can't be "
            "clipped. Pass error_if_nonfinite=False to continue anyway.",
            order=jnp.float32(norm_type),
            norm=norm,
        )
    tx = clip_by_global_norm(max_norm, ord=norm_type, eps=1e-6)
    clipped, _ = tx.update(grads, tx.init(grads))
    # PyTorch multiplies by max_norm / (norm + 1e-6) even if this factor is NaN or 0.
    unknown = jnp.isnan(norm) | jnp.isinf(max_norm)
    coefficient = jnp.where(unknown, jnp.nan, 0.0)

    def as_torch(grad, finite):
        if not jnp.issubdtype(jnp.asarray(grad).dtype, jnp.inexact):
            return finite
        product = (grad * coefficient).astype(finite.dtype)
        return jnp.where(jnp.isfinite(norm), finite, product)

    return jax.tree.map(as_torch, grads, clipped), norm


def _check_not_a_pytree(**named: Any) -> None:
    """Raises an error if an argument is a pytree, which suggests swapped arguments."""
    for name, value in named.items():
        if not jax.tree_util.treedef_is_leaf(jax.tree.structure(value)):
            raise TypeError(
                f"`{name}` must be a number, got a {type(value).__name__}. As in "
                f"PyTorch, the gradients come first: `(grads, {name})`."
            )


def clip_grad_value(grads: Any, clip_value: jax.typing.ArrayLike) -> Any:
    """Returns gradients clipped to [-clip_value, clip_value], as in PyTorch.

    Args:
        grads: A pytree of gradients.
        clip_value: The largest magnitude of an entry, at least 0. A value of 0 sets all
            gradients to zero.

    Returns:
        The clipped gradients. NaN stays NaN, and inf becomes ``clip_value``.

    Raises:
        ValueError: If ``clip_value`` is negative or NaN.
        TypeError: If ``clip_value`` is not a number.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> optclip.clip_grad_value(jnp.array([-3.0, 0.5]), 1.0).tolist()
        [-1.0, 0.5]
    """
    _check_not_a_pytree(clip_value=clip_value)
    tx = clip_by_value(clip_value)
    return tx.update(grads, tx.init(grads))[0]
