"""Inputs, outputs and steps that the two pipelines of the engine share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from optclip import scopes
from optclip._engine import group_norms, grouping, pytrees
from optclip._engine.rule import Context, Limit, Rule
from optclip._engine.types import NonfinitePolicy

__all__ = [
    "Call",
    "Options",
    "Outcome",
    "Statistics",
    "check_order",
    "context_of",
    "cut_of",
    "measure_updates",
    "rules_for",
]

POLICIES = get_args(NonfinitePolicy)


class Options(NamedTuple):
    """The options of a transformation."""

    rule: Rule
    scope: scopes.Scope
    order: float | str
    action: Callable
    nonfinite: NonfinitePolicy
    axis_name: Any
    update_dtype: Any
    record: bool

    @property
    def measures(self) -> bool:
        """Whether an update measures norms."""
        needed = self.record or self.rule.needs_norms or self.nonfinite == "skip"
        return needed or not self.scope.by_element


class Call(NamedTuple):
    """One update: its leaves, their norms, and the inputs of rules.

    ``bad`` indicates whether any entry is non-finite. ``measured`` and ``bad`` are None
    if norms are not measured.
    """

    options: Options
    rules: tuple[Rule, ...]
    found: pytrees.Leaves
    cut: group_norms.Cut
    measured: Any
    bad: Any
    step: jax.Array
    params_norms: Callable[[], tuple]


class Statistics(NamedTuple):
    """The statistics of the whole tree that are stored in the state of a clip."""

    before: jax.Array
    after: jax.Array
    threshold: jax.Array
    scale: jax.Array
    clipped: jax.Array


class Outcome(NamedTuple):
    """The result of an update.

    ``statistics`` is None if nothing is recorded. ``group_stats`` contains the norms,
    thresholds and scales of all groups; it is None in element scope.
    """

    leaves: list
    rule_state: tuple
    statistics: Statistics | None
    group_stats: tuple | None = None


def cut_of(
    options: Options, updates: Any, found: pytrees.Leaves, mapped: bool = True
) -> group_norms.Cut:
    """Returns how the updates are split into groups and measured."""
    updates = pytrees.trained(updates)
    layout = options.scope.layout(updates, found.paths, found.leaves)
    return group_norms.cut_by(
        layout,
        updates,
        found,
        order=options.order,
        axis_name=options.axis_name,
        drop=options.nonfinite == "drop",
        mapped=mapped or options.axis_name is None,
    )


def measure_updates(
    options: Options,
    updates: Any,
    found: pytrees.Leaves,
    cut: group_norms.Cut,
    params: Any,
    step: jax.Array,
) -> Call:
    """Measures the updates, and returns the inputs of a pipeline."""
    measured = bad = None
    if options.measures:
        measured = group_norms.norms_of(found.leaves, cut)
        bad = _any_bad(measured, cut)

    def params_norms():
        if params is None:
            raise ValueError(
                f"`{options.rule.name}` compares the updates with the parameters, but "
                "`params` is None. Call `update(updates, state, params)`."
            )
        keep_all = cut._replace(plan=cut.plan._replace(drop=False))
        return group_norms.norms_of(pytrees.matching(updates, params), keep_all).norm

    rules = rules_for(options, cut)
    return Call(options, rules, found, cut, measured, bad, step, _once(params_norms))


def _any_bad(measured: group_norms.Measured, cut: group_norms.Cut) -> Any:
    """Returns whether any entry of any leaf on any device is non-finite."""
    if cut.layout.groups is not None and not cut.plan.drop:
        return jnp.any(~jnp.isfinite(measured.norm[0]))
    return jnp.any(measured.kinds)


def rules_for(options: Options, cut: group_norms.Cut) -> tuple[Rule, ...]:
    """Returns the rule for each array of norms, or for each leaf in element scope."""
    rule, layout = options.rule, cut.layout
    names, groups = layout.names, cut.plan.groups
    if rule.for_groups is None:
        by_element = options.scope.by_element
        return (rule,) * len(layout.axes if by_element else cut.shapes)
    if layout.scalar:
        raise ValueError(
            f"`{rule.name}` has a threshold for each group of leaves, but the scope is "
            "the whole tree, which is one group. Give a scope such as "
            "`optclip.scopes.label(...)` or `optclip.scopes.leaf()`, or one threshold."
        )
    if options.scope.by_element:
        rows = [[name] for name in names]
    elif isinstance(groups, grouping.SliceGroups):
        rows = [[names[i] for i in bucket] for bucket in groups.buckets]
    else:
        rows = [list(names)]
    return tuple(rule.for_groups(row) for row in rows)


def check_order(options: Options, limit: Limit) -> None:
    """Raises an error for an array of thresholds in label scope, which is unordered."""
    fixed = options.rule.name in ("constant", "schedule")
    if options.scope.name == "label" and fixed and np.size(limit.threshold) > 1:
        raise ValueError(
            "In label scope a threshold must be a number, a schedule, a rule or a map "
            f"from label to one of these, got an array of shape "
            f"{np.shape(limit.threshold)}. JAX sorts the keys of a dict, so the order "
            "of the labels is not the order in which you wrote them. Give a map, as "
            '{"encoder": 1.0, ...}.'
        )


def _once(function: Callable) -> Callable:
    """Returns ``function`` with its result cached."""
    kept: list = []

    def call():
        if not kept:
            kept.append(function())
        return kept[0]

    return call


def context_of(call: Call, index: int, tree_norm: jax.Array) -> Context:
    """Returns the `Context` of the rule for the array of norms at ``index``."""

    def params_norm():
        norm = call.params_norms()[index]
        return norm.reshape(()) if call.cut.layout.scalar else norm

    def initial_norm():
        if call.options.scope.by_element:
            return jnp.ones(())
        found = group_norms.initial_norms(call.found.leaves, call.cut)[index]
        return jnp.asarray(found.reshape(()) if call.cut.layout.scalar else found)

    return Context(call.step, tree_norm, params_norm, initial_norm=initial_norm)
