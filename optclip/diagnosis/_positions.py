"""Measures how the derivative of the loss grows over the positions of its inputs.

A recurrence that the program does not show step by step, such as an associative scan or
a solver with a custom derivative, is visible from outside: the derivative with respect
to the inputs grows from the last positions of a sequence to the first.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optclip._engine import names as path_names
from optclip.diagnosis._growth import (
    Growth,
    backward_signal,
    growth_over_steps,
    logs_of,
)
from optclip.diagnosis._program import POSITIONS
from optclip.diagnosis._replay import magnitude
from optclip.diagnosis.taps import Site

__all__ = [
    "Sequences",
    "differentiable_sequences",
    "norms_over_positions",
    "position_growth",
    "sequences_of",
]

# The least correlation of a signal's logarithm with the position. A recurrence
# multiplies the signal at each step, so that its logarithm is nearly a straight line. A
# model that reads a single position, such as a class token, has a jump instead.
STRAIGHT = 0.9


class Sequences(NamedTuple):
    """The leaves of a batch that have an axis of positions.

    Attributes:
        leaves: The leaves.
        axes: For each leaf, the axis of positions.
        paths: For each leaf, its path, which begins with "batch".
        replaced: Function of new leaves that returns the batch with these leaves.
    """

    leaves: list[Any]
    axes: tuple[int, ...]
    paths: tuple[str, ...]
    replaced: Callable[[list[Any]], Any]


def _axis_of(leaf: Any, others: list[Any]) -> int | None:
    """Returns the axis of positions; None if there is none.

    Only arrays with three axes (examples, positions, features) are sequences: those
    with two are tables of features, and images have four. The first axis is that of the
    positions only if another leaf shows that the second is that of the examples.
    """
    if jnp.ndim(leaf) != 3 or not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
        return None
    first, second, _ = jnp.shape(leaf)
    leading = {jnp.shape(other)[0] for other in others if jnp.ndim(other)}
    axis = 0 if second in leading and first not in leading else 1
    return axis if jnp.shape(leaf)[axis] >= POSITIONS else None


def sequences_of(batch: Any) -> Sequences:
    """Returns the floating-point leaves of a batch that are sequences."""
    leaves, treedef = jax.tree.flatten(batch)
    names = path_names.leaf_names(batch)
    chosen = {}
    for at, leaf in enumerate(leaves):
        axis = _axis_of(leaf, leaves[:at] + leaves[at + 1 :])
        if axis is not None:
            chosen[at] = axis

    def replaced(new: list[Any]) -> Any:
        every = dict(enumerate(leaves)) | dict(zip(chosen, new, strict=True))
        return jax.tree.unflatten(treedef, [every[at] for at in range(len(leaves))])

    paths = tuple(f"batch/{names[at]}" if names[at] else "batch" for at in chosen)
    return Sequences(
        [leaves[at] for at in chosen], tuple(chosen.values()), paths, replaced
    )


def differentiable_sequences(
    loss_of: Callable[[Any], jax.Array], batch: Any
) -> Sequences:
    """Returns the sequences of a batch, or none if the loss can't be differentiated.

    A loss whose derivative with respect to the parameters exists may nevertheless
    process its inputs with an operation that has no derivative.
    """
    found = sequences_of(batch)
    if not found.leaves:
        return found
    try:
        jax.eval_shape(jax.grad(lambda new: loss_of(found.replaced(new))), found.leaves)
    except Exception:
        return Sequences([], (), (), lambda _: batch)
    return found


def norms_over_positions(grads: list[jax.Array], axes: tuple[int, ...]) -> list:
    """Returns the norm of each gradient at each position."""
    pairs = zip(grads, axes, strict=True)
    return [jax.vmap(magnitude, in_axes=axis)(grad) for grad, axis in pairs]


def _is_steady(norms: np.ndarray) -> bool:
    """Whether the logarithm grows in a straight line toward the first position."""
    logs = logs_of(norms)
    known = np.isfinite(logs)
    if np.sum(known) < POSITIONS or np.ptp(logs[known]) == 0:
        return False
    places = np.flatnonzero(known)
    return bool(np.corrcoef(places, logs[known])[0, 1] < -STRAIGHT)


def _output_signal(sites: tuple[Site, ...]) -> float:
    """Returns the backward signal at the last site that was measured; NaN if none."""
    for site in sorted(sites, key=lambda site: -site.order):
        size = float(np.linalg.norm(np.asarray(backward_signal(site), float)))
        if np.isfinite(size) and size > 0:
            return size
    return float("nan")


def position_growth(
    norms: Mapping[str, tuple[float, ...]], sites: tuple[Site, ...]
) -> Growth | None:
    """Returns the largest growth over the positions of an input, or None.

    Integer inputs have no derivative; the output of their embedding is used instead.

    A network that reads the first position also has a derivative that increases from
    the last position to the first, because the signal decays on its way to the last. In
    this case, the derivative at the first position is about the signal at the output.
    Growth is only reported if the derivative at the first position is farther above
    this signal than that at the last position is below it.
    """
    output, found = _output_signal(sites), []
    embedded = {x.leaf: x.signal_positions for x in sites if x.signal_positions}
    for path, row in (*norms.items(), *embedded.items()):
        values = np.asarray(row, float)
        growth = growth_over_steps(values, np.full(len(values), np.nan), path)
        middle = 10 ** np.nanmean(logs_of(values)) if _is_steady(values) else 0.0
        if growth is not None and middle > output:
            found.append(growth)
    return max(found, key=lambda growth: growth.back, default=None)
