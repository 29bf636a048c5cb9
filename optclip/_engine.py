"""What the two pipelines of the engine share: their inputs, outputs and small steps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optclip import _layouts, _measure, _trees, rules, scopes

__all__ = [
    "Call",
    "Figures",
    "Options",
    "Outcome",
    "apply_rule",
    "begin",
    "check_order",
    "context_of",
    "finish",
    "rules_for",
]

POLICIES = ("propagate", "zero", "drop", "skip")


class Options(NamedTuple):
    """What was chosen when the transformation was built."""

    rule: rules.Rule
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
    rules: tuple[rules.Rule, ...]
    found: _trees.Leaves
    layout: _layouts.Layout
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
    found = _trees.leaves_of(updates)
    updates = _trees.trained(updates)
    layout = options.scope.layout(updates, found.paths, found.leaves)
    drop = options.nonfinite == "drop"
    how = {"order": options.order, "axis_name": options.axis_name}
    measured = bad = None
    if options.measures:
        measured, counts, plan = _measure.measure_layout(
            updates, found, layout, drop=drop, **how
        )
        bad = _any_bad(measured, layout, drop)
    else:
        counts, plan = (), _measure.plan_of(updates, found, layout, **how)
        _measure.check_mesh(plan)

    def params_norms():
        if params is None:
            raise ValueError(
                f"`{options.rule.name}` compares the updates with the parameters: call "
                "`update(updates, state, params)`."
            )
        mine = found._replace(leaves=_trees.matching(updates, params))
        return _measure.measure_layout(updates, mine, layout, **how)[0].norm

    return Call(
        options, rules_for(options, layout, plan), found, layout, measured, counts,
        plan, bad, step, _once(params_norms),
    )  # fmt: skip


def _any_bad(measured: _measure.Measured, layout: _layouts.Layout, drop: bool) -> Any:
    """Returns whether an entry of any leaf, on any device, is not finite."""
    if layout.groups and not drop:
        return jnp.any(~jnp.isfinite(measured.norm[0]))
    return jnp.any(measured.kinds)


def rules_for(
    options: Options, layout: _layouts.Layout, plan: Any
) -> tuple[rules.Rule, ...]:
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


def check_order(options: Options, limit: rules.Limit) -> None:
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


def context_of(call: Call, index: int, tree_norm: jax.Array) -> rules.Context:
    """Returns what the rule may look at for the array of norms number ``index``."""

    def params_norm():
        norm = call.params_norms()[index]
        return norm.reshape(()) if call.layout.scalar else norm

    return rules.Context(call.step, tree_norm, params_norm)


def _shapes(tree: Any) -> Any:
    return jax.tree.structure(tree), [jnp.shape(x) for x in jax.tree.leaves(tree)]


def _is_whole(x: Any) -> bool:
    return not jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def apply_rule(
    rule: rules.Rule,
    norm: jax.Array,
    state: Any,
    context: rules.Context,
    *,
    signed: bool = False,
    elements: bool = False,
) -> tuple[rules.Limit, Any]:
    """Returns (limit, state) of a rule, once it is known to be what a rule returns.

    A threshold or target that is negative or NaN counts as 0: it never flips a sign.
    Where numbers other than norms are judged, ``signed``, it may be negative. A limit
    may have a lower bound only in the element scope, ``elements``.
    """
    result = rule.update(norm, state, context)
    pair = isinstance(result, tuple) and len(result) == 2
    if not pair or not isinstance(result[0], rules.Limit):
        raise ValueError(
            f"`update` of the rule `{rule.name}` must return (Limit, state), got a "
            f"{type(result).__name__}."
        )
    limit, after = result
    if _shapes(after) != _shapes(state):
        raise ValueError(
            f"`update` of the rule `{rule.name}` must return a state of the structure "
            f"and shapes that it was given: {_shapes(state)}, got {_shapes(after)}."
        )
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True)
    if any(_is_whole(old) and not _is_whole(new) for old, new in pairs):
        raise ValueError(
            f"`update` of the rule `{rule.name}` returns real numbers where its state "
            "holds whole ones, which would be cut off. Let `init` give a float32 array."
        )
    for value in limit[:2]:
        fits = jnp.ndim(value) <= norm.ndim and all(
            n in (1, own)
            for n, own in zip(jnp.shape(value)[::-1], norm.shape[::-1], strict=False)
        )
        if not fits:
            raise ValueError(
                f"The limits of the rule `{rule.name}` must broadcast against the "
                f"norms of shape {norm.shape}, got {jnp.shape(value)}."
            )
    if limit.low is not None and not elements:
        raise ValueError(
            f"The rule `{rule.name}` allows values between two bounds, which is about "
            "entries and not about norms: give `scope=optclip.scopes.element()`, or "
            "use `optclip.clip_by_value`."
        )
    if limit.low is None and not signed:
        sane = [jnp.where(jnp.asarray(v) > 0, v, 0.0) for v in limit[:2]]
        limit = rules.Limit(*sane)
    return limit, after


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
