"""What the two pipelines of the engine share: their inputs, outputs and small steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optclip import scopes
from optclip._engine import group_norms, grouping, pytrees
from optclip._engine.rule import Context, Limit, Rule
from optclip._engine.types import NonfinitePolicy

__all__ = [
    "Call",
    "Figures",
    "Options",
    "Outcome",
    "check_order",
    "context_of",
    "cut_of",
    "measure_updates",
    "rules_for",
]

POLICIES = ("propagate", "zero", "drop", "skip")


class Options(NamedTuple):
    """What was chosen when the transformation was built."""

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
        """Whether an update measures the norms."""
        needed = self.record or self.rule.needs_norms or self.nonfinite == "skip"
        return needed or not self.scope.by_element


class Call(NamedTuple):
    """One update: the measured leaves, their norms, and what a rule may look at.

    ``measured`` and ``bad`` are None where nothing is measured.
    """

    options: Options
    rules: tuple[Rule, ...]
    found: pytrees.Leaves
    cut: group_norms.Cut
    measured: Any
    bad: Any
    step: jax.Array
    params_norms: Callable[[], tuple]


class Figures(NamedTuple):
    """The figures that the state of a clip keeps."""

    before: jax.Array
    after: jax.Array
    threshold: jax.Array
    scale: jax.Array
    clipped: jax.Array


class Outcome(NamedTuple):
    """What an update did; ``figures`` are None where none are recorded."""

    leaves: list
    rule_state: tuple
    figures: Figures | None
    stats: tuple | None = None


def cut_of(
    options: Options, updates: Any, found: pytrees.Leaves, mapped: bool = True
) -> group_norms.Cut:
    """Returns how these updates are cut into groups and measured."""
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
    """Measures the updates, once, and gathers all that an update needs."""
    measured = bad = None
    if options.measures:
        measured = group_norms.norms_of(found.leaves, cut)
        bad = _any_bad(measured, cut)

    def params_norms():
        if params is None:
            raise ValueError(
                f"`{options.rule.name}` compares the updates with the parameters: call "
                "`update(updates, state, params)`."
            )
        whole = cut._replace(plan=cut.plan._replace(drop=False))
        return group_norms.norms_of(pytrees.matching(updates, params), whole).norm

    rules = rules_for(options, cut)
    return Call(options, rules, found, cut, measured, bad, step, _once(params_norms))


def _any_bad(measured: group_norms.Measured, cut: group_norms.Cut) -> Any:
    """Returns whether an entry of any leaf, on any device, is not finite."""
    if cut.layout.groups is not None and not cut.plan.drop:
        return jnp.any(~jnp.isfinite(measured.norm[0]))
    return jnp.any(measured.kinds)


def rules_for(options: Options, cut: group_norms.Cut) -> tuple[Rule, ...]:
    """Returns the rule of each array of norms; one for each leaf in element scope."""
    rule, layout = options.rule, cut.layout
    names, groups = layout.names, cut.plan.groups
    if rule.for_groups is None:
        by_element = options.scope.by_element
        return (rule,) * len(layout.axes if by_element else cut.shapes)
    if layout.scalar:
        raise ValueError(
            f"`{rule.name}` has a threshold for each group of leaves, and the scope is "
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
    """Raises for an array of thresholds in label scope: labels have no sure order."""
    fixed = options.rule.name in ("constant", "schedule")
    if options.scope.name == "label" and fixed and np.size(limit.threshold) > 1:
        raise ValueError(
            "In label scope a threshold must be a number, a schedule, a rule or a map "
            f"from label to one of these, got an array of shape "
            f"{np.shape(limit.threshold)}: JAX sorts the keys of a dict, so its order "
            'would not be the one you wrote. Give a map, as {"encoder": 1.0, ...}.'
        )


def _once(function: Callable) -> Callable:
    kept: list = []

    def call():
        if not kept:
            kept.append(function())
        return kept[0]

    return call


def context_of(call: Call, index: int, tree_norm: jax.Array) -> Context:
    """Returns what the rule may look at for the array of norms number ``index``."""

    def params_norm():
        norm = call.params_norms()[index]
        return norm.reshape(()) if call.cut.layout.scalar else norm

    return Context(call.step, tree_norm, params_norm)
