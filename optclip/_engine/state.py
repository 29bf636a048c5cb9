"""The state of a clip: what it did at the last step, and how often it did it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optclip._engine.names import path_codes, path_name
from optclip._engine.numerics import LAST_COUNT, increment

__all__ = [
    "ClipState",
    "GroupStats",
    "NonfiniteStats",
    "UnrecordedState",
    "count_event",
    "finite_threshold",
    "init_clip_state",
    "init_nonfinite",
    "kind_of",
    "per_leaf",
    "record_nonfinite",
    "row_numbers",
    "to_finite_f32",
    "tree_copy",
    "tree_where",
    "validate_state",
]


class NonfiniteStats(NamedTuple):
    """What non-finite entries a transformation met.

    Attributes:
        nonfinite_steps: int32 scalar. Updates that held a NaN or inf; 0 at first.
        last_nonfinite_step: int32 scalar. The number of the last such update, where the
            first update is number 0; -1 if there was none.
        nonfinite_kinds: int32[leaves, 3]. 1 where a leaf held NaN, +inf, -inf at that
            update, else 0; 0 at first.
        leaf_code: int32[leaves]. A code of each leaf's path, by which
            `nonfinite_leaves` and `leaf_metrics` find its name.
    """

    nonfinite_steps: jax.Array
    last_nonfinite_step: jax.Array
    nonfinite_kinds: jax.Array
    leaf_code: jax.Array


class GroupStats(NamedTuple):
    """What happened to each group at the last update.

    Each field is one float32 vector where whole leaves are grouped. Where leaves are
    split into layers it is a tuple of arrays, one per kind (shape) of leaf, with a row
    per leaf of that kind.

    Attributes:
        group_norm: The norms before the clip; 0 at first.
        group_threshold: The thresholds; 0 at first, and the largest float32 where there
            is none.
        group_scale: The factors; 1 at first.
        group_of_leaf: int32[leaves]. Which group (or which kind) a leaf belongs to.
    """

    group_norm: Any
    group_threshold: Any
    group_scale: Any
    group_of_leaf: jax.Array


class ClipState(NamedTuple):
    """State of every transformation made by `optclip.clip_by_rule`.

    All arrays have shapes and dtypes that never change. Read them with
    `optclip.metrics`, `optclip.leaf_metrics` and `optclip.nonfinite_leaves`.

    Attributes:
        rule_state: What the rule remembers, a tuple with one entry for each array of
            norms; it never holds a NaN or inf of the gradients.
        norm_before: float32 scalar. Norm of the whole tree before the clip, non-finite
            if the updates are; 0 at first. In element scope, the largest magnitude.
        norm_after: float32 scalar. The same after the clip.
        threshold: float32 scalar. Threshold of the group with the smallest scale, of
            several scaled alike the smallest; the largest float32 where there is none,
            as in a warm-up; 0 at first.
        scale: float32 scalar. The smallest factor that a group was multiplied by; 1 at
            first.
        clipped: float32 scalar. Share of the groups whose norm was above the threshold,
            or that an ``eps`` scaled down just below it; between 0 and 1. In element
            scope, of the leaves with such an entry.
        steps: int32 scalar. Updates so far. All counters stop at 2**31 - 1.
        clipped_steps: int32 scalar. Updates in which a group was above its threshold;
            stops when ``steps`` does.
        nonfinite: A `NonfiniteStats`: the non-finite entries.
        groups: A `GroupStats` in leaf, label and layer scope, else None.
    """

    rule_state: tuple
    norm_before: jax.Array
    norm_after: jax.Array
    threshold: jax.Array
    scale: jax.Array
    clipped: jax.Array
    steps: jax.Array
    clipped_steps: jax.Array
    nonfinite: NonfiniteStats
    groups: GroupStats | None


class UnrecordedState(NamedTuple):
    """State of a clip that keeps no figures: ``record=False``.

    Attributes:
        rule_state: As in `ClipState`.
        steps: int32 scalar. Updates so far; stops at 2**31 - 1.
    """

    rule_state: tuple
    steps: jax.Array


def scalar(value: float | int, dtype: Any = jnp.float32) -> jax.Array:
    """Returns a new scalar array: no two fields of a state may share a buffer."""
    return jnp.array(value, dtype)


def tree_copy(tree: Any) -> Any:
    """Returns a tree of new arrays: no two fields of a state may share a buffer."""
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


def tree_where(flag: jax.Array, if_set: Any, otherwise: Any) -> Any:
    """Returns one of two trees, entry by entry: nothing is multiplied by zero."""
    return jax.tree.map(lambda a, b: jnp.where(flag, a, b), if_set, otherwise)


def to_finite_f32(tree: Any) -> Any:
    """Returns statistics as new float32 arrays, in which finite ones stay finite."""
    largest = float(jnp.finfo(jnp.float32).max)

    def figure(x):
        bounded = jnp.where(jnp.isfinite(x), jnp.clip(x, -largest, largest), x)
        return jnp.array(bounded, jnp.float32, copy=True)

    return jax.tree.map(figure, tree)


def finite_threshold(tree: Any) -> Any:
    """Returns thresholds as new float32 arrays; an infinite one is the largest float32.

    So a threshold that does not exist yet is a number in JSON, and no inf in a state
    means that something overflowed.
    """
    largest = float(jnp.finfo(jnp.float32).max)
    return jax.tree.map(
        lambda x: jnp.array(jnp.clip(x, -largest, largest), jnp.float32, copy=True),
        tree,
    )


def init_nonfinite(paths: Sequence[str]) -> NonfiniteStats:
    """Returns the `NonfiniteStats` of a transformation that has met nothing yet."""
    return NonfiniteStats(
        nonfinite_steps=scalar(0, jnp.int32),
        last_nonfinite_step=scalar(-1, jnp.int32),
        nonfinite_kinds=jnp.zeros((max(len(paths), 1), 3), jnp.int32),
        leaf_code=jnp.array(path_codes(list(paths))),
    )


def init_clip_state(paths: Sequence[str]) -> ClipState:
    """Returns the `ClipState` of a transformation without a rule and groups."""
    return ClipState(
        (),
        scalar(0.0),
        scalar(0.0),
        scalar(0.0),
        scalar(1.0),
        scalar(0.0),
        scalar(0, jnp.int32),
        scalar(0, jnp.int32),
        init_nonfinite(paths),
        None,
    )


def row_numbers(seen: NonfiniteStats, paths: Sequence[str]) -> jax.Array:
    """Returns which row of a state each leaf has; past the end if `init` had it not.

    For updates in which some leaves are None that `init` saw: the others are found by
    the codes of their paths.
    """
    codes = jnp.asarray(seen.leaf_code)
    mine = jnp.asarray(path_codes(list(paths)))
    order = jnp.argsort(codes)
    place = jnp.searchsorted(codes, mine, sorter=order)
    row = order[jnp.minimum(place, codes.size - 1)].astype(jnp.int32)
    return jnp.where(codes[row] == mine, row, codes.size)


def per_leaf(
    values: jax.Array, like: jax.Array, seen: NonfiniteStats, paths: Sequence[str]
) -> jax.Array:
    """Returns a row per leaf of the updates as rows per leaf that `init` saw."""
    if values.shape == like.shape:
        return values
    rows = row_numbers(seen, paths)
    return jnp.zeros(like.shape, values.dtype).at[rows].set(values, mode="drop")


def count_event(
    steps: jax.Array, events: jax.Array, happened: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the counts of steps and of events after one more step.

    At the end of int32 both stop, so that their quotient stays a share of the steps.
    """
    going = steps < LAST_COUNT
    return (
        increment(steps),
        jnp.where(happened & going, increment(events), events),
    )


