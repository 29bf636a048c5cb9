"""What clips did, read from any optimizer state, as flat dicts of scalars.

Nothing here computes on gradients: the clip itself measured everything, and it is read
from the clip's state, inside or outside of jit, however deep it is nested.
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
from optclip._engine.lookup import Located, find, known, locate, names_of, outside_jit
from optclip._engine.numerics import increment
from optclip._engine.state import ClipState, NonfiniteStats
from optclip._engine.types import Order
from optclip._engine.validation import EUCLIDEAN
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
        recorded_norm: float32 scalar. The norm of all leaves together.
        recorded_steps: int32 scalar. Updates so far.
        nonfinite: A `NonfiniteStats`: the non-finite entries.
    """

    leaf_norm: jax.Array
    recorded_norm: jax.Array
    recorded_steps: jax.Array
    nonfinite: NonfiniteStats


def record_norms(
    *, ord: Order = EUCLIDEAN, axis_name: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Changes nothing, and records the norm of each leaf of the updates.

    Put it before a clip to record gradients, or last in the chain to record the updates
    that are applied. Next to a clip it costs no second pass over the gradients: XLA
    sees that both need the same sums.

    Args:
        ord: The norm's order: a number of at least 1, inf or "rms".
        axis_name: As in `optclip.clip_by_rule`.

    Returns:
        A transformation with `RecordNormsState`; ``params`` is not used.

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
    """Returns what the keys of each state begin with; ``taken`` gets them too."""
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


# Compiled, so that their constants are not transferred to the device at each call.
@jax.jit
def _share(part: jax.Array, steps: jax.Array) -> jax.Array:
    return part.astype(jnp.float32) / jnp.maximum(steps, 1).astype(jnp.float32)


@jax.jit
def _latest(steps: jax.Array) -> jax.Array:
    return jnp.max(steps, axis=-1)


def metrics(opt_state: Any, prefix: str = "clip") -> dict[str, jax.Array]:
    """Returns what the clips in an optimizer state did, as a flat dict of scalars.

    | key                     | meaning                                                |
    | ----------------------- | ------------------------------------------------------ |
    | `clip/norm_before`      | norm of all updates before the clip                    |
    | `clip/norm_after`       | the same after it                                      |
    | `clip/threshold`        | threshold of the group with the smallest scale;        |
    |                         | 3.4028235e38 where there is none, as in a warm-up      |
    | `clip/scale`            | smallest factor that a group was multiplied by         |
    | `clip/clipped`          | share of groups above their threshold at this step     |
    | `clip/steps`            | updates so far                                         |
    | `clip/clipped_steps`    | updates in which a group was above its threshold       |
    | `clip/clipped_fraction` | their share                                            |
    | `clip/nonfinite_steps`  | updates that held a NaN or inf                         |

    A second clip in the state is called `clip_2`, and so on in the order of the chain.
    In a group of `optax.partition` the label of the group follows, as in
    `clip/encoder/norm_before`, and clips are numbered in each group. A `record_norms`
    gives `norms/global_norm`, `norms/steps` and `norms/nonfinite_steps`, and
    `skip_steps`:

    | key                      | meaning                                               |
    | ------------------------ | ----------------------------------------------------- |
    | `skip/norm`, `skip/loss` | of the last step offered, left out or not             |
    | `skip/threshold`         | the norm above which that step was a spike            |
    | `skip/loss_threshold`    | the same of the loss; 0 where none was judged         |
    | `skip/steps`             | steps so far                                          |
    | `skip/skipped_steps`     | those left out                                        |
    | `skip/spike_steps`       | those left out though all was finite                  |
    | `skip/nonfinite_steps`   | those whose gradients held a NaN or inf               |
    | `skip/in_a_row`          | left out in a row until now: 0 if the last was taken  |
    | `skip/recent_fraction`   | share of the last 512 steps that was skipped          |
    | `skip/recent_since`      | first step skipped after 512 taken; -1 if all were    |
    | `skip/last_skipped_step` | number of the last step left out; -1 if there is none |

    Args:
        opt_state: Any pytree that holds states of clips: that of a chain, of
            `optax.MultiSteps`, of `flax.nnx.Optimizer`, a whole train state, ...
        prefix: What the keys of clips begin with. Unless it is "clip", it comes before
            the other keys as well, as in ``prefix/skip/norm``: so metrics of several
            optimizers can be merged.

    Returns:
        A dict of float32 and int32 scalars, on device; inside jit, of tracers. Empty if
        there is no clip. Fetch it with one ``jax.device_get``.

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
        out |= {
            f"{name}/norm_before": state.norm_before,
            f"{name}/norm_after": state.norm_after,
            f"{name}/threshold": state.threshold,
            f"{name}/scale": state.scale,
            f"{name}/clipped": state.clipped,
            f"{name}/steps": state.steps,
            f"{name}/clipped_steps": state.clipped_steps,
            f"{name}/clipped_fraction": _share(state.clipped_steps, state.steps),
            f"{name}/nonfinite_steps": state.nonfinite.nonfinite_steps,
        }
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


def _rows_of_kind(which: np.ndarray) -> list[int]:
    """Returns the row of each leaf in the array of its kind: leaves are in order."""
    counts: dict[int, int] = {}
    rows = []
    for kind in which.tolist():
        rows.append(counts.get(kind, 0))
        counts[kind] = rows[-1] + 1
    return rows


def _of_leaf(values: Any, kind: int, row: int) -> list[tuple[str, Any]]:
    """Returns what a `GroupStats` has of a leaf, for each of its layers."""
    if not isinstance(values, tuple):
        return [("", values[..., kind][()])]
    # An array per kind of leaf, with a row per such leaf.
    own = values[kind][row]
    return [("".join(f"/{n}" for n in at), own[at]) for at in np.ndindex(own.shape)]


def leaf_metrics(
    opt_state: Any, params: Any, prefix: str = ""
) -> dict[str, np.ndarray | np.generic]:
    """Returns norm, threshold and scale by parameter path, as a flat dict of scalars.

    For clips in leaf, label and layer scope: `PATH/norm_before`, `PATH/threshold` and
    `PATH/scale`. In label scope these are those of all leaves with the label together,
    and in layer scope the path is followed by the layer's number, as in
    `blocks/kernel/3/scale`. For a `record_norms`: `PATH/norm`. Keys of a second clip,
    or `record_norms`, that has the same leaf end in `_2`.

    Args:
        opt_state: Any pytree that holds states of clips.
        params: The parameters that the optimizer was initialised with, for their paths;
            arrays or shapes.
        prefix: If it is not empty, keys begin with ``prefix/``.

    Returns:
        A dict of NumPy float32 scalars, on the host: all are fetched at once. The codes
        of paths must be known, so call it outside of jit.

    Raises:
        ValueError: If ``params`` are not those that the optimizer was initialised with,
            or the state has nothing by leaf.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> params = {"w": jnp.zeros(2), "b": jnp.zeros(1)}
        >>> tx = optclip.clip_by_leaf_norm(1.0)
        >>> state = tx.init(params)
        >>> _, state = tx.update({"w": jnp.ones(2), "b": jnp.ones(1)}, state)
        >>> float(optclip.leaf_metrics(state, params)["b/norm_before"])
        1.0
    """
    names = names_of(params)
    found = [x.state for x in locate(opt_state, (ClipState,))]
    clips = [(s.nonfinite, s.groups) for s in found if s.groups is not None]
    found = [x.state for x in locate(opt_state, (RecordNormsState,))]
    recorders = [(s.nonfinite, s.leaf_norm) for s in found]
    if not clips and not recorders:
        raise ValueError(
            "`opt_state` has no metrics by leaf: clips keep them in leaf, label and "
            "layer scope. Use one of these, or chain `optclip.record_norms()`."
        )
    for seen, _ in [*clips, *recorders]:
        outside_jit(seen, "leaf_metrics")
    clips, recorders = jax.device_get((clips, recorders))
    out: dict[str, Any] = {}
    start = f"{prefix}/" if prefix else ""

    def add(path: str, values: dict[str, Any]) -> None:
        end, k = "", 1
        while any(f"{start}{path}/{figure}{end}" in out for figure in values):
            k += 1
            end = f"_{k}"
        out.update({f"{start}{path}/{f}{end}": value for f, value in values.items()})

    for seen, groups in clips:
        which = groups.group_of_leaf
        which = which.reshape(-1, which.shape[-1])[0]
        rows = _rows_of_kind(which)
        for i, path in known(seen.leaf_code, names):
            place = int(which[i]), rows[i]
            norms = _of_leaf(groups.group_norm, *place)
            thresholds = _of_leaf(groups.group_threshold, *place)
            scales = _of_leaf(groups.group_scale, *place)
            for (layer, norm), (_, threshold), (_, scale) in zip(
                norms, thresholds, scales, strict=True
            ):
                values = {"norm_before": norm, "threshold": threshold, "scale": scale}
                add(f"{path}{layer}", values)
    for seen, norms in recorders:
        for i, path in known(seen.leaf_code, names):
            add(path, {"norm": norms[..., i][()]})
    return out


class NonfiniteLeaf(NamedTuple):
    """A leaf that held entries that were not finite, or made a step a spike.

    Attributes:
        path: Path of the parameter, as "encoder/0/kernel"; None where only the loss
            made `skip_steps` leave a step out.
        step: Number of the update, where the first is number 0.
        nan: Whether it held a NaN.
        pos_inf: Whether it held +inf.
        neg_inf: Whether it held -inf.
        norm: Norm of all gradients of that step; None except from `skip_steps`.
        loss: Its loss, 0 where none was given; None except from `skip_steps`.
    """

    path: str | None
    step: int
    nan: bool
    pos_inf: bool
    neg_inf: bool
    norm: float | None = None
    loss: float | None = None


class _Event(NamedTuple):
    """A culprit, and what orders it among those of other states."""

    when: float
    culprit: NonfiniteLeaf


def _read(state: Any) -> dict[str, Any]:
    """Returns what is needed of a state."""
    outside_jit(state.nonfinite, "nonfinite_leaves")
    if np.ndim(state.nonfinite.last_nonfinite_step):
        raise ValueError(
            "The state holds a batch of states (of `jax.vmap` or `jax.pmap`): take "
            "one of them, as in `jax.tree.map(lambda x: x[0], opt_state)`."
        )
    counts = ("offered_steps", "recorded_steps", "steps")
    steps = next(getattr(state, name) for name in counts if hasattr(state, name))
    return {
        "seen": state.nonfinite,
        "steps": steps,
        "ring": getattr(state, "last_bad", ()),
    }


def _event(culprit: NonfiniteLeaf, steps: int) -> _Event:
    # States of one optimizer may count different steps: within `MultiSteps` those of
    # whole batches, within `skip_steps` those that were taken. So how far through its
    # own steps a state was is compared; where all count the same steps, their numbers.
    return _Event((culprit.step + 1) / max(steps, 1), culprit)


def _not_finite(read: dict[str, Any], names: dict[int, str]) -> list[NonfiniteLeaf]:
    """Returns the leaves that were not finite when one was last."""
    seen = read["seen"]
    step = int(seen.last_nonfinite_step)
    paths = known(seen.leaf_code, names)  # raises if the parameters are others
    if step < 0:
        return []
    rows = [(path, seen.nonfinite_kinds[i].tolist()) for i, path in paths]
    return [
        NonfiniteLeaf(path, step, *map(bool, kinds))
        for path, kinds in rows
        if any(kinds)
    ]


def _left_out(read: dict[str, Any], names: dict[int, str]) -> list[NonfiniteLeaf]:
    """Returns the leaves, or the worst one, of each of the last steps left out."""
    if not read["ring"]:
        return []
    paths: dict[int, Any] = dict(known(read["seen"].leaf_code, names))
    last = _not_finite(read, names)
    found: list[NonfiniteLeaf] = []
    for step, norm, loss, leaf, bad in zip(*read["ring"], strict=True):
        if step < 0:
            continue
        worst = NonfiniteLeaf(paths.get(int(leaf)), int(step), *map(bool, bad))
        for culprit in [c for c in last if c.step == step] or [worst]:
            found.append(culprit._replace(norm=float(norm), loss=float(loss)))
    return found


def nonfinite_leaves(opt_state: Any, params: Any) -> list[NonfiniteLeaf]:
    """Returns the leaves that held NaN or inf at the last such update.

    All states in ``opt_state`` count, wherever they are nested: the last update at
    which any of them met a NaN or inf is taken, and each leaf that held one then is
    named once, however many states saw it. With `skip_steps` in the optimizer, also
    those that made a step a spike: for each of the last steps left out its worst leaf
    (all leaves with NaN or inf if it is the last such step of that `skip_steps`). The
    newest step comes first, and within a step the leaves in the order of the pytree.

    ``step`` is the number that the state counted, and `skip_steps` and
    `optax.MultiSteps` keep steps from the states inside of them. Between states that
    count different steps, the last is the one nearest to the end of its own count.

    Args:
        opt_state: Any pytree that holds states of clips, of `record_norms` or of
            `skip_steps`.
        params: The parameters that the optimizer was initialised with, for their paths.

    Returns:
        One `NonfiniteLeaf` per leaf and step; empty if everything was finite so far and
        no step was left out. Compare ``step`` with `clip/steps` to see how long ago it
        was. Call it outside of jit; it fetches what it needs from the device at once.

    Raises:
        ValueError: If ``params`` are not those that the optimizer was initialised with,
            or the state is a batch of states (take one of them first).

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> params = {"w": jnp.zeros(3), "b": jnp.zeros(1)}
        >>> tx = optclip.clip_by_global_norm(1.0, nonfinite="skip")
        >>> grads = {"w": jnp.array([1.0, jnp.nan, jnp.inf]), "b": jnp.ones(1)}
        >>> _, state = tx.update(grads, tx.init(params), params)
        >>> optclip.nonfinite_leaves(state, params)  # doctest: +ELLIPSIS
        [NonfiniteLeaf(path='w', step=0, nan=True, pos_inf=True, neg_inf=False, ...)]
    """
    names = names_of(params)
    states = find(opt_state, (SkipState, ClipState, RecordNormsState))
    if not states:
        raise ValueError(
            "`opt_state` holds no state of a clip, `record_norms` or `skip_steps` of "
            "optclip. Pass the state of the optimizer that it is part of; a clip with "
            "`record=False`, as `clip_by_value` is by default, keeps no figures."
        )
    reads = jax.device_get([_read(state) for state in states])
    # In this order, since the first of two entries for a leaf and step is kept.
    left_out = [_event(c, r["steps"]) for r in reads for c in _left_out(r, names)]
    seen = [_event(c, r["steps"]) for r in reads for c in _not_finite(r, names)]
    last = max((event.when for event in seen), default=-1.0)
    events: dict[tuple, _Event] = {}
    for event in [*left_out, *(e for e in seen if e.when == last)]:
        events.setdefault((event.when, event.culprit.path), event)
    ordered = sorted(events.values(), key=lambda e: -e.when)
    return [event.culprit for event in ordered]
