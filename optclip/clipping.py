"""The clipping engine, which measures norms, computes thresholds and scales updates.

    updates -> scope -> norms -> rule -> limits -> action -> scales -> updates'

The engine also records statistics. Only the engine handles pytrees, non-finite values,
state and mesh axes. A published method is implemented by passing a rule, a scope and an
action to `clip_by_rule`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optclip import actions, scopes
from optclip._engine import pytrees, sharding, validation
from optclip._engine import state as states
from optclip._engine.elements import clamp_elements
from optclip._engine.numerics import increment
from optclip._engine.rule import Rule
from optclip._engine.scaling import scale_groups
from optclip._engine.state import ClipState, GroupStats, UnrecordedState
from optclip._engine.thresholds import as_rule
from optclip._engine.types import DType, NonfinitePolicy, Order
from optclip._engine.update import POLICIES, Options, cut_of, measure_updates, rules_for
from optclip._engine.validation import EUCLIDEAN

__all__ = ["clip_by_rule"]


def _group_stats(arrays: tuple, layout: Any, which: jax.Array) -> GroupStats:
    """Returns the `GroupStats` from (norms, thresholds, scales) of all groups."""
    fields = arrays
    if layout.groups is not None:
        fields = [a[0] for a in arrays]
    norm, threshold, scale = fields
    return GroupStats(
        states.to_finite_f32(norm),
        states.finite_threshold(threshold),
        states.to_finite_f32(scale),
        which,
    )


def clip_by_rule(
    rule: Rule
    | jax.typing.ArrayLike
    | Callable[[jax.Array], jax.typing.ArrayLike]
    | Mapping[str, Any],
    *,
    scope: scopes.Scope = scopes.tree(),
    ord: Order = EUCLIDEAN,
    action: actions.Action | None = None,
    nonfinite: NonfinitePolicy = "propagate",
    axis_name: Any = None,
    update_dtype: DType = None,
    record: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Clips updates using any rule, scope and action.

    Most clips in optclip are built on this function. The ``scope`` splits the
    updates into groups. For each group, the ``rule`` computes a threshold t from the
    norm n (of order ``ord``), and the ``action`` computes a scale from n and t. The
    group is multiplied by this scale. By default, all updates form one group, and
    u' = u * min(1, t / n). Products are computed in float32 or higher precision and
    rounded once.

    | updates                     | returned                                        |
    | --------------------------- | ----------------------------------------------- |
    | norm within the threshold   | the updates, bitwise unchanged                  |
    | all zero                    | zeros; the scale is 1                           |
    | threshold 0                 | zeros                                           |
    | threshold inf               | the updates, unchanged                          |
    | NaN or inf, "propagate"     | the group unchanged                             |
    | NaN or inf, "zero"          | zeros for the group                             |
    | NaN or inf, "drop"          | zeros for those entries; the others are clipped |
    | NaN or inf, "skip"          | zeros for all updates; no rule state changes    |
    | integers, None, MaskedNode  | unchanged and not measured                      |

    The state of a rule does not change for a group whose norm is non-finite.

    Args:
        rule: A rule from `optclip.rules`, or a threshold: a number, an array, a
            schedule (a function of the step), or a map from labels or path patterns to
            any of these, as in `optclip.rules.by_name`. A threshold of 0 sets all
            updates to zero; inf disables clipping.
        scope: A scope from `optclip.scopes`, which determines the entries that share
            one norm.
        ord: The order of the norm: a number that is at least 1, inf or "rms".
        action: An action from `optclip.actions`, which determines how groups are
            scaled. None means `actions.rescale`. `optax.inject_hyperparams` treats
            every function as a schedule, so pass ``static_args=("action",)`` to it.
        nonfinite: How to handle NaN and inf: "propagate", "zero", "drop" or "skip".
        axis_name: Inside `jax.shard_map` or `jax.pmap`, the mesh axes that the updates
            are sharded over: one or more names, "auto" to read the axes of each leaf
            from its type, or a pytree of names or PartitionSpecs. Not needed under
            `jax.jit`.
        update_dtype: A wider dtype in which half-precision updates are returned without
            rounding. `jnp.float32` also saves XLA a copy. By default, the dtypes of the
            updates do not change.
        record: Whether the state records the statistics that `metrics`, `leaf_metrics`
            and `nonfinite_leaves` return. This adds a few small kernels. In element
            scope, it adds one more pass over the updates, unless the rule or
            ``nonfinite="skip"`` requires that pass anyway.

    Returns:
        A transformation whose state is a `ClipState`, or an `UnrecordedState` if
        ``record`` is False. Only some rules need ``params``.

    Raises:
        ValueError: If an option has an invalid value, a number is out of range, or the
            rule can't be used in the scope.
        TypeError: If an argument has the wrong type.

    Example:
        >>> import jax.numpy as jnp, optax, optclip
        >>> tx = optax.chain(optclip.clip_by_rule(1.0), optax.sgd(0.1))
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
    made = "made by a function of `optclip.scopes`: `tree()`, `leaf()`, `label(...)`, "
    made += "`layer(...)`, `unit()` or `element()`"
    validation.instance("scope", scope, scopes.Scope, made)
    action = actions.rescale if action is None else action
    if not callable(action):
        raise TypeError(
            "`action` must be `rescale`, `normalize`, `zero` or `soften()` of "
            f"`optclip.actions`, or a function of norms and limits, got {action!r}."
        )
    if action is actions.soften:
        raise TypeError(
            "`action` must be a function of norms and limits, got `actions.soften`, "
            "which returns one: call it, as in `action=actions.soften()`."
        )
    if update_dtype is not None:
        validation.floating("update_dtype", update_dtype)
    record = validation.flag("record", record)
    order = np.inf if scope.by_element else validation.order(ord)
    rule = as_rule(rule, "rule")
    if rule.elements_only and not scope.by_element:
        raise ValueError(
            f"The rule `{rule.name}` is about single entries and can't be used in "
            f"{scope!r}. Give `scope=optclip.scopes.element()`."
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

    # ``cuts`` caches results that depend only on the types of the updates. With an
    # ``axis_name``, these results also depend on the mesh, so they are not cached.
    # ``validated`` caches the types of updates and states that passed `validate_state`.
    cuts: dict = {}
    validated: dict = {}

    def cut_for(updates, found, *, mapped):
        key = found.kind if axis_name is None else None
        make = functools.partial(cut_of, options, updates, found, mapped)
        return pytrees.memoized(cuts, key, make)

    def init_fn(params) -> Any:
        state = first_state(params)
        check_keys = getattr(rule.for_groups, "check_keys", None)
        if check_keys is not None:
            tree = pytrees.trained(params)
            cut = cut_for(tree, pytrees.leaves_of(tree), mapped=False)
            check_keys(cut.layout.names)
        both = states.kind_of(pytrees.leaves_of(params), state)
        pytrees.memoized(validated, both, lambda: True)
        return state

    def first_state(params) -> Any:
        params = pytrees.trained(params)
        found = pytrees.leaves_of(params)
        cut = cut_for(params, found, mapped=False)
        layout, shapes = cut.layout, cut.shapes
        if scope.by_element:
            shapes = tuple(x.shape for x in found.leaves)
        norms = tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)
        array_rules = rules_for(options, cut) if found.leaves else ()
        rule_state = tuple(r.init(n) for r, n in zip(array_rules, norms, strict=False))
        if scope.by_element:
            each = zip(rule_state, found.leaves, strict=True)
            rule_state = tuple(sharding.sharded_like(state, x) for state, x in each)
        if not record:
            steps = states.scalar(0, jnp.int32)
            return UnrecordedState(states.tree_copy(rule_state), steps)
        groups: Any = ()
        if layout.scalar and not scope.by_element:
            groups = None
        elif not (layout.scalar or scope.summary):
            rows = cut.plan.groups.rows
            whole_leaves = layout.groups is not None
            which = [row if whole_leaves else array for array, row in rows] or [0]
            which = jnp.array(which, jnp.int32)
            ones = tuple(map(jnp.ones_like, norms))
            groups = _group_stats((norms, norms, ones), layout, which)
        return ClipState(
            rule_state=states.tree_copy(rule_state),
            norm_before=states.scalar(0.0),
            norm_after=states.scalar(0.0),
            threshold=states.scalar(0.0),
            scale=states.scalar(1.0),
            clipped=states.scalar(0.0),
            steps=states.scalar(0, jnp.int32),
            clipped_steps=states.scalar(0, jnp.int32),
            nonfinite=states.init_nonfinite(found.paths),
            groups=groups,
        )

    def update_fn(updates, state, params=None, **extra_args) -> Any:
        del extra_args
        found = pytrees.leaves_of(updates)
        pytrees.memoized(
            validated,
            states.kind_of(found, state),
            lambda: states.validate_state(
                state, lambda: first_state(updates), absent=found.absent
            ),
        )
        if not found.leaves:
            return updates, state._replace(steps=increment(state.steps))
        cut = cut_for(updates, found, mapped=True)
        call = measure_updates(options, updates, found, cut, params, state.steps)
        pipeline = clamp_elements if scope.by_element else scale_groups
        done = pipeline(call, state.rule_state)
        # If the state of the rule has no arrays, return it unchanged, so that its
        # structure never changes.
        has_state = jax.tree.leaves(state.rule_state)
        rule_state = done.rule_state if has_state else state.rule_state
        updates = call.found.rebuild(done.leaves)
        if done.statistics is None:
            return updates, UnrecordedState(rule_state, increment(state.steps))
        before, after, threshold, scale, clipped, bad = sharding.in_one_array(
            [*done.statistics, call.bad.astype(jnp.float32)]
        )
        kinds, paths = call.measured.kinds, call.found.paths
        stats = states.record_nonfinite(
            state.nonfinite, kinds, bad > 0, state.steps, paths
        )
        groups = state.groups
        if isinstance(groups, GroupStats) and done.group_stats is not None:
            groups = _group_stats(done.group_stats, cut.layout, groups.group_of_leaf)
        steps, clipped_steps = states.count_event(
            state.steps, state.clipped_steps, clipped > 0
        )
        new_state = ClipState(
            rule_state=rule_state,
            norm_before=states.to_finite_f32(before),
            norm_after=states.to_finite_f32(after),
            threshold=states.finite_threshold(threshold),
            scale=states.to_finite_f32(scale),
            clipped=states.to_finite_f32(clipped),
            steps=steps,
            clipped_steps=clipped_steps,
            nonfinite=stats,
            groups=groups,
        )
        return updates, new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