def record_nonfinite(
    seen: NonfiniteStats,
    kinds: jax.Array,
    bad: jax.Array,
    step: jax.Array,
    paths: Sequence[str],
) -> NonfiniteStats:
    """Returns the statistics after an update with these non-finite entries."""
    kinds = per_leaf(kinds.astype(jnp.int32), seen.nonfinite_kinds, seen, paths)
    return NonfiniteStats(
        nonfinite_steps=jnp.where(
            bad, increment(seen.nonfinite_steps), seen.nonfinite_steps
        ),
        last_nonfinite_step=jnp.where(bad, step, seen.last_nonfinite_step),
        nonfinite_kinds=jnp.where(bad, kinds, seen.nonfinite_kinds),
        leaf_code=seen.leaf_code,
    )


# What has a row per leaf that `init` saw. Updates may have fewer leaves, where nothing
# else in the state depends on them.
_ROWS = {"nonfinite/leaf_code", "nonfinite/nonfinite_kinds", "leaf_norm"}


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path): jnp.shape(x) for path, x in flat}


def _without_empty_fields(state: Any) -> Any:
    named = state._asdict()
    return jax.tree.structure({k: x for k, x in named.items() if jax.tree.leaves(x)})


def _has_more_rows(state: Any, wanted: Any, absent: int) -> bool:
    """Returns whether a state fits, but that `init` saw leaves which are None now."""
    got, right = _shapes(state), _shapes(wanted)
    differ = {p for p in right if got.get(p) != right[p]}
    return (
        got.keys() == right.keys()
        and (bool(differ) or absent > 0)
        and differ <= _ROWS
        and all(got[p][1:] == right[p][1:] for p in differ)
        and all(0 < got[p][0] - right[p][0] <= absent for p in differ)
        and _without_empty_fields(state) == _without_empty_fields(wanted)
    )


