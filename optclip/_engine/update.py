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

__all__ = [
    "Call",
    "Figures",
    "Options",
    "Outcome",
    "begin",
    "check_order",
    "context_of",
    "finish",
    "rules_for",
]

POLICIES = ("propagate", "zero", "drop", "skip")


class Options(NamedTuple):
    """What was chosen when the transformation was built."""

    rule: Rule
    scope: scopes.Scope
    order: float | str
    action: Callable
    nonfinite: str
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
    layout: grouping.Layout
    measured: Any
    counts: tuple
    plan: Any
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


def begin(options: Options, updates: Any, params: Any, step: jax.Array) -> Call:
    """Measures the updates, once, and gathers all that an update needs."""
    found = pytrees.leaves_of(updates)
    updates = pytrees.trained(updates)
    layout = options.scope.layout(updates, found.paths, found.leaves)
    drop = options.nonfinite == "drop"
    how = {"order": options.order, "axis_name": options.axis_name}
    measured = bad = None
    if options.measures:
        measured, counts, plan = group_norms.measure_layout(
            updates, found, layout, drop=drop, **how
        )
        bad = _any_bad(measured, layout, drop)
    else:
        counts, plan = (), group_norms.plan_of(updates, found, layout, **how)
        group_norms.check_mesh(plan)

    def params_norms():
        if params is None:
            raise ValueError(
                f"`{options.rule.name}` compares the updates with the parameters: call "
                "`update(updates, state, params)`."
            )
        mine = found._replace(leaves=pytrees.matching(updates, params))
        return group_norms.measure_layout(updates, mine, layout, **how)[0].norm

    return Call(
        options,
        rules_for(options, layout, plan),
        found,
        layout,
        measured,
        counts,
        plan,
        bad,
        step,
        _once(params_norms),
    )


def _any_bad(
    measured: group_norms.Measured, layout: grouping.Layout, drop: bool
) -> Any:
    """Returns whether an entry of any leaf, on any device, is not finite."""
    if layout.groups and not drop:
        return jnp.any(~jnp.isfinite(measured.norm[0]))
    return jnp.any(measured.kinds)


def rules_for(options: Options, layout: grouping.Layout, plan: Any) -> tuple[Rule, ...]:
    """Returns the rule of each array of norms; one for each leaf in element scope."""
    rule, names = options.rule, layout.names
    kinds = plan.kinds or ((),)
    if rule.for_groups is None:
        return (rule,) * (len(layout.axes) if options.scope.by_element else len(kinds))
    if layout.scalar:
        raise ValueError(
            f"`{rule.name}` has a threshold for each group of leaves, and the scope is "
            "the whole tree, which is one group. Give a scope such as "
            "`optclip.scopes.label(...)` or `optclip.scopes.leaf()`, or one threshold."
        )
    if options.scope.by_element:
        rows = [[name] for name in names]
    elif layout.groups:
        rows = [list(names)]
    else:
        rows = [[names[i] for i in kind] for kind in kinds]
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
        return norm.reshape(()) if call.layout.scalar else norm

    return Context(call.step, tree_norm, params_norm)


def finish(y: jax.Array, like: jax.Array, update_dtype: Any) -> jax.Array:
    """Rounds once, to the dtype of ``like`` or to an ``update_dtype`` wider than it."""
    dtype = like.dtype
    if update_dtype is not None and jnp.issubdtype(dtype, jnp.floating):
        if jnp.finfo(dtype).bits < jnp.finfo(update_dtype).bits:
            dtype = jnp.dtype(update_dtype)
    y = y.astype(dtype)
    if getattr(like, "weak_type", False) and dtype == like.dtype:
        y = like.at[...].set(y)  # which keeps the weak type of ``like``
    return y
