"""Scopes, which split updates into groups that share one norm and one scale.

The functions in this module return scopes that can be passed to `optclip.clip_by_rule`.
The groups depend only on the shapes and paths of the leaves, so a scope adds no cost at
run time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from optclip._engine import grouping, pytrees
from optclip._engine.grouping import Axes, Layout
from optclip._engine.types import Axis, StackAxes

__all__ = ["Scope", "element", "label", "layer", "leaf", "tree", "unit"]


class Scope(NamedTuple):
    """A way to split updates into groups, as returned by the functions in this module.

    Attributes:
        name: The name of the scope in error messages.
        layout: A function of (tree, paths, leaves) that returns a `Layout`.
        by_element: Whether each entry is its own group.
        summary: Whether the state records only statistics of the whole tree.
    """

    name: str
    layout: Callable[[Any, list[str], list[Any]], Layout]
    by_element: bool = False
    summary: bool = False

    def __repr__(self) -> str:
        """Returns the call that creates the scope, as shown in signatures."""
        return f"scopes.{self.name}()"


def _slices(
    axes_of: Callable[[str, Any], Axes], table: Any, argument: str
) -> Callable[..., Layout]:
    """Returns a layout function that splits each leaf into slices."""

    def layout(tree, paths, leaves):
        del tree
        grouping.check_found(table, paths, argument)
        return Layout(tuple(map(axes_of, paths, leaves)), names=tuple(paths))

    return layout


def tree() -> Scope:
    """Puts all leaves into one group, with a single global norm.

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
    """Puts each leaf into its own group, with one norm per parameter array."""
    return Scope("leaf", _each)


def _each(tree: Any, paths: list[str], leaves: list[Any]) -> Layout:
    del tree
    return grouping.whole_leaf_layout(range(len(leaves)), leaves, names=paths)


def label(labels: Callable[[str], Any] | Any) -> Scope:
    """Puts all leaves with the same label into one group, with one norm per label.

    To give each label its own threshold, pass a map, as in
    ``clip_by_rule({"encoder": 1.0, "decoder": 5.0}, scope=...)``; see
    `optclip.rules.by_name`. An array of thresholds is not accepted: JAX sorts dict
    keys, so the order of the labels would be ambiguous.

    Args:
        labels: A function from the path of a leaf ("encoder/0/kernel") to its label, or
            a pytree of labels with the structure of the updates, or a prefix of it.

    Raises:
        ValueError: If the pytree of labels does not match the updates, or a label is
            None.

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
                f"`{paths[names.index(None)]}`. To leave some leaves unclipped, wrap "
                "the clip in `optax.masked`."
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


def layer(stack_axes: StackAxes) -> Scope:
    """Puts each layer of a leaf stacked for `jax.lax.scan` into its own group.

    A layer with three stacked parameter arrays forms three groups, one per array.

    Args:
        stack_axes: The number of leading axes of a leaf that index layers: an int for
            all leaves, a function of the path, or a map from regular expressions to
            ints. The number is 0 for leaves that match no pattern. If it is 0, the
            whole leaf is one group.

    Raises:
        ValueError: If ``stack_axes`` is negative. In ``init``, if a leaf has fewer axes
            than ``stack_axes``, or if no pattern matches any leaf.

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
                f"`stack_axes` must be an int for `{path}`, got an array. Under "
                '`optax.inject_hyperparams` pass `static_args=("stack_axes",)`.'
            )
        if not isinstance(count, int) or not 0 <= count <= x.ndim:
            raise ValueError(
                f"`stack_axes` must be an int between 0 and the rank of the leaf, but "
                f"for `{path}` of shape {x.shape} it is {count!r}. If only some leaves "
                "are stacked, give a map from regular expression to int."
            )
        return tuple(range(count, x.ndim))

    return Scope("layer", _slices(axes_of, stack_axes, "stack_axes"))


def unit(axis: Axis = None) -> Scope:
    """Puts each output unit (neuron or filter) into its own group.

    The default axes match Optax's AGC. A scalar or a vector is one unit. The norm is
    taken over axis 0 for leaves of rank 2 or 3, over axes 0 to 2 for leaves of rank 4
    (HWIO), and over axes 0 to 3 for leaves of rank 5. Unlike in Optax, axes of length 1
    are not squeezed, so the default depends only on the rank.

    Args:
        axis: The axes over which the norm of a unit is taken: an int or tuple of ints
            for all leaves, a function of the path, or a map from regular expressions to
            either. The default axes are used if it is None, and for leaves that match
            no pattern.

    Raises:
        ValueError: In ``init``, if an axis is out of range, if a leaf of rank 6 or more
            has no axes, or if no pattern matches any leaf.

    Example:
        >>> import optclip
        >>> stacked = optclip.scopes.unit({"blocks/.*kernel": 1})  # [layer, in, out]
        >>> tx = optclip.clip_by_rule(1.0, scope=stacked)
    """
    layout = _slices(grouping.unit_axes(axis), axis, "axis")
    return Scope("unit", layout, summary=True)


def element() -> Scope:
    """Puts each entry into its own group, as in clipping by value.

    The state does not record per-entry statistics; ``norm_before`` and ``norm_after``
    are the largest magnitude in the tree. An infinite entry is clipped like any other
    large entry.
    """
    # The layout has one group per leaf, since the telemetry requires the largest
    # magnitude of each leaf.
    return Scope("element", _each, by_element=True, summary=True)
