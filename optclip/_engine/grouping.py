"""How a tree is cut into groups of entries: shapes and paths only, no values."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["Axes", "Layout", "check_found", "kinds", "lookup", "pooled", "unit_axes"]


Axes = tuple[int, ...]


class Layout(NamedTuple):
    """How a scope cuts one particular tree into groups.

    Attributes:
        axes: Per leaf, the axes that a group runs over.
        groups: Per leaf, the number of its group where whole leaves are grouped; empty
            where a leaf is cut into several groups.
        scalar: Whether there is one group only, whose norm is a scalar.
        names: What thresholds by name are looked up by: the label or path of each
            group, or the path of each leaf where leaves are split into groups.
    """

    axes: tuple[Axes, ...]
    groups: tuple[int, ...]
    scalar: bool = False
    names: tuple[Any, ...] = ()


def kinds(leaves: Sequence[Any], *each: Sequence[Any]) -> tuple[tuple[int, ...], ...]:
    """Returns the numbers of the leaves that agree in shape and in all of ``each``."""
    alike: dict[Any, list[int]] = {}
    for i, (x, *rest) in enumerate(zip(leaves, *each, strict=True)):
        alike.setdefault((tuple(x.shape), *rest), []).append(i)
    return tuple(map(tuple, alike.values()))


def lookup(table: Any, path: str, argument: str) -> Any:
    """Returns what ``table`` (a value, a function of the path, a map from regex) says.

    Of a map, the first pattern found in the path counts; without one, None.
    """
    if isinstance(table, Mapping):
        for pattern, value in table.items():
            if not isinstance(pattern, str):
                raise TypeError(
                    f"`{argument}` must map regular expressions (str) to values, got "
                    f"the key {pattern!r}."
                )
            try:
                found = re.search(pattern, path)
            except re.error as error:
                raise ValueError(
                    f"`{argument}` must map regular expressions to values, and "
                    f"{pattern!r} is not one: {error}."
                ) from error
            if found:
                return value
        return None
    return table(path) if callable(table) else table


def check_found(table: Any, paths: list[str], argument: str) -> None:
    """Raises if ``table`` is a map of patterns of which none finds a leaf."""
    if not isinstance(table, Mapping) or not table or not paths:
        return
    found = dict.fromkeys(table, True)
    if not any(lookup(found, path, argument) for path in paths):
        shown = ", ".join(paths[:5]) + (", ..." if len(paths) > 5 else "")
        raise ValueError(
            f"`{argument}` has no pattern that finds a leaf: {list(table)} in {shown}. "
            "Give patterns for `re.search` in these paths."
        )


def _all_axes(x: Any) -> Axes:
    return tuple(range(x.ndim))


def pooled(
    groups: Sequence[int],
    leaves: Sequence[Any],
    scalar: bool = False,
    names: Sequence[Any] = (),
) -> Layout:
    """Returns the layout that puts whole leaves into groups."""
    axes = tuple(_all_axes(x) for x in leaves)
    return Layout(axes, tuple(groups), scalar, tuple(names))


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
        wanted = lookup(axis, path, "axis")
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
