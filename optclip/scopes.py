"""Scopes: which entries of the updates form a group, and share one norm and one scale.

A scope is made by one of the functions here and handed to `optclip.clip_by_rule`. It
knows shapes and paths only, never values, so it costs nothing at run time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from optclip._engine import grouping, pytrees
from optclip._engine.grouping import Axes, Layout

__all__ = ["Scope", "element", "label", "layer", "leaf", "tree", "unit"]


class Scope(NamedTuple):
    """A way to cut updates into groups; made by the functions of this module.

    Attributes:
        name: What it is called in messages.
        layout: Function of (tree, paths, leaves) that returns a `Layout`.
        by_element: Whether each entry is a group of its own.
        summary: Whether the state keeps the figures of the whole tree only.
    """

    name: str
    layout: Callable[[Any, list[str], list[Any]], Layout]
    by_element: bool = False
    summary: bool = False

    def __repr__(self) -> str:
        """Returns how it is made, short enough for signatures."""
        return f"scopes.{self.name}()"


def _cut(
    axes_of: Callable[[str, Any], Axes], table: Any, argument: str
) -> Callable[..., Layout]:
    def layout(tree, paths, leaves):
        del tree
        grouping.check_found(table, paths, argument)
        return Layout(tuple(map(axes_of, paths, leaves)), names=tuple(paths))

    return layout


def tree() -> Scope:
    """Makes all leaves one group: the global norm.

    Example:
        >>> import optclip
        >>> optclip.clip_by_rule(1.0, scope=optclip.scopes.tree()) is not None
        True
    """
    return Scope("tree", _all)


def _all(tree: Any, paths: list[str], leaves: list[Any]) -> Layout:
    del tree, paths
    return grouping.whole_leaf_layout([0] * len(leaves), leaves, scalar=True)


def leaf() -> Scope:
    """Makes each leaf a group of its own: one norm for each parameter array."""
    return Scope("leaf", _each)


def _each(tree: Any, paths: list[str], leaves: list[Any]) -> Layout:
    del tree
    return grouping.whole_leaf_layout(range(len(leaves)), leaves, names=paths)


def label(labels: Callable[[str], Any] | Any) -> Scope:
    """Makes all leaves with one label a group: one norm for each label.

    Thresholds that differ by label are a map, as in
    ``clip_by_rule({"encoder": 1.0, "decoder": 5.0}, scope=...)``: see
    `optclip.rules.by_name`. An array of thresholds is refused, since JAX sorts the keys
    of a dict.

    Args:
        labels: A function from the path of a leaf ("encoder/0/kernel") to its label, or
            a tree of labels with the structure of the updates or a prefix of it.

    Raises:
        ValueError: If the tree of labels does not fit the updates, or a label is None.

    Example:
        >>> import optclip
        >>> scope = optclip.scopes.label(lambda path: path.split("/")[0])
        >>> tx = optclip.clip_by_rule(1.0, scope=scope)  # a norm per module
    """

    def layout(updates, paths, leaves):
        if callable(labels):
            names = [labels(path) for path in paths]
        else:
            names = _broadcast(labels, updates)
        if None in names:
            raise ValueError(
                f"`labels` must give every leaf a label, got None for "
                f"`{paths[names.index(None)]}`. To leave leaves unclipped, wrap the "
                "clip in `optax.masked`."
            )
        order = {name: i for i, name in enumerate(dict.fromkeys(names))}
        return grouping.whole_leaf_layout(
            [order[name] for name in names], leaves, names=list(order)
        )

    return Scope("label", layout)


def _broadcast(labels: Any, updates: Any) -> list[Any]:
    names: list[Any] = []

    def visit(name, subtree):
        names.extend([name] * len(pytrees.leaves_of(subtree).leaves))

    try:
        jax.tree.map(visit, labels, updates)
    except (ValueError, TypeError) as error:
        raise ValueError(
            "`labels` must be a function of the path or a tree with the structure of "
            f"the updates (or a prefix of it), got {labels!r}. JAX says: {error}"
        ) from error
    return names


def layer(stack_axes: Any) -> Scope:
    """Makes each layer of a scan-stacked leaf a group of its own.

    A layer that has three stacked arrays is three groups, one in each of them.

    Args:
        stack_axes: How many leading axes of a leaf count layers: an int for all
            leaves, a function of the path, or a map from regular expression to int
            (leaves that no pattern finds have none). A leaf with none is one group.

    Raises:
        ValueError: When the tree is first seen, if a leaf has fewer axes than that, or
            no pattern finds a leaf.

    Example:
        >>> import optclip
        >>> scope = optclip.scopes.layer({"blocks/": 1})  # blocks were stacked by scan
        >>> tx = optclip.clip_by_rule(1.0, scope=scope)
    """
    if isinstance(stack_axes, bool) or (isinstance(stack_axes, int) and stack_axes < 0):
        raise ValueError(f"`stack_axes` must be an int >= 0, got {stack_axes!r}.")

    def axes_of(path: str, x: Any) -> Axes:
        count = grouping.lookup(stack_axes, path, "stack_axes") or 0
        if isinstance(count, jax.Array):
            raise ValueError(
                "`stack_axes` must be an int, got an array. Under "
                '`optax.inject_hyperparams` pass `static_args=("stack_axes",)`.'
            )
        if not isinstance(count, int) or not 0 <= count <= x.ndim:
            raise ValueError(
                f"`stack_axes` must be an int between 0 and the rank of the leaf; for "
                f"`{path}` of shape {x.shape} it is {count!r}. Leaves that aren't "
                "stacked need 0: give a map from regular expression to int."
            )
        return tuple(range(count, x.ndim))

    return Scope("layer", _cut(axes_of, stack_axes, "stack_axes"))


def unit(axis: Any = None) -> Scope:
    """Makes each output unit (neuron, filter) a group of its own.

    By default, as in Optax's AGC: a scalar or vector is one unit; a matrix or a leaf of
    rank 3 is summed over axis 0; rank 4 (HWIO) over axes 0 to 2; rank 5 over 0 to 3.
    Unlike Optax, axes of length one count as axes: the rule looks at the rank alone.

    Args:
        axis: The axes that one unit sums over: an int or tuple of ints for all leaves,
            a function of the path, or a map from regular expression to either. Leaves
            for which it says None have the default axes.

    Raises:
        ValueError: If an axis is out of range, a leaf of rank 6 or more has none, or no
            pattern finds a leaf.

    Example:
        >>> import optclip
        >>> stacked = optclip.scopes.unit({"blocks/.*kernel": 1})  # [layer, in, out]
        >>> tx = optclip.clip_by_rule(1.0, scope=stacked)
    """
    return Scope("unit", _cut(grouping.unit_axes(axis), axis, "axis"), summary=True)


def element() -> Scope:
    """Makes each entry a group of its own: clipping by value.

    The state keeps no figure for each entry; ``norm_before`` and ``norm_after`` are the
    largest magnitude in the tree. An infinite entry is clipped like any large one.
    """
    # Measured by the largest magnitude of each leaf: one read, and no square.
    return Scope("element", _each, by_element=True, summary=True)
