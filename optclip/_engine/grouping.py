"""Determines which entries of a tree share a norm, from shapes and paths alone.

There are two ways to group entries. In `WholeLeafGroups`, a group consists of one or
more whole leaves, and all norms form one vector. In `SliceGroups`, each leaf is split
into slices with one norm per slice, and the norms of all leaves of the same shape form
one array, with one row per leaf.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "Arrays",
    "Axes",
    "Groups",
    "Layout",
    "SliceGroups",
    "WholeLeafGroups",
    "check_found",
    "lookup",
    "shape_buckets",
    "unit_axes",
    "whole_leaf_layout",
]


Axes = tuple[int, ...]
Arrays = tuple[jax.Array, ...]


class WholeLeafGroups(NamedTuple):
    """Groups of whole leaves: all norms form one vector, with one entry per group.

    Attributes:
        group_of_leaf: The index of each leaf's group.
    """

    group_of_leaf: tuple[int, ...]

    @property
    def number(self) -> int:
        """The number of groups, at least one."""
        return max(self.group_of_leaf, default=0) + 1

    @property
    def rows(self) -> list[tuple[int, int]]:
        """The index of the array of norms, and the row in it, for each leaf."""
        return [(0, group) for group in self.group_of_leaf]

    def collected(self, per_segment: list[jax.Array]) -> Arrays:
        """Returns the values of all leaves as one vector."""
        return (jnp.concatenate(per_segment),)

    def reduced(self, per_leaf: Arrays, largest: bool = False) -> Arrays:
        """Returns the sum, or the maximum, over the leaves of each group."""
        groups, (x,) = self.group_of_leaf, per_leaf
        if groups == tuple(range(len(groups))):
            return per_leaf
        if self.number == 1:
            return ((jnp.max if largest else jnp.sum)(x, keepdims=True),)
        if len(set(groups)) == len(groups):
            return (x[np.argsort(groups)],)
        reduce = jax.ops.segment_max if largest else jax.ops.segment_sum
        return (reduce(x, np.asarray(groups), self.number),)

    def expanded(self, per_group: Arrays) -> Arrays:
        """Returns the value of each leaf's group, one per leaf."""
        groups, (x,) = self.group_of_leaf, per_group
        if groups == tuple(range(len(groups))):
            return per_group
        if self.number == 1:
            return (jnp.broadcast_to(x, (len(groups),)),)
        return (x[np.asarray(groups)],)

    def sizes(self, per_leaf: list[float]) -> tuple[np.ndarray, ...]:
        """Returns the number of entries per group, given the number per leaf."""
        groups = np.asarray(self.group_of_leaf, int)
        return (np.bincount(groups, weights=per_leaf, minlength=1),)

    def reordered(self, order: list[int]) -> WholeLeafGroups:
        """Returns the groups for the leaves in another order."""
        return WholeLeafGroups(tuple(self.group_of_leaf[i] for i in order))


class SliceGroups(NamedTuple):
    """Groups that are slices of leaves, with one array of norms per shape bucket.

    Attributes:
        buckets: The indices of the leaves whose norms share an array: leaves with the
            same shape, axes and mesh axes.
    """

    buckets: tuple[tuple[int, ...], ...]

    @property
    def rows(self) -> list[tuple[int, int]]:
        """The index of the array of norms, and the row in it, for each leaf."""
        found = {
            i: (k, row)
            for k, bucket in enumerate(self.buckets)
            for row, i in enumerate(bucket)
        }
        return [found[i] for i in sorted(found)]

    def collected(self, per_segment: list[jax.Array]) -> Arrays:
        """Returns one array per shape bucket."""
        return tuple(per_segment)

    def reduced(self, per_leaf: Arrays, largest: bool = False) -> Arrays:
        """Returns the values unchanged, since no group spans several leaves."""
        del largest
        return per_leaf

    def expanded(self, per_group: Arrays) -> Arrays:
        """Returns the values unchanged, since each slice is a group."""
        return per_group

    def sizes(self, per_leaf: list[float]) -> tuple[np.ndarray, ...]:
        """Returns the number of entries in a slice, per shape bucket."""
        return tuple(np.asarray(per_leaf[bucket[0]]) for bucket in self.buckets)

    def reordered(self, order: list[int]) -> SliceGroups:
        """Returns the groups for the leaves in another order."""
        place = {old: new for new, old in enumerate(order)}
        return SliceGroups(
            tuple(tuple(place[i] for i in bucket) for bucket in self.buckets)
        )


