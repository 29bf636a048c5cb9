"""Norms of pytrees, computed accurately even if squares overflow or underflow.

Norms are float32, or float64 if a leaf is float64 or complex128. Leaves that don't hold
real or complex numbers (integers, booleans, float0, PRNG keys, None,
`optax.MaskedNode`) are ignored. This module does not depend on Optax transformations,
thresholds or state.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from optclip._engine import group_norms, grouping, pytrees, validation
from optclip._engine.grouping import Layout
from optclip._engine.power_sums import unpool
from optclip._engine.types import Axis, Order
from optclip._engine.validation import EUCLIDEAN

__all__ = ["global_norm", "leaf_norms", "unit_norms"]


def _whole(found: pytrees.Leaves) -> Layout:
    return grouping.whole_leaf_layout([0] * len(found.leaves), found.leaves)


def _each(found: pytrees.Leaves) -> Layout:
    return grouping.whole_leaf_layout(range(len(found.leaves)), found.leaves)


def _norms_of(tree: Any, layout_of: Any, ord: Any, axis_name: Any):
    order = validation.order(ord)
    found = pytrees.leaves_of(tree)
    if not found.leaves:
        return [], found
    layout = layout_of(found)
    measured, _, plan = group_norms.measure_layout(
        tree, found, layout, order=order, axis_name=axis_name
    )
    if plan.in_slices:
        return [n for (n,) in unpool([measured.norm], plan)], found
    return list(measured.norm), found


def global_norm(
    tree: Any, *, ord: Order = EUCLIDEAN, axis_name: Any = None
) -> jax.Array:
    """Returns the global norm of a pytree, which treats all leaves as one vector.

    For entries x_1 ... x_n, this is (sum |x_i|**p) ** (1/p) if ``ord=p``, the largest
    |x_i| if ``ord=inf``, and the root mean square if ``ord="rms"``. The relative error
    is at most 1e-6 (1e-12 if leaves are float64), even if squares overflow or
    underflow.

    | tree                 | returned                                      |
    | -------------------- | --------------------------------------------- |
    | empty, or all zero   | 0, with derivative 0                          |
    | contains NaN or inf  | NaN or inf                                    |
    | norm above 3.4e38    | 3.4e38, the largest float32                   |
    | entries below 1.2e-38| treated as 0: XLA flushes subnormal numbers   |

    Args:
        tree: Any pytree of arrays. Leaves that don't hold real or complex numbers are
            ignored.
        ord: The order of the norm: a number that is at least 1, inf, or "rms".
        axis_name: Inside `jax.shard_map` or `jax.pmap`, the mesh axes that leaves are
            sharded over: one or more names, "auto" to read the axes of each leaf from
            its type, or a pytree with one name or PartitionSpec per leaf. Not needed
            under `jax.jit`.

    Returns:
        A float32 or float64 scalar.

    Raises:
        ValueError: If ``ord`` is not the order of a norm.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> norm = optclip.norms.global_norm({"a": jnp.array([3e30]), "b": 4e30})
        >>> f"{float(norm):.3g}"
        '5e+30'
    """
    norms, _ = _norms_of(tree, _whole, ord, axis_name)
    return norms[0].reshape(()) if norms else jnp.zeros([], jnp.float32)


def leaf_norms(tree: Any, *, ord: Order = EUCLIDEAN, axis_name: Any = None) -> Any:
    """Returns the norm of each leaf, in a pytree of the same structure.

    Args:
        tree: Any pytree of arrays. Leaves that don't hold real or complex numbers are
            returned unchanged.
        ord: As in `global_norm`.
        axis_name: As in `global_norm`.

    Returns:
        The pytree, with each leaf replaced by a scalar, the norm of the leaf.

    Raises:
        ValueError: If ``ord`` is not the order of a norm.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> norms = optclip.norms.leaf_norms({"w": jnp.ones((2, 2)), "b": jnp.zeros(2)})
        >>> {name: float(norm) for name, norm in norms.items()}
        {'b': 0.0, 'w': 2.0}
    """
    norms, found = _norms_of(tree, _each, ord, axis_name)
    return found.rebuild([norms[0][i] for i in range(len(found.leaves))])


def unit_norms(
    tree: Any, *, axis: Axis = None, ord: Order = EUCLIDEAN, axis_name: Any = None
) -> Any:
    """Returns the norm of each output unit, in a pytree of the same structure.

    Args:
        tree: Any pytree of arrays. Leaves that don't hold real or complex numbers are
            returned unchanged.
        axis: The axes over which the norm of a unit is taken, as in
            `optclip.scopes.unit`.
        ord: As in `global_norm`.
        axis_name: As in `global_norm`, except that "auto" is not supported.

    Returns:
        The pytree, with each leaf replaced by an array of norms. This array has the
        axes of the leaf over which the norm is not taken.

    Raises:
        ValueError: If ``ord`` is not the order of a norm, or ``axis`` contains an axis
            that a leaf does not have.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> optclip.norms.unit_norms(jnp.array([[3.0, 0.0], [4.0, 1.0]])).tolist()
        [5.0, 1.0]
    """
    axes_of = grouping.unit_axes(axis)

    def units(found):
        return Layout(tuple(map(axes_of, found.paths, found.leaves)))

    norms, found = _norms_of(tree, units, ord, axis_name)
    return found.rebuild(norms)
