"""Reads the statistics of clips from any optimizer state, as flat dicts of scalars.

Each clip records its statistics in its state, so reading them does not require access
to the gradients. The states of clips are found at any depth of the optimizer state.
`metrics` also works inside jit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optclip._engine import group_norms, pytrees, validation
from optclip._engine import state as states
from optclip._engine.lookup import (
    Located,
    Paths,
    contents_of,
    find,
    locate,
    outside_jit,
    path_finder,
)
from optclip._engine.numerics import increment
from optclip._engine.state import ClipState, GroupStats, NonfiniteStats
from optclip._engine.types import Order
from optclip._engine.validation import EUCLIDEAN
from optclip.methods.cap_update import UpdateCapState
from optclip.wrappers.skip_steps import SkipState

__all__ = [
    "NonfiniteLeaf",
    "RecordNormsState",
    "leaf_metrics",
    "metrics",
    "nonfinite_leaves",
    "record_norms",
]


class RecordNormsState(NamedTuple):
    """State of `record_norms`.

    Attributes:
        leaf_norm: float32[leaves]. The norm of each leaf at the last update.
        recorded_norm: float32 scalar. The global norm at the last update.
        recorded_steps: int32 scalar. The number of updates so far.
        nonfinite: The `NonfiniteStats` of the updates.
    """

    leaf_norm: jax.Array
    recorded_norm: jax.Array
    recorded_steps: jax.Array
    nonfinite: NonfiniteStats


def record_norms(
    *, ord: Order = EUCLIDEAN, axis_name: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Records the norm of each leaf of the updates, and returns them unchanged.

    Place it before a clip to record the gradients, or last in the chain to record the
    updates that are applied. Directly before a clip, it requires no extra pass over the
    gradients, because XLA computes the sums that both transformations need only once.

    Args:
        ord: The order of the norm: a number that is at least 1, inf or "rms".
        axis_name: As in `optclip.clip_by_rule`.

    Returns:
        A transformation whose state is a `RecordNormsState`. It does not use
        ``params``.

    Raises:
        ValueError: If ``ord`` is not the order of a norm.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> tx = optclip.record_norms()
        >>> grads = {"w": jnp.array([3.0, 4.0])}
        >>> _, state = tx.update(grads, tx.init(grads))
        >>> {name: float(x) for name, x in optclip.leaf_metrics(state, grads).items()}
        {'w/norm': 5.0}
    """
    order = validation.order(ord)

    def init_fn(params) -> Any:
        paths = pytrees.leaves_of(params).paths
        return RecordNormsState(
            leaf_norm=jnp.zeros(max(len(paths), 1), jnp.float32),
            recorded_norm=states.scalar(0.0),
            recorded_steps=states.scalar(0, jnp.int32),
            nonfinite=states.init_nonfinite(paths),
        )

    def update_fn(updates, state, params=None, **extra_args) -> Any:
        del params, extra_args
        found = pytrees.leaves_of(updates)
        state = states.validate_state(
            state, lambda: init_fn(updates), absent=found.absent
        )
        step = state.recorded_steps
        if not found.leaves:
            return updates, state._replace(recorded_steps=increment(step))
        measured, total = group_norms.measure_leaves(
            updates, found, order=order, axis_name=axis_name
        )
        bad = jnp.any(measured.kinds)
        norms = states.to_finite_f32(measured.norm[0])
        return updates, RecordNormsState(
            leaf_norm=states.per_leaf(
                norms, state.leaf_norm, state.nonfinite, found.paths
            ),
            recorded_norm=states.to_finite_f32(total),
            recorded_steps=increment(step),
            nonfinite=states.record_nonfinite(
                state.nonfinite, measured.kinds, bad, step, found.paths
            ),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _key_prefixes(prefix: str, found: Sequence[Located], taken: set[str]) -> list[str]:
    """Returns the key prefix of each state, and adds it to ``taken``."""
    out = []
    for located in found:
        groups = "".join(f"/{group}" for group in located.groups)
        name, k = f"{prefix}{groups}", 1
        while name in taken:
            k += 1
            name = f"{prefix}_{k}{groups}"
        taken.add(name)
        out.append(name)
    return out


# These functions are jitted so that their constants are not transferred to the device
# on every call.
@jax.jit
def _share(part: jax.Array, steps: jax.Array) -> jax.Array:
    return part.astype(jnp.float32) / jnp.maximum(steps, 1).astype(jnp.float32)


@jax.jit
def _latest(steps: jax.Array) -> jax.Array:
    return jnp.max(steps, axis=-1)


def _excess(rule_state: tuple) -> list[jax.Array]:
    """Returns the largest `mean_excess` of each array of groups of `cap_update`."""
    parts = jax.tree.leaves(
        rule_state, is_leaf=lambda node: isinstance(node, UpdateCapState)
    )
    caps = [part for part in parts if isinstance(part, UpdateCapState)]
    return [jnp.max(cap.mean_excess) for cap in caps if cap.mean_excess.size]


def metrics(opt_state: Any, prefix: str = "clip") -> dict[str, jax.Array]:
    """Returns statistics of the clips in an optimizer state, as a flat dict of scalars.

    | key                     | meaning                                                |
    | ----------------------- | ------------------------------------------------------ |
    | `clip/norm_before`      | norm of all updates before clipping                    |
    | `clip/norm_after`       | norm of all updates after clipping                     |
    | `clip/threshold`        | threshold; 3.4028235e38 if none, as during warm-up     |
    | `clip/scale`            | factor that the updates were multiplied by             |
    | `clip/worst_threshold`  | threshold of the group with the smallest scale         |
    | `clip/worst_scale`      | smallest scale of any group                            |
    | `clip/clipped`          | fraction of groups above their threshold at this step  |
    | `clip/steps`            | number of updates so far                               |
    | `clip/clipped_steps`    | number of updates with a group above its threshold     |
    | `clip/clipped_fraction` | `clip/clipped_steps` divided by `clip/steps`           |
    | `clip/nonfinite_steps`  | number of updates that contained NaN or inf            |
    | `clip/mean_excess`      | only for `cap_update`: average of update / cap so far  |

    In all scopes other than tree, `clip/worst_threshold` and `clip/worst_scale` replace
    `clip/threshold` and `clip/scale`.

    The second clip in the chain is called `clip_2`, the third `clip_3`, and so on.
    Inside `optax.partition`, the label of the partition is added, as in
    `clip/encoder/norm_before`, and clips are numbered per label. `record_norms` adds
    `norms/global_norm`, `norms/steps` and `norms/nonfinite_steps`. `skip_steps` adds
    the following:

    | key                      | meaning                                               |
    | ------------------------ | ----------------------------------------------------- |
    | `skip/norm`, `skip/loss` | norm and loss of the last step, skipped or not        |
    | `skip/threshold`         | norm above which the last step counted as a spike     |
    | `skip/loss_threshold`    | the same for the loss; 0 if the loss was not checked  |
    | `skip/steps`             | number of steps so far                                |
    | `skip/skipped_steps`     | number of skipped steps                               |
    | `skip/spike_steps`       | number of skipped steps with only finite values       |
    | `skip/nonfinite_steps`   | number of steps with NaN or inf in the gradients      |
    | `skip/in_a_row`          | consecutive skips; 0 if the last step was not skipped |
    | `skip/recent_fraction`   | fraction of the last 512 steps that were skipped      |
    | `skip/recent_since`      | first skip after 512 steps without a skip; -1 if none |
    | `skip/last_skipped_step` | number of the last skipped step; -1 if there is none  |

    Args:
        opt_state: Any pytree that contains states of clips, such as the state of a
            chain, of `optax.MultiSteps` or of `flax.nnx.Optimizer`, or a whole train
            state.
        prefix: The prefix of the keys of clips. If it is not "clip", it is also added
            to all other keys, as in ``prefix/skip/norm``, so that the metrics of
            several optimizers can be merged.

    Returns:
        A dict of float32 and int32 scalars on the device, or of tracers inside jit. To
        transfer all values at once, use ``jax.device_get``. The dict is empty if the
        state contains no statistics, so the same training step also works without a
        clip.

    Raises:
        ValueError: If ``prefix`` is empty.

    Example:
        >>> import jax.numpy as jnp, optax, optclip
        >>> tx = optax.chain(optclip.clip_by_global_norm(1.0), optax.adam(1e-3))
        >>> params = jnp.zeros(2)
        >>> _, state = tx.update(jnp.array([3.0, 4.0]), tx.init(params), params)
        >>> float(optclip.metrics(state)["clip/norm_before"])
        5.0
    """
    if not isinstance(prefix, str) or not prefix:
        raise ValueError(f"`prefix` must be a non-empty string, got {prefix!r}.")
    out: dict[str, jax.Array] = {}
    taken: set[str] = set()
    before = "" if prefix == "clip" else f"{prefix}/"

    def named(prefix, kind):
        found = locate(opt_state, (kind,))
        prefixes = _key_prefixes(prefix, found, taken)
        return zip(prefixes, [x.state for x in found], strict=True)

    for name, state in named(prefix, ClipState):
        worst = "" if state.groups is None else "worst_"
        out |= {
            f"{name}/norm_before": state.norm_before,
            f"{name}/norm_after": state.norm_after,
            f"{name}/{worst}threshold": state.threshold,
            f"{name}/{worst}scale": state.scale,
            f"{name}/clipped": state.clipped,
            f"{name}/steps": state.steps,
            f"{name}/clipped_steps": state.clipped_steps,
            f"{name}/clipped_fraction": _share(state.clipped_steps, state.steps),
            f"{name}/nonfinite_steps": state.nonfinite.nonfinite_steps,
        }
        if excess := _excess(state.rule_state):
            out[f"{name}/mean_excess"] = jnp.max(jnp.stack(excess))
    for name, state in named(f"{before}norms", RecordNormsState):
        out |= {
            f"{name}/global_norm": state.recorded_norm,
            f"{name}/steps": state.recorded_steps,
            f"{name}/nonfinite_steps": state.nonfinite.nonfinite_steps,
        }
    for name, state in named(f"{before}skip", SkipState):
        out |= {
            f"{name}/norm": state.offered_norm,
            f"{name}/loss": state.offered_loss,
            f"{name}/threshold": state.skip_above,
            f"{name}/loss_threshold": state.skip_loss_above,
            f"{name}/steps": state.offered_steps,
            f"{name}/skipped_steps": state.skipped_steps,
            f"{name}/spike_steps": state.spike_steps,
            f"{name}/nonfinite_steps": state.nonfinite.nonfinite_steps,
            f"{name}/in_a_row": state.skipped_run,
            f"{name}/recent_fraction": state.recent_fraction,
            f"{name}/recent_since": state.recent_since,
            f"{name}/last_skipped_step": _latest(state.last_bad.bad_step),
        }
    return out


def _rows_in_arrays(which: np.ndarray) -> list[int]:
    """Returns the row of each leaf in its array, given the index of that array."""
    counts: dict[int, int] = {}
    rows = []
    for array in which.tolist():
        rows.append(counts.get(array, 0))
        counts[array] = rows[-1] + 1
    return rows


def _of_leaf(values: Any, index: int, row: int) -> list[tuple[str, Any]]:
    """Returns (suffix of the path, value) of a leaf in a field of `GroupStats`.

    There is one pair per layer of the leaf. ``index`` is the index of the leaf's group
    or array.
    """
    if not isinstance(values, tuple):
        return [("", values[..., index][()])]
    # There is one array per shape of leaves, with one row per leaf of that shape.
    layers = values[index][row]
    return [
        ("".join(f"/{n}" for n in at), layers[at]) for at in np.ndindex(layers.shape)
    ]


def leaf_metrics(
    opt_state: Any, params: Any = None, prefix: str = ""
) -> dict[str, np.ndarray | np.generic]:
    """Returns per-leaf norms, thresholds and scales, as a flat dict of scalars.

    Clips in leaf, label and layer scope provide `PATH/norm_before`, `PATH/threshold`
    and `PATH/scale`. In label scope, these are the values of the group that the leaf
    belongs to. In layer scope, the layer index follows the path, as in
    `blocks/kernel/3/scale`. `record_norms` provides `PATH/norm`. If several clips, or
    several `record_norms`, record the same leaf, the keys of the second one end in
    `_2`.

    Call this function outside of jit. It uses codes that are stored in the state to
    look up the names of leaves, which is not possible with traced values.

    Args:
        opt_state: Any pytree that contains states of clips.
        params: The parameters that the optimizer was initialized with, as arrays or
            shapes. Only their paths are used. Not needed if the optimizer keeps state
            for each parameter under the same path, such as the moments of Adam.
        prefix: If it is not empty, all keys begin with ``prefix/``.

    Returns:
        A dict of NumPy float32 scalars on the host, fetched in one transfer.

    Raises:
        ValueError: If ``params`` are not the ones that the optimizer was initialized
            with, if they are required but missing, or if the state has no per-leaf
            metrics.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> params = {"w": jnp.zeros(2), "b": jnp.zeros(1)}
        >>> tx = optclip.clip_by_leaf_norm(1.0)
        >>> state = tx.init(params)
        >>> _, state = tx.update({"w": jnp.ones(2), "b": jnp.ones(1)}, state)
        >>> float(optclip.leaf_metrics(state, params)["b/norm_before"])
        1.0
    """
    paths = path_finder(opt_state, params)
    found = [x.state for x in locate(opt_state, (ClipState,))]
    clips = [(s.nonfinite, s.groups) for s in found if isinstance(s.groups, GroupStats)]
    found = [x.state for x in locate(opt_state, (RecordNormsState,))]
    recorders = [(s.nonfinite, s.leaf_norm) for s in found]
    if not clips and not recorders:
        raise ValueError(
            "`opt_state` has no metrics per leaf: clips record them in leaf, label and "
            "layer scope only. Use one of these scopes, or chain "
            f"`optclip.record_norms()`. It contains: {contents_of(opt_state)}."
        )
    for stats, _ in [*clips, *recorders]:
        outside_jit(stats, "leaf_metrics")
    clips, recorders = jax.device_get((clips, recorders))
    out: dict[str, Any] = {}
    start = f"{prefix}/" if prefix else ""

    def add(path: str, values: dict[str, Any]) -> None:
        # If the tree is a single array, the path of its only leaf is empty.
        begin, end, k = f"{start}{path}/" if path else start, "", 1
        while any(f"{begin}{name}{end}" in out for name in values):
            k += 1
            end = f"_{k}"
        out.update({f"{begin}{n}{end}": value for n, value in values.items()})

    for stats, groups in clips:
        which = groups.group_of_leaf
        which = which.reshape(-1, which.shape[-1])[0]
        rows = _rows_in_arrays(which)
        for i, path in paths(stats.leaf_code):
            place = int(which[i]), rows[i]
            norms = _of_leaf(groups.group_norm, *place)
            thresholds = _of_leaf(groups.group_threshold, *place)
            scales = _of_leaf(groups.group_scale, *place)
            for (layer, norm), (_, threshold), (_, scale) in zip(
                norms, thresholds, scales, strict=True
            ):
                values = {"norm_before": norm, "threshold": threshold, "scale": scale}
                add(f"{path}{layer}", values)
    for stats, norms in recorders:
        for i, path in paths(stats.leaf_code):
            add(path, {"norm": norms[..., i][()]})
    return out


class NonfiniteLeaf(NamedTuple):
    """A leaf that contained non-finite entries, or that caused a spike.

    Attributes:
        path: The path of the parameter, such as "encoder/0/kernel"; None if
            `skip_steps` skipped the step only because of the loss.
        step: The number of the update at which this happened, counted from 0.
        nan: Whether the leaf contained NaN.
        pos_inf: Whether the leaf contained +inf.
        neg_inf: Whether the leaf contained -inf.
        norm: The norm of all gradients at that step if `skip_steps` skipped the step,
            else None.
        loss: The loss at that step if `skip_steps` skipped the step (0 if no loss was
            passed), else None.
    """

    path: str | None
    step: int
    nan: bool
    pos_inf: bool
    neg_inf: bool
    norm: float | None = None
    loss: float | None = None


class _Event(NamedTuple):
    """A leaf to report, with a time that is comparable across states."""

    when: float
    leaf: NonfiniteLeaf


def _read(state: Any) -> dict[str, Any]:
    """Returns the fields of a state that `nonfinite_leaves` needs."""
    outside_jit(state.nonfinite, "nonfinite_leaves")
    if np.ndim(state.nonfinite.last_nonfinite_step):
        raise ValueError(
            "`opt_state` must be a single state, got a batch of states (from "
            "`jax.vmap` or `jax.pmap`): take one of them, as in "
            "`jax.tree.map(lambda x: x[0], opt_state)`."
        )
    counts = ("offered_steps", "recorded_steps", "steps")
    steps = next(getattr(state, name) for name in counts if hasattr(state, name))
    return {
        "stats": state.nonfinite,
        "steps": steps,
        "ring": getattr(state, "last_bad", ()),
    }


def _event(leaf: NonfiniteLeaf, steps: int) -> _Event:
    # States of one optimizer may count different steps: a state inside `MultiSteps`
    # counts only full batches, and one inside `skip_steps` only steps that were taken.
    # Step numbers are therefore compared as fractions of the steps that each state
    # counted. If all states count the same steps, this is equivalent to comparing step
    # numbers.
    return _Event((leaf.step + 1) / max(steps, 1), leaf)


def _nonfinite(read: dict[str, Any], paths: Paths) -> list[NonfiniteLeaf]:
    """Returns the leaves that were non-finite at the last non-finite update."""
    stats = read["stats"]
    step = int(stats.last_nonfinite_step)
    if step < 0:
        return []
    found = paths(stats.leaf_code)
    rows = [(path, stats.nonfinite_kinds[i].tolist()) for i, path in found]
    return [
        NonfiniteLeaf(path, step, *map(bool, kinds))
        for path, kinds in rows
        if any(kinds)
    ]


def _skipped(read: dict[str, Any], paths: Paths) -> list[NonfiniteLeaf]:
    """Returns the non-finite leaves, or the worst leaf, of each recent skipped step."""
    if not read["ring"] or max(read["ring"].bad_step) < 0:
        return []
    named: dict[int, Any] = dict(paths(read["stats"].leaf_code))
    last = _nonfinite(read, paths)
    found: list[NonfiniteLeaf] = []
    for step, norm, loss, index, kinds in zip(*read["ring"], strict=True):
        if step < 0:
            continue
        worst = NonfiniteLeaf(named.get(int(index)), int(step), *map(bool, kinds))
        for leaf in [c for c in last if c.step == step] or [worst]:
            found.append(leaf._replace(norm=float(norm), loss=float(loss)))
    return found


def nonfinite_leaves(opt_state: Any, params: Any = None) -> list[NonfiniteLeaf]:
    """Returns the leaves that contained NaN or inf at the last non-finite update.

    All states in ``opt_state`` are searched, at any depth of nesting. The result lists
    every leaf that contained NaN or inf at the last update at which any state
    encountered a non-finite value. If the optimizer uses `skip_steps`, the result also
    lists the leaves that caused recent steps to be skipped: all non-finite leaves for
    the last skipped step with NaN or inf, and the worst leaf for every other skipped
    step. Each leaf is listed at most once per step. The most recent step comes first,
    and the leaves of each step are in the order of the pytree.

    Each state counts its own steps. `skip_steps` and `optax.MultiSteps` do not pass
    every step to the states inside them, so those states count fewer steps. If states
    have different counts, steps are ordered by how far they are into the run of their
    state: by ``step`` divided by the count of the state.

    Call this function outside of jit. It fetches all values in one transfer.

    Args:
        opt_state: Any pytree that contains states of clips, of `record_norms` or of
            `skip_steps`.
        params: The parameters that the optimizer was initialized with. Only their paths
            are used. Not needed if the optimizer keeps state for each parameter under
            the same path, such as the moments of Adam.

    Returns:
        One `NonfiniteLeaf` per leaf and step. The list is empty if all updates so far
        were finite and no step was skipped. Compare ``step`` with `clip/steps` to see
        how recent the step is.

    Raises:
        ValueError: If ``params`` are not the ones that the optimizer was initialized
            with, if they are required but missing, if ``opt_state`` contains no state
            to read, or if it is a batch of states (select one of them first).

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> params = {"w": jnp.zeros(3), "b": jnp.zeros(1)}
        >>> tx = optclip.clip_by_global_norm(1.0, nonfinite="skip")
        >>> grads = {"w": jnp.array([1.0, jnp.nan, jnp.inf]), "b": jnp.ones(1)}
        >>> _, state = tx.update(grads, tx.init(params), params)
        >>> optclip.nonfinite_leaves(state, params)  # doctest: +ELLIPSIS
        [NonfiniteLeaf(path='w', step=0, nan=True, pos_inf=True, neg_inf=False, ...)]
    """
    paths = path_finder(opt_state, params)
    states = find(opt_state, (SkipState, ClipState, RecordNormsState))
    if not states:
        raise ValueError(
            "`opt_state` contains no state of a clip, `record_norms` or `skip_steps` "
            "of optclip. Pass the state of an optimizer that contains one. A clip with "
            "`record=False`, as `clip_by_value` is by default, records nothing. It "
            f"contains: {contents_of(opt_state)}."
        )
    reads = jax.device_get([_read(state) for state in states])
    if params is not None:  # raise on a mismatch even if there is nothing to report
        for read in reads:
            paths(read["stats"].leaf_code)
    # Only the first event for each leaf and step is kept. Events of `skip_steps` come
    # first, because they also have a norm and a loss.
    skipped = [_event(c, r["steps"]) for r in reads for c in _skipped(r, paths)]
    nonfinite = [_event(c, r["steps"]) for r in reads for c in _nonfinite(r, paths)]
    last = max((event.when for event in nonfinite), default=-1.0)
    events: dict[tuple, _Event] = {}
    for event in [*skipped, *(e for e in nonfinite if e.when == last)]:
        events.setdefault((event.when, event.leaf.path), event)
    ordered = sorted(events.values(), key=lambda e: -e.when)
    return [event.leaf for event in ordered]