Groups = WholeLeafGroups | SliceGroups


class Layout(NamedTuple):
    """How a scope splits one particular tree into groups.

    Attributes:
        axes: For each leaf, the axes that a group is summed over.
        groups: The `WholeLeafGroups`, or None if leaves are split into slices.
        scalar: Whether there is only one group, whose norm is a scalar.
        names: The names used to look up thresholds: the label or path of each group, or
            the path of each leaf if leaves are split into slices.
    """

    axes: tuple[Axes, ...]
    groups: WholeLeafGroups | None = None
    scalar: bool = False
    names: tuple[Any, ...] = ()


def shape_buckets(leaves: Sequence[Any], *each: Sequence[Any]) -> SliceGroups:
    """Returns the groups of leaves that have equal shapes and values of ``each``."""
    alike: dict[Any, list[int]] = {}
    for i, (x, *rest) in enumerate(zip(leaves, *each, strict=True)):
        alike.setdefault((tuple(x.shape), *rest), []).append(i)
    return SliceGroups(tuple(map(tuple, alike.values())))


def matches(pattern: str, name: str) -> bool:
    """Returns whether a name contains a match for a pattern."""
    return re.search(pattern, name) is not None


def lookup(table: Any, path: str, argument: str) -> Any:
    """Returns the value of ``path`` in ``table``.

    A table is a value, a function of the path, or a map from regular expressions to
    values. In a map, the first pattern that matches the path is used. If no pattern
    matches, the value is None.
    """
    if isinstance(table, Mapping):
        for pattern, value in table.items():
            if not isinstance(pattern, str):
                raise TypeError(
                    f"`{argument}` must map regular expressions (str) to values, got "
                    f"the key {pattern!r}."
                )
            try:
                found = matches(pattern, path)
            except re.error as error:
                raise ValueError(
                    f"`{argument}` must map regular expressions to values, but the key "
                    f"{pattern!r} is not one: {error}."
                ) from error
            if found:
                return value
        return None
    return table(path) if callable(table) else table


def check_found(table: Any, paths: list[str], argument: str) -> None:
    """Raises an error if ``table`` is a map whose patterns match no leaf."""
    if not isinstance(table, Mapping) or not table or not paths:
        return
    found = dict.fromkeys(table, True)
    if not any(lookup(found, path, argument) for path in paths):
        shown = ", ".join(paths[:5]) + (", ..." if len(paths) > 5 else "")
        raise ValueError(
            f"`{argument}` has no pattern that matches a leaf: got {list(table)} for "
            f"the paths {shown}. Give patterns that `re.search` finds in these paths."
        )


def _all_axes(x: Any) -> Axes:
    return tuple(range(x.ndim))


def whole_leaf_layout(
    groups: Sequence[int],
    leaves: Sequence[Any],
    scalar: bool = False,
    names: Sequence[Any] = (),
) -> Layout:
    """Returns a layout whose groups consist of whole leaves."""
    axes = tuple(_all_axes(x) for x in leaves)
    return Layout(axes, WholeLeafGroups(tuple(groups)), scalar, tuple(names))


def _default_unit_axes(path: str, x: Any) -> Axes:
    """Returns the default axes that an output unit sums over.

    They assume that kernels store input axes first, and match Optax's AGC.
    """
    if x.ndim <= 1:
        return _all_axes(x)
    if x.ndim in (2, 3):
        return (0,)
    if x.ndim in (4, 5):
        return tuple(range(x.ndim - 1))
    raise ValueError(
        f"`axis` must be given for `{path}` of shape {x.shape}: only leaves of rank 5 "
        "or less have default axes. Give the axes that one output unit sums over."
    )


def unit_axes(axis: Any) -> Callable[[str, Any], Axes]:
    """Returns a function that maps a leaf to the axes that an output unit sums over."""

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
                f"`axis` must hold axes of each leaf, but `{path}` of shape {x.shape} "
                f"has no axis {bad[0]!r}. If leaves need different axes, give a map "
                "from regular expression to axes."
            )
        return tuple(sorted({a % x.ndim for a in wanted}))

    return axes_of
