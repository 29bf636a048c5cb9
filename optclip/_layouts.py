"""How a tree is cut into groups of entries: shapes and paths only, no values."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from optclip import _trees

__all__ = ["Axes", "Layout", "kinds", "pooled", "unit_axes"]

Axes = tuple[int, ...]


class Layout(NamedTuple):
    """How a scope cuts one particular tree into groups.

    Attributes:
        axes: Per leaf, the axes that a group runs over.
        groups: Per leaf, the number of its group where whole leaves are grouped; empty
            where a leaf is cut into several groups.
        scalar: Whether there is one group only, whose norm is a scalar.
    """

    axes: tuple[Axes, ...]
    groups: tuple[int, ...]
    scalar: bool = False


def kinds(leaves: Sequence[Any], *each: Sequence[Any]) -> tuple[tuple[int, ...], ...]:
    """Returns the numbers of the leaves that agree in shape and in all of ``each``."""
    alike: dict[Any, list[int]] = {}
    for i, (x, *rest) in enumerate(zip(leaves, *each, strict=True)):
        alike.setdefault((tuple(x.shape), *rest), []).append(i)
    return tuple(map(tuple, alike.values()))


def _all_axes(x: Any) -> Axes:
    return tuple(range(x.ndim))


def pooled(
    groups: Sequence[int], leaves: Sequence[Any], scalar: bool = False
) -> Layout:
    """Returns the layout that puts whole leaves into groups."""
    return Layout(tuple(_all_axes(x) for x in leaves), tuple(groups), scalar)


def _default_unit_axes(path: str, x: Any) -> Axes:
    """Returns the axes of one output unit, for kernels stored input-first."""
    if x.ndim <= 1:
        return _all_axes(x)
    if x.ndim in (2, 3):
        return (0,)
    if x.ndim in (4, 5):
        return tuple(range(x.ndim - 1))
    raise ValueError(
        f"`axis` must be given for `{path}` of shape {x.shape}: only leaves of rank 5 "
        "or less have default axes. Name the axes that one output unit sums over."
    )


def unit_axes(axis: Any) -> Callable[[str, Any], Axes]:
    """Returns the function from a leaf to the axes that one output unit sums over."""

    def axes_of(path: str, x: Any) -> Axes:
        wanted = _trees.lookup(axis, path, "axis")
        if wanted is None:
            return _default_unit_axes(path, x)
        wanted = (wanted,) if isinstance(wanted, int) else tuple(wanted)
        if x.ndim == 0:
            return ()
        bad = [a for a in wanted if not isinstance(a, int) or not -x.ndim <= a < x.ndim]
        if bad:
            raise ValueError(
                f"`axis` must hold axes of the leaf; `{path}` of shape {x.shape} has "
                f"no axis {bad[0]!r}. Give a map from regular expression to axes."
            )
        return tuple(sorted({a % x.ndim for a in wanted}))

    return axes_of
