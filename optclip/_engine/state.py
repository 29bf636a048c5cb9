"""The state of a clip: statistics of the last update, and counts of all updates."""

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
    """The non-finite entries that a transformation has encountered.

    Attributes:
        nonfinite_steps: int32 scalar. The number of updates with a NaN or inf;
            initially 0.
        last_nonfinite_step: int32 scalar. The number of the last such update, counted
            from 0; -1 if there was none.
        nonfinite_kinds: int32[leaves, 3]. Whether (1 or 0) each leaf contained NaN,
            +inf, -inf at that update; initially 0.
        leaf_code: int32[leaves]. A code of each leaf's path, which `nonfinite_leaves`
            and `leaf_metrics` use to find its name.
    """

    nonfinite_steps: jax.Array
    last_nonfinite_step: jax.Array
    nonfinite_kinds: jax.Array
    leaf_code: jax.Array


class GroupStats(NamedTuple):
    """Statistics of each group at the last update.

    If groups consist of whole leaves, the first three fields are float32 vectors with
    one entry per group. If leaves are split into layers, these fields are tuples of
    float32 arrays, one per leaf shape, with one row per leaf of that shape.

    Attributes:
        group_norm: The norms before clipping; initially 0.
        group_threshold: The thresholds; initially 0. The largest float32 means that
            there is no threshold.
        group_scale: The factors that groups were multiplied by; initially 1.
        group_of_leaf: int32[leaves]. The index of the group, or of the array, that each
            leaf belongs to.
    """

    group_norm: Any
    group_threshold: Any
    group_scale: Any
    group_of_leaf: jax.Array


class ClipState(NamedTuple):
    """State of every transformation made by `optclip.clip_by_rule`.

    The shapes and dtypes of all arrays never change. Read the state with
    `optclip.metrics`, `optclip.leaf_metrics` and `optclip.nonfinite_leaves`.

    Attributes:
        rule_state: The state of the rule, a tuple with one entry per array of norms.
            It is never affected by NaN or inf in the gradients.
        norm_before: float32 scalar. The norm of the whole tree before clipping, or the
            largest magnitude in element scope; initially 0, and non-finite if the
            updates are.
        norm_after: float32 scalar. The same norm after clipping.
        threshold: float32 scalar. The threshold of the group with the smallest scale,
            or the smallest threshold if several groups have that scale; initially 0.
            The largest float32 means that there is no threshold, as during warm-up.
        scale: float32 scalar. The smallest factor that a group was multiplied by;
            initially 1.
        clipped: float32 scalar. The fraction of groups whose norm was above the
            threshold, or just below it and scaled down because of an ``eps``. In
            element scope, the fraction of leaves with such an entry.
        steps: int32 scalar. The number of updates so far. All counters stop at
            2**31 - 1.
        clipped_steps: int32 scalar. The number of updates in which a group was above
            its threshold; stops when ``steps`` does.
        nonfinite: The `NonfiniteStats` of the updates.
        groups: A `GroupStats` in leaf, label and layer scope; () in unit and element
            scope, which have too many groups to store; None in tree scope, which has
            only one group.
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
    groups: GroupStats | tuple[()] | None


class UnrecordedState(NamedTuple):
    """State of a clip with ``record=False``, which keeps no statistics.

    Attributes:
        rule_state: As in `ClipState`.
        steps: int32 scalar. The number of updates so far; stops at 2**31 - 1.
    """

    rule_state: tuple
    steps: jax.Array


def scalar(value: float | int, dtype: Any = jnp.float32) -> jax.Array:
    """Returns a new scalar, since fields of a donated state can't share buffers."""
    return jnp.array(value, dtype)


def tree_copy(tree: Any) -> Any:
    """Copies all arrays, since fields of a donated state can't share buffers."""
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


def tree_where(flag: jax.Array, if_set: Any, otherwise: Any) -> Any:
    """Returns ``if_set`` if ``flag`` is set, else ``otherwise``, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(flag, a, b), if_set, otherwise)


def to_finite_f32(tree: Any) -> Any:
    """Returns statistics as new float32 arrays, keeping finite values finite."""
    largest = float(jnp.finfo(jnp.float32).max)

    def convert(x):
        bounded = jnp.where(jnp.isfinite(x), jnp.clip(x, -largest, largest), x)
        return jnp.array(bounded, jnp.float32, copy=True)

    return jax.tree.map(convert, tree)


def finite_threshold(tree: Any) -> Any:
    """Returns thresholds as new float32 arrays, with inf as the largest float32.

    Rules return inf until there is a threshold. JSON does not support inf, and an inf
    in a state should always mean that the updates were non-finite.
    """
    largest = float(jnp.finfo(jnp.float32).max)
    return jax.tree.map(
        lambda x: jnp.array(jnp.clip(x, -largest, largest), jnp.float32, copy=True),
        tree,
    )


def init_nonfinite(paths: Sequence[str]) -> NonfiniteStats:
    """Returns the `NonfiniteStats` of a transformation before its first update."""
    return NonfiniteStats(
        nonfinite_steps=scalar(0, jnp.int32),
        last_nonfinite_step=scalar(-1, jnp.int32),
        nonfinite_kinds=jnp.zeros((max(len(paths), 1), 3), jnp.int32),
        leaf_code=jnp.array(path_codes(list(paths))),
    )


def init_clip_state(paths: Sequence[str]) -> ClipState:
    """Returns the initial `ClipState` of a transformation without a rule or groups."""
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


def row_numbers(stats: NonfiniteStats, paths: Sequence[str]) -> jax.Array:
    """Returns the row of each leaf in the state, or the row count if it has no row.

    Leaves that were passed to `init` may be None in the updates, so rows are found by
    the codes of the leaves' paths.
    """
    codes = jnp.asarray(stats.leaf_code)
    wanted = jnp.asarray(path_codes(list(paths)))
    order = jnp.argsort(codes)
    place = jnp.searchsorted(codes, wanted, sorter=order)
    row = order[jnp.minimum(place, codes.size - 1)].astype(jnp.int32)
    return jnp.where(codes[row] == wanted, row, codes.size)


def per_leaf(
    values: jax.Array, like: jax.Array, stats: NonfiniteStats, paths: Sequence[str]
) -> jax.Array:
    """Expands rows for the leaves of the updates to rows for the leaves in `init`."""
    if values.shape == like.shape:
        return values
    rows = row_numbers(stats, paths)
    return jnp.zeros(like.shape, values.dtype).at[rows].set(values, mode="drop")


def count_event(
    steps: jax.Array, events: jax.Array, happened: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the counts of steps and events after one more step.

    Both counts stop increasing once ``steps`` reaches the largest int32, so their ratio
    never exceeds 1.
    """
    counting = steps < LAST_COUNT
    return (
        increment(steps),
        jnp.where(happened & counting, increment(events), events),
    )


