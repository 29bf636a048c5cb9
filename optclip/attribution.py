"""Which leaves went bad, and when."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from optclip._lookup import find, known, names_of, outside_jit
from optclip.clipping import ClipState
from optclip.monitoring import MonitorState
from optclip.skipping import SkipState

__all__ = ["Culprit", "culprits"]


class Culprit(NamedTuple):
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
    culprit: Culprit


def _read(state: Any) -> dict[str, Any]:
    """Returns what is needed of a state."""
    outside_jit(state.seen, "culprits")
    if np.ndim(state.seen.last_nonfinite_step):
        raise ValueError(
            "The state holds a batch of states (of `jax.vmap` or `jax.pmap`): take "
            "one of them, as in `jax.tree.map(lambda x: x[0], opt_state)`."
        )
    counts = ("offered_steps", "monitored_steps", "steps")
    steps = next(getattr(state, name) for name in counts if hasattr(state, name))
    return {"seen": state.seen, "steps": steps, "ring": getattr(state, "last_bad", ())}


def _event(culprit: Culprit, steps: int) -> _Event:
    # States of one optimizer may count different steps: within `MultiSteps` those of
    # whole batches, within `skip_steps` those that were taken. So how far through its
    # own steps a state was is compared; where all count the same steps, their numbers.
    return _Event((culprit.step + 1) / max(steps, 1), culprit)


def _not_finite(read: dict[str, Any], names: dict[int, str]) -> list[Culprit]:
    """Returns the leaves that were not finite when one was last."""
    seen = read["seen"]
    step = int(seen.last_nonfinite_step)
    paths = known(seen.leaf_code, names)  # raises if the parameters are others
    if step < 0:
        return []
    rows = [(path, seen.nonfinite_kinds[i].tolist()) for i, path in paths]
    return [
        Culprit(path, step, *map(bool, kinds)) for path, kinds in rows if any(kinds)
    ]


def _left_out(read: dict[str, Any], names: dict[int, str]) -> list[Culprit]:
    """Returns the leaves, or the worst one, of each of the last steps left out."""
    if not read["ring"]:
        return []
    paths: dict[int, Any] = dict(known(read["seen"].leaf_code, names))
    last = _not_finite(read, names)
    found: list[Culprit] = []
    for step, norm, loss, leaf, bad in zip(*read["ring"], strict=True):
        if step < 0:
            continue
        worst = Culprit(paths.get(int(leaf)), int(step), *map(bool, bad))
        for culprit in [c for c in last if c.step == step] or [worst]:
            found.append(culprit._replace(norm=float(norm), loss=float(loss)))
    return found


def culprits(opt_state: Any, params: Any) -> list[Culprit]:
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
        opt_state: Any pytree that holds states of clips, of `monitor` or of
            `skip_steps`.
        params: The parameters that the optimizer was initialised with, for their paths.

    Returns:
        One `Culprit` per leaf and step; empty if everything was finite so far and no
        step was left out. Compare ``step`` with `clip/steps` to see how long ago it
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
        >>> optclip.culprits(state, params)  # doctest: +ELLIPSIS
        [Culprit(path='w', step=0, nan=True, pos_inf=True, neg_inf=False, ...)]
    """
    names = names_of(params)
    states = find(opt_state, (SkipState, ClipState, MonitorState))
    if not states:
        raise ValueError(
            "`opt_state` holds no state of a clip, `monitor` or `skip_steps` of "
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