_LEFT_OUT = (
    ". If gradients are None where parameters are not trained, leave these out in "
    "`init` too, as in `tx.init(eqx.filter(model, eqx.is_inexact_array))`"
)


def _difference(state: Any, wanted: Any) -> str:
    """Says where a state first differs from one of the right layout; "" if nowhere."""
    got, right = _shapes(state), _shapes(wanted)
    if got == right:
        alike = jax.tree.structure(state) == jax.tree.structure(wanted)
        return "" if alike else "its arrays are nested in another way"
    codes = "nonfinite/leaf_code"
    if codes in got and got[codes] != right.get(codes, got[codes]):
        more = got[codes] > right[codes]
        return (
            f"`init` saw {got[codes][0]} leaves of real or complex numbers, and the "
            f"updates have {right[codes][0]}{_LEFT_OUT if more else ''}"
        )
    path = next(p for p in right | got if got.get(p) != right.get(p))
    if path not in got:
        return f"it has no `{path}`"
    if path not in right:
        field = path.split("/")[0]
        more = any(p.startswith(f"{field}/") for p in right)
        return f"it has `{path}`, which has no place in it{_LEFT_OUT if more else ''}"
    local = ""
    if jax.sharding.get_abstract_mesh().manual_axes:
        local = (
            ". Inside `jax.shard_map` it is the local shape that counts: give the "
            "state the PartitionSpecs that `optclip.state_specs` returns"
        )
    return f"`{path}` has the shape {got[path]} and should have {right[path]}{local}"


def kind_of(found: Any, state: Any) -> Any:
    """Returns the types of updates and the layout of a state, or None without types."""
    leaves, structure = jax.tree.flatten(state)
    shapes = tuple(getattr(x, "shape", None) for x in leaves)
    return found.kind and (found.kind, structure, shapes)


def validate_state(
    state: Any, init: Callable[[], Any], foreign: Sequence[str] = (), absent: int = 0
) -> Any:
    """Returns ``state``, once it is known to be laid out as what ``init`` returns.

    Types, structure and shapes are compared, but for the fields ``foreign``: a compiled
    step pays nothing, and batched, sharded and NumPy arrays pass. A state made for up
    to ``absent`` more leaves passes where it has only rows of telemetry for them.
    """
    wanted = jax.eval_shape(init)
    kind = type(wanted)
    if not isinstance(state, kind):
        raise TypeError(
            f"`state` must be the `{kind.__name__}` that `init` returned, got "
            f"`{type(state).__name__}`. Call `update(updates, state, params)`, restore "
            "a checkpoint into what `init` returns, and call `init` again after a "
            "change of optimizer."
        )
    blank = dict.fromkeys(foreign, ())
    mine, wanted = state._replace(**blank), wanted._replace(**blank)
    difference = _difference(mine, wanted)
    if difference and not _has_more_rows(mine, wanted, absent):
        raise ValueError(
            f"`state` is a `{kind.__name__}` that does not fit here: {difference}. "
            "A state of other parameters, of other options or of another version does "
            "not fit either. Call `init` again with the parameters; they and the "
            'optimizer\'s own state can be kept: see "Checkpoints" in the '
            "documentation."
        )
    return state
