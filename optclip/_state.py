"""The state of a clip: what it did at the last step, and how often it did it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optclip import _names
from optclip._numbers import LAST_COUNT, increment
from optclip._validation import own

__all__ = [
    "BadSteps",
    "ClipState",
    "GroupStats",
    "Seen",
    "SkipState",
    "UnrecordedState",
    "chosen",
    "copied",
    "counted",
    "figures",
    "finite_threshold",
    "first",
    "first_seen",
    "look",
    "own",
    "per_leaf",
    "row_numbers",
]


class Seen(NamedTuple):
    """What non-finite entries a transformation met.

    Attributes:
        nonfinite_steps: int32 scalar. Updates that held a NaN or inf; 0 at first.
        last_nonfinite_step: int32 scalar. The number of the last such update, where the
            first update is number 0; -1 if there was none.
        nonfinite_kinds: int32[leaves, 3]. 1 where a leaf held NaN, +inf, -inf at that
            update, else 0; 0 at first.
        leaf_code: int32[leaves]. A code of each leaf's path, by which `culprits` and
            `leaf_metrics` find its name.
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
    """State of every transformation made by `optclip.clip`.

    All arrays have shapes and dtypes that never change. Read them with
    `optclip.metrics`, `optclip.leaf_metrics` and `optclip.culprits`.

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
        seen: A `Seen`: the non-finite entries.
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
    seen: Seen
    groups: GroupStats | None


class UnrecordedState(NamedTuple):
    """State of a clip that keeps no figures: ``record=False``.

    Attributes:
        rule_state: As in `ClipState`.
        steps: int32 scalar. Updates so far; stops at 2**31 - 1.
    """

    rule_state: tuple
    steps: jax.Array


class BadSteps(NamedTuple):
    """The last steps that were left out, in a ring.

    Attributes:
        bad_step: int32[K]. Their numbers, where the first step is number 0; -1 where
            there was none yet.
        bad_norm: float32[K]. Norms of their gradients, perhaps NaN or inf.
        bad_loss: float32[K]. Their losses; 0 where none was given.
        bad_leaf: int32[K]. Number of the worst leaf: the first that held NaN or inf,
            else the one with the largest norm; -1 where only the loss was bad.
        bad_kinds: int32[K, 3]. 1 where that leaf held NaN, +inf, -inf, else 0.
    """

    bad_step: jax.Array
    bad_norm: jax.Array
    bad_loss: jax.Array
    bad_leaf: jax.Array
    bad_kinds: jax.Array


class SkipState(NamedTuple):
    """State of `skip_steps`.

    Attributes:
        optimizer_state: State of the optimizer inside, as if no bad step had been.
        norm_rule_state: State of the rule for the norm.
        loss_rule_state: State of the rule for the loss; () without one.
        offered_norms: float32[512]. The last finite norms, the newest first, those of
            skipped steps included; the lowest float32 where there was none yet; () if
            the rule has no memory or ``max_similar`` is None.
        offered_losses: float32[512]. The same for the loss.
        recent_skips: int32[512]. 1 where a step was skipped, the newest first.
        recent_fraction: float32 scalar. Share of the last 512 steps, or of all steps
            while they are fewer, that was skipped.
        recent_since: int32 scalar. Number of the first skipped step after 512 steps
            without one; -1 if the last 512 steps were all taken.
        offered_steps: int32 scalar. Steps so far, those skipped included. All counters
            stop at 2**31 - 1.
        skipped_steps: int32 scalar. Steps skipped, for whatever reason.
        spike_steps: int32 scalar. Steps skipped though all was finite.
        skipped_run: int32 scalar. Steps skipped in a row until now.
        spike_run: int32 scalar. Spikes skipped since the last step that was taken.
        offered_norm: float32 scalar. Norm of the last gradients; 0 at first.
        offered_loss: float32 scalar. The last loss; 0 where none was given.
        skip_above: float32 scalar. The last threshold of the norm, the largest float32
            where there was none; 0 at first.
        skip_loss_above: float32 scalar. The same of the loss; 0 where none was judged.
        last_bad: A `BadSteps`.
        seen: A `Seen`: the non-finite entries.
    """

    optimizer_state: Any
    norm_rule_state: Any
    loss_rule_state: Any
    offered_norms: Any
    offered_losses: Any
    recent_skips: jax.Array
    recent_fraction: jax.Array
    recent_since: jax.Array
    offered_steps: jax.Array
    skipped_steps: jax.Array
    spike_steps: jax.Array
    skipped_run: jax.Array
    spike_run: jax.Array
    offered_norm: jax.Array
    offered_loss: jax.Array
    skip_above: jax.Array
    skip_loss_above: jax.Array
    last_bad: BadSteps
    seen: Seen


def scalar(value: float | int, dtype: Any = jnp.float32) -> jax.Array:
    """Returns a new scalar array: no two fields of a state may share a buffer."""
    return jnp.array(value, dtype)


def copied(tree: Any) -> Any:
    """Returns a tree of new arrays: no two fields of a state may share a buffer."""
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


def chosen(flag: jax.Array, if_set: Any, otherwise: Any) -> Any:
    """Returns one of two trees, entry by entry: nothing is multiplied by zero."""
    return jax.tree.map(lambda a, b: jnp.where(flag, a, b), if_set, otherwise)


def figures(tree: Any) -> Any:
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


def first_seen(paths: Sequence[str]) -> Seen:
    """Returns the `Seen` of a transformation that has met nothing yet."""
    return Seen(
        nonfinite_steps=scalar(0, jnp.int32),
        last_nonfinite_step=scalar(-1, jnp.int32),
        nonfinite_kinds=jnp.zeros((max(len(paths), 1), 3), jnp.int32),
        leaf_code=jnp.array(_names.path_codes(list(paths))),
    )


def first(paths: Sequence[str]) -> ClipState:
    """Returns the `ClipState` of a transformation without a rule and groups."""
    return ClipState(
        (), scalar(0.0), scalar(0.0), scalar(0.0), scalar(1.0), scalar(0.0),
        scalar(0, jnp.int32), scalar(0, jnp.int32), first_seen(paths), None,
    )  # fmt: skip


def row_numbers(seen: Seen, paths: Sequence[str]) -> jax.Array:
    """Returns which row of a state each leaf has; past the end if `init` had it not.

    For updates in which some leaves are None that `init` saw: the others are found by
    the codes of their paths.
    """
    codes = jnp.asarray(seen.leaf_code)
    mine = jnp.asarray(_names.path_codes(list(paths)))
    order = jnp.argsort(codes)
    place = jnp.searchsorted(codes, mine, sorter=order)
    row = order[jnp.minimum(place, codes.size - 1)].astype(jnp.int32)
    return jnp.where(codes[row] == mine, row, codes.size)


def per_leaf(
    values: jax.Array, like: jax.Array, seen: Seen, paths: Sequence[str]
) -> jax.Array:
    """Returns a row per leaf of the updates as rows per leaf that `init` saw."""
    if values.shape == like.shape:
        return values
    rows = row_numbers(seen, paths)
    return jnp.zeros(like.shape, values.dtype).at[rows].set(values, mode="drop")


def counted(
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


def look(
    seen: Seen,
    kinds: jax.Array,
    bad: jax.Array,
    step: jax.Array,
    paths: Sequence[str],
) -> Seen:
    """Returns the new `Seen`, after an update with these non-finite entries."""
    kinds = per_leaf(kinds.astype(jnp.int32), seen.nonfinite_kinds, seen, paths)
    return Seen(
        nonfinite_steps=jnp.where(
            bad, increment(seen.nonfinite_steps), seen.nonfinite_steps
        ),
        last_nonfinite_step=jnp.where(bad, step, seen.last_nonfinite_step),
        nonfinite_kinds=jnp.where(bad, kinds, seen.nonfinite_kinds),
        leaf_code=seen.leaf_code,
    )