def record_nonfinite(
    stats: NonfiniteStats,
    kinds: jax.Array,
    bad: jax.Array,
    step: jax.Array,
    paths: Sequence[str],
) -> NonfiniteStats:
    """Returns the statistics after an update with the given non-finite entries."""
    kinds = per_leaf(kinds.astype(jnp.int32), stats.nonfinite_kinds, stats, paths)
    return NonfiniteStats(
        nonfinite_steps=jnp.where(
            bad, increment(stats.nonfinite_steps), stats.nonfinite_steps
        ),
        last_nonfinite_step=jnp.where(bad, step, stats.last_nonfinite_step),
        nonfinite_kinds=jnp.where(bad, kinds, stats.nonfinite_kinds),
        leaf_code=stats.leaf_code,
    )


# The fields with one row per leaf that was passed to `init`. If no other field depends
# on the number of leaves, the updates may have fewer leaves.
_ROWS = {"nonfinite/leaf_code", "nonfinite/nonfinite_kinds", "leaf_norm"}


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path): jnp.shape(x) for path, x in flat}


def _without_empty_fields(state: Any) -> Any:
    named = state._asdict()
    return jax.tree.structure({k: x for k, x in named.items() if jax.tree.leaves(x)})


def _has_more_rows(state: Any, wanted: Any, absent: int) -> bool:
    """Returns whether a state fits, except for rows of leaves that are now None."""
    got, expected = _shapes(state), _shapes(wanted)
    differ = {p for p in expected if got.get(p) != expected[p]}
    return (
        got.keys() == expected.keys()
        and (bool(differ) or absent > 0)
        and differ <= _ROWS
        and all(got[p][1:] == expected[p][1:] for p in differ)
        and all(0 < got[p][0] - expected[p][0] <= absent for p in differ)
        and _without_empty_fields(state) == _without_empty_fields(wanted)
    )


_LEFT_OUT = (
    ". If the gradients of frozen parameters are None, leave these parameters out in "
    "`init` too, as in `tx.init(eqx.filter(model, eqx.is_inexact_array))`"
)


def _difference(state: Any, wanted: Any) -> str:
    """Describes the first difference from the expected state, or "" if none."""
    got, expected = _shapes(state), _shapes(wanted)
    if got == expected:
        alike = jax.tree.structure(state) == jax.tree.structure(wanted)
        return "" if alike else "its arrays are nested differently"
    codes = "nonfinite/leaf_code"
    if codes in got and got[codes] != expected.get(codes, got[codes]):
        more = got[codes] > expected[codes]
        return (
            f"`init` saw {got[codes][0]} leaves of real or complex numbers, but the "
            f"updates have {expected[codes][0]}{_LEFT_OUT if more else ''}"
        )
    path = next(p for p in expected | got if got.get(p) != expected.get(p))
    if path not in got:
        return f"it has no `{path}`"
    if path not in expected:
        field = path.split("/")[0]
        more = any(p.startswith(f"{field}/") for p in expected)
        return f"it has an unexpected `{path}`{_LEFT_OUT if more else ''}"
    local = ""
    if jax.sharding.get_abstract_mesh().manual_axes:
        local = (
            ". Inside `jax.shard_map` this is the local shape: give the state the "
            "PartitionSpecs that `optclip.state_specs` returns"
        )
    return f"`{path}` must have shape {expected[path]}, got {got[path]}{local}"


def kind_of(found: Any, state: Any) -> Any:
    """Returns the types of updates and the layout of a state, or None if untyped."""
    leaves, structure = jax.tree.flatten(state)
    shapes = tuple(getattr(x, "shape", None) for x in leaves)
    return found.kind and (found.kind, structure, shapes)


def validate_state(
    state: Any, init: Callable[[], Any], foreign: Sequence[str] = (), absent: int = 0
) -> Any:
    """Returns ``state`` after checking that its layout matches the result of ``init``.

    The types, structure and shapes are compared, except for the fields in ``foreign``.
    This adds no cost to a compiled step. Batched, sharded and NumPy arrays are
    accepted, and so is a state with rows of telemetry for up to ``absent`` more leaves.
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
    compared, wanted = state._replace(**blank), wanted._replace(**blank)
    difference = _difference(compared, wanted)
    if difference and not _has_more_rows(compared, wanted, absent):
        raise ValueError(
            f"`state` is a `{kind.__name__}` that does not fit here: {difference}. "
            "It may be of other parameters, of other options or of another version of "
            "optclip. Call `init` again with the parameters. You can keep these and "
            'the optimizer\'s own state: see "Checkpoints" in the documentation.'
        )
    return state
