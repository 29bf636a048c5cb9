"""How far the numbers of the batches are from unit scale."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optclip._engine import names as path_names

__all__ = ["Scale", "scales_of", "standardized"]


class Scale(NamedTuple):
    """The scale of one leaf of the batches, or of each of its columns.

    Columns are the entries of the last axis, if the leaf has two axes or more.

    Attributes:
        path: Path of the leaf in a batch; "" if a batch is a single array.
        mean: Mean of each column over all batches.
        deviation: Standard deviation of each column; 1 for a constant column.
        size: Root mean square of each column.
    """

    path: str
    mean: np.ndarray
    deviation: np.ndarray
    size: np.ndarray

    @property
    def largest(self) -> float:
        """The root mean square of the largest column."""
        return float(np.max(self.size))

    def __str__(self) -> str:
        """Describes the leaf by its largest column."""
        name = f"the batch leaf `{self.path}`" if self.path else "the batch"
        at = int(np.argmax(self.size))
        alone = np.sum(self.size > 0.1 * self.size.max()) < 0.5 * self.size.size
        column = f"column {at} of " if self.size.size > 1 and alone else ""
        return (
            f"{column}{name} has a mean of {self.mean.ravel()[at]:.4g} and a standard "
            f"deviation of {self.deviation.ravel()[at]:.4g}"
        )


def _is_numeric(leaf: Any) -> bool:
    # Other integers are mostly labels, tokens or indices.
    return jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype == jnp.uint8


def _scale_of(path: str, rows: list[Any]) -> Scale | None:
    if not all(_is_numeric(x) and x.size for x in rows):
        return None
    columns = rows[0].shape[-1] if rows[0].ndim > 1 else 1
    if any((x.shape[-1] if x.ndim > 1 else 1) != columns for x in rows):
        return None
    flat = np.concatenate(
        [np.asarray(x, np.float64).reshape(-1, columns) for x in rows]
    )
    if not np.isfinite(flat).all():
        return None
    deviation = flat.std(0)
    # A column of one value is only centered.
    deviation = np.where(deviation > 1e-6 * np.abs(flat).max(0), deviation, 1.0)
    size = np.sqrt(np.square(flat).mean(0))
    return Scale(path, flat.mean(0), deviation, size)


def scales_of(batches: list[Any]) -> tuple[Scale, ...]:
    """Returns the scale of each leaf of real numbers.

    Leaves whose columns differ between batches, or that contain non-finite numbers,
    are left out.
    """
    if len({jax.tree.structure(batch) for batch in batches}) != 1:
        return ()
    paths = path_names.leaf_names(batches[0])
    columns = zip(*map(jax.tree.leaves, batches), strict=True)
    found = [_scale_of(*pair) for pair in zip(paths, map(list, columns), strict=True)]
    return tuple(scale for scale in found if scale is not None)


def standardized(batches: list[Any], scales: tuple[Scale, ...]) -> list[Any]:
    """Returns the batches, with a mean of 0 and a deviation of 1 in some leaves."""
    known = {scale.path: scale for scale in scales}

    def changed(path: str, leaf: Any) -> Any:
        scale = known.get(path)
        if scale is None:
            return leaf
        dtype = leaf.dtype if jnp.issubdtype(leaf.dtype, jnp.inexact) else jnp.float32
        shape = (1,) * (leaf.ndim - 1) + (-1,)
        numbers = (scale.mean.reshape(shape), scale.deviation.reshape(shape))
        mean, deviation = (jnp.asarray(x, dtype) for x in numbers)
        return (leaf.astype(dtype) - mean) / deviation

    def one(batch: Any) -> Any:
        leaves, treedef = jax.tree.flatten(batch)
        paths = path_names.leaf_names(batch)
        made = [changed(*pair) for pair in zip(paths, leaves, strict=True)]
        return jax.tree.unflatten(treedef, made)

    return [one(batch) for batch in batches]
