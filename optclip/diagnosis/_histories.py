"""Reads gradient norms from recorded numbers or from the state of a rule."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from optclip._engine.lookup import find
from optclip._engine.state import ClipState
from optclip.methods.autoclip import BINS, FIRST_BIN, OCTAVES
from optclip.telemetry import RecordNormsState
from optclip.wrappers.skip_steps import SkipState

__all__ = ["History", "history_of"]

_MEMORIES = {"recent_norms", "norm_counts", "log_quantile", "mean_norm", "ema_norm"}
_RECORD = (
    'Record `optclip.metrics(state)["clip/norm_before"]` at each step, and pass the '
    "list."
)


@dataclasses.dataclass(frozen=True)
class History:
    """Gradient norms, and what is known about the norms that are missing.

    Attributes:
        norms: float64[n], including non-finite norms if they were recorded.
        ordered: Whether the norms are in the order of the steps.
        steps: Number of steps that the norms represent.
        nonfinite: Number of those steps whose norm was not finite.
        note: A remark about the origin of the norms; "" if there is none.
        missing: The reason why there are no norms; "" if there are norms.
    """

    norms: np.ndarray
    ordered: bool
    steps: int
    nonfinite: int
    note: str = ""
    missing: str = ""


def _of_numbers(values: Any) -> History:
    try:
        raw = np.asarray(values)
        if raw.dtype.kind in "bcSUmM":
            raise TypeError
        norms = raw.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(
            "`norms_or_state` must be gradient norms, one number a step, or an "
            f"optimizer state with a clip of optclip in it, got {type(values).__name__}"
            "."
        ) from error
    if norms.ndim != 1:
        raise ValueError(
            "`norms_or_state` must have one norm a step, so one axis, got the shape "
            f"{norms.shape}. Pass one run at a time."
        )
    if not norms.size:
        raise ValueError("`norms_or_state` must hold norms, got none.")
    negative = np.flatnonzero(norms < 0)
    if negative.size:
        place = int(negative[0])
        raise ValueError(
            "`norms_or_state` must hold norms, which are >= 0, got "
            f"{norms[place]:g} at place {place}."
        )
    bad = int(np.sum(~np.isfinite(norms)))
    return History(norms, ordered=True, steps=len(norms), nonfinite=bad)


def _memories(rule_state: Any) -> Iterator[Any]:
    """Yields the parts of a rule's state that store information about the norms."""

    def remembers(node):
        return bool(_MEMORIES & set(getattr(node, "_fields", ())))

    for node in jax.tree.leaves(rule_state, is_leaf=remembers):
        if remembers(node):
            yield node


def _window(memory: Any) -> np.ndarray:
    """Returns the norms in a ring buffer, oldest first."""
    ring = np.asarray(memory.recent_norms, np.float64).reshape(-1)
    count = int(np.reshape(memory.recorded, ()))
    if count <= len(ring):
        return ring[:count]
    return np.roll(ring, -(count % len(ring)))


def _histogram(memory: Any) -> np.ndarray:
    """Returns the bin center of each norm in the histogram."""
    counts = np.rint(np.asarray(memory.norm_counts, np.float64).reshape(-1))
    middles = (np.arange(BINS) + 0.5 - FIRST_BIN) * (OCTAVES / BINS)
    norms = np.exp2(float(np.reshape(memory.first_log, ())) + middles)
    return np.repeat(norms, counts.astype(np.int64))


def _summary(memory: Any) -> str:
    """Describes what a rule stores instead of norms."""
    if "log_quantile" in memory._fields:
        value, name = np.exp(float(np.ravel(memory[0])[0])), "running quantile"
    else:
        value, name = float(np.ravel(memory[0])[0]), "running mean"
    return f"The clip keeps only a {name} of the norms, now {value:.3g}. {_RECORD}"


def _of_memory(memory: Any, steps: int, bad: int, note: str) -> History:
    def without(reason):
        return History(np.zeros(0), True, steps, bad, note, missing=reason)

    fields = set(memory._fields)
    first = memory.norm_counts if "norm_counts" in fields else memory[0]
    rows = first.shape[:-1] if fields & {"recent_norms", "norm_counts"} else first.shape
    if np.prod(rows, dtype=int) != 1:
        return without(f"The clip keeps norms of parts, not of all leaves. {_RECORD}")
    if "recent_norms" in fields:
        return History(_window(memory), True, steps, bad, note)
    if "norm_counts" in fields:
        return History(_histogram(memory), False, steps, bad, note)
    return without(_summary(memory))


def _one(count: Any) -> int:
    if np.ndim(count):
        raise ValueError(
            "The state holds a batch of states (of `jax.vmap` or `jax.pmap`): take "
            "one of them, as in `jax.tree.map(lambda x: x[0], opt_state)`."
        )
    return int(count)


def _of_states(wrappers: list[Any], clips: list[Any], recorders: list[Any]) -> History:
    found: list[History] = []
    for state in wrappers:
        steps, left_out = _one(state.offered_steps), _one(state.skipped_steps)
        bad = _one(state.nonfinite.nonfinite_steps)
        note = f"{left_out} of {steps} steps were left out by `skip_steps`, and "
        note = note + "are not among these norms." if left_out else ""
        for memory in _memories(state.norm_rule_state):
            found.append(_of_memory(memory, steps, bad, note))
    for state in clips:
        steps, bad = _one(state.steps), _one(state.nonfinite.nonfinite_steps)
        for memory in _memories(state.rule_state):
            found.append(_of_memory(memory, steps, bad, ""))
    for history in found:
        if not history.missing:
            return history
    if found:
        return found[0]
    steps = max([_one(s.steps) for s in clips], default=0)
    steps = max([steps, *(_one(s.recorded_steps) for s in recorders)])
    reason = f"The state holds the last norm only. {_RECORD}"
    return History(np.zeros(0), True, steps, 0, missing=reason)


def history_of(source: Any) -> History:
    """Returns the norms in ``source``, which holds numbers or is an optimizer state.

    Raises:
        TypeError: If ``source`` is neither numbers nor an optimizer state.
        ValueError: If the numbers are not norms, or if their values can't be read.
    """
    if any(isinstance(x, Tracer) for x in jax.tree.leaves(source)):
        raise ValueError(
            "The norms are traced, and have no value yet: call `suggest_threshold` "
            "outside of jit."
        )
    wrappers = find(source, (SkipState,))
    clips, recorders = find(source, (ClipState,)), find(source, (RecordNormsState,))
    if wrappers or clips or recorders:
        return _of_states(wrappers, clips, recorders)
    return _of_numbers(source)
