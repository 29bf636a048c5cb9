"""The engine: measure, find the threshold, scale, and remember what was done.

    updates -> scope -> norms -> rule -> limits -> action -> scales -> updates'

It is the only place that deals with trees, non-finite values, state and mesh axes; a
published method is a rule, a scope and an action handed to `clip`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optclip import actions, scopes
from optclip._engine import barriers, group_norms, pytrees, sharding, validation
from optclip._engine import state as states
from optclip._engine.elements import clamp_elements
from optclip._engine.numerics import increment
from optclip._engine.rule import Rule
from optclip._engine.scaling import empty_norms, scale_groups
from optclip._engine.state import ClipState, GroupStats, UnrecordedState
from optclip._engine.thresholds import as_rule
from optclip._engine.update import POLICIES, Options, begin, rules_for
from optclip._engine.validation import EUCLIDEAN

__all__ = ["clip"]


def _stats(arrays: tuple, layout: Any, which: jax.Array) -> GroupStats:
    picked = [a[0] if layout.groups or len(a) == 0 else a for a in arrays]
    norm, threshold, scale = picked
    return GroupStats(
        states.figures(norm),
        states.finite_threshold(threshold),
        states.figures(scale),
        which,
    )


def clip(
    rule: Rule | jax.typing.ArrayLike | Callable | Mapping,
    *,
    scope: scopes.Scope = scopes.tree(),
    ord: float | str = EUCLIDEAN,
    action: actions.Action | None = None,
    nonfinite: str = "propagate",
    axis_name: Any = None,
    update_dtype: Any = None,
    record: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Clips updates by any rule, in any scope, with any action: the engine itself.

    Each group of entries (``scope``) with norm n (``ord``) gets a threshold t
    (``rule``) and is multiplied by a scale (``action``); by default all updates are
    one group, and u' = u * min(1, t / n). Products are taken in float32 or wider and
    rounded once.

    | updates                     | returned                                        |
    | --------------------------- | ----------------------------------------------- |
    | within the threshold        | bitwise the updates                             |
    | all zero                    | zeros; scale 1                                  |
    | threshold 0, or inf         | zeros, or the updates                           |
    | NaN or inf, "propagate"     | that group unchanged                            |
    | NaN or inf, "zero"          | that group all zeros                            |
    | NaN or inf, "drop"          | those entries zero, the rest clipped            |
    | NaN or inf, "skip"          | all updates zero, the rule's state as it was    |
    | integers, None, MaskedNode  | unchanged, not measured                         |

    The state of a rule is kept as it was wherever a norm is not finite.

    Args:
        rule: A rule of `optclip.rules`, or a threshold: a number, an array, a schedule
            (a function of the step), or a map from label or path pattern to any of
            these, as for `optclip.rules.by_name`. 0 gives zeros, so that training
            stops; inf switches the clip off.
        scope: Which entries share one norm, from `optclip.scopes`.
        ord: The norm's order: a number of at least 1, inf or "rms".
        action: What happens to a group, from `optclip.actions`; None for
            `actions.rescale`. Under `optax.inject_hyperparams`, which takes every
            function for a schedule, pass ``static_args=("action",)`` with it.
        nonfinite: What happens to NaN and inf: "propagate", "zero", "drop" or "skip".
        axis_name: Inside `jax.shard_map` or `jax.pmap`, the mesh axes that the updates
            are sharded over: a name or several, "auto" to read each leaf's own from its
            type, or a tree of names or PartitionSpecs. Not needed under `jax.jit`.
        update_dtype: A wider dtype to hand half-precision updates on in, unrounded:
            `jnp.float32` saves XLA a copy of them. By default dtypes are kept.
        record: Whether the state keeps what `metrics`, `leaf_metrics` and `culprits`
            read. In all scopes but element scope, the norms are measured anyway, and
            figures cost a few small kernels. In element scope they cost one more read
            of the updates, unless the rule or "skip" asks for it anyway.

    Returns:
        A transformation with `ClipState`, or without ``record`` `UnrecordedState`. Only
        some rules need ``params``.

    Raises:
        ValueError: If an option is none of those named, or a number is out of range.
        TypeError: If the rule is none of those named.

    Example:
        >>> import jax.numpy as jnp, optax, optclip
        >>> tx = optax.chain(optclip.clip(1.0), optax.sgd(0.1))
        >>> params = {"w": jnp.zeros(2)}
        >>> state = tx.init(params)
        >>> updates, state = tx.update({"w": jnp.array([3.0, 4.0])}, state, params)
        >>> float(optclip.metrics(state)["clip/norm_before"])
        5.0

    Reference:
        Pascanu, Mikolov and Bengio, On the difficulty of training recurrent neural
        networks, 2013, https://arxiv.org/abs/1211.5063
    """
    validation.one_of("nonfinite", nonfinite, POLICIES)
    validation.instance("scope", scope, scopes.Scope, "made by `optclip.scopes`")
    action = actions.rescale if action is None else action
    if not callable(action):
        raise TypeError(f"`action` must be one of `optclip.actions`, got {action!r}.")
    if action is actions.soften:
        raise TypeError(
            "`action` must be a function of norms and limits, got `actions.soften`, "
            "which makes one: call it, as in `action=actions.soften()`."
        )
    if update_dtype is not None:
        validation.floating("update_dtype", update_dtype)
    record = validation.flag("record", record)
    order = np.inf if scope.by_element else validation.order(ord)
    rule = as_rule(rule, "rule")
    if rule.elements_only and not scope.by_element:
        raise ValueError(
            f"The rule `{rule.name}` is about single entries: give "
            f"`scope=optclip.scopes.element()`, got {scope!r}."
        )
    options = Options(
        rule,
        scope,
        order,
        action,
        nonfinite,
        axis_name,
        update_dtype,
        record,
    )

    def init_fn(params) -> Any:
        params = pytrees.trained(params)
        found = pytrees.leaves_of(params)
        layout = scope.layout(params, found.paths, found.leaves)
        plan = group_norms.plan_of(
            params, found, layout, order=order, axis_name=axis_name
        )
        norms = empty_norms(layout, found.leaves, plan)
        if scope.by_element:
            norms = tuple(jnp.zeros(x.shape, jnp.float32) for x in found.leaves)
        own_rules = rules_for(options, layout, plan) if found.leaves else ()
        rule_state = tuple(r.init(n) for r, n in zip(own_rules, norms, strict=False))
        if scope.by_element:
            each = zip(rule_state, found.leaves, strict=True)
            rule_state = tuple(sharding.lying_like(own, x) for own, x in each)
        if not record:
            steps = states.scalar(0, jnp.int32)
            return UnrecordedState(states.copied(rule_state), steps)
        groups = None
        if not (layout.scalar or scope.summary):
            which = np.zeros(max(len(found.leaves), 1), int)
            for number, kind in enumerate(plan.kinds):
                which[list(kind)] = number
            which = np.asarray(layout.groups or which)
            ones = tuple(map(jnp.ones_like, norms))
            groups = _stats((norms, norms, ones), layout, jnp.array(which, jnp.int32))
        return ClipState(
            rule_state=states.copied(rule_state),
            norm_before=states.scalar(0.0),
            norm_after=states.scalar(0.0),
            threshold=states.scalar(0.0),
            scale=states.scalar(1.0),
            clipped=states.scalar(0.0),
            steps=states.scalar(0, jnp.int32),
            clipped_steps=states.scalar(0, jnp.int32),
            seen=states.first_seen(found.paths),
            groups=groups,
        )

    def update_fn(updates, state, params=None, **extra_args) -> Any:
        del extra_args
        found = pytrees.leaves_of(updates)
        state = states.own(state, lambda: init_fn(updates), absent=found.absent)
        if not found.leaves:
            return updates, state._replace(steps=increment(state.steps))
        call = begin(options, updates, params, state.steps)
        pipeline = clamp_elements if scope.by_element else scale_groups
        done = pipeline(call, state.rule_state)
        # Without a memory there is nothing in it but the structure that `init` made.
        remembers = jax.tree.leaves(state.rule_state)
        rule_state = done.rule_state if remembers else state.rule_state
        updates = call.found.rebuild(done.leaves)
        if done.figures is None:
            return updates, UnrecordedState(rule_state, increment(state.steps))
        before, after, threshold, scale, clipped, bad = barriers.in_one_array(
            [*done.figures, call.bad.astype(jnp.float32)]
        )
        kinds, paths = call.measured.kinds, call.found.paths
        seen = states.look(state.seen, kinds, bad > 0, state.steps, paths)
        groups = state.groups
        if groups is not None and done.stats is not None:
            groups = _stats(done.stats, call.layout, groups.group_of_leaf)
        steps, clipped_steps = states.counted(
            state.steps, state.clipped_steps, clipped > 0
        )
        new_state = ClipState(
            rule_state=rule_state,
            norm_before=states.figures(before),
            norm_after=states.figures(after),
            threshold=states.finite_threshold(threshold),
            scale=states.figures(scale),
            clipped=states.figures(clipped),
            steps=steps,
            clipped_steps=clipped_steps,
            seen=seen,
            groups=groups,
        )
        return updates, new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
