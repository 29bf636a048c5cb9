"""Which leaves went bad, and when."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from optclip._lookup import find, known, names_of, outside_jit
from optclip.clipping import ClipState
from optclip.monitoring import MonitorState
from optclip.skipping import SkipState

__all__ = ["Culprit", "culprits"]


class Culprit(NamedTuple):
    """A leaf that held entries that were not finite, or made a step a spike.

    Attributes:
        path: Path of the parameter, as "encoder/0/kernel"; None where the gradients
            were fine, and only the loss made `skip_steps` leave a step out.
        step: Number of the update, where the first is number 0.
        nan: How many entries were NaN.
        pos_inf: How many were +inf.
        neg_inf: How many were -inf.
        norm: Norm of all gradients of that step; None but for `skip_steps`.
        loss: Its loss, 0 where none was given; None but for `skip_steps`.
    """

    path: str | None
    step: int
    nan: int
    pos_inf: int
    neg_inf: int
    norm: float | None = None
    loss: float | None = None


def _one_state(state: Any) -> None:
    outside_jit(state, "culprits")
    if np.ndim(state.seen.last_nonfinite_step):
        raise ValueError(
            "The state holds a batch of states (of `jax.vmap` or `jax.pmap`): take "
            "one of them, as in `jax.tree.map(lambda x: x[0], opt_state)`."
        )


def _not_finite(state: Any, names: dict[int, str]) -> list[Culprit]:
    """Returns the leaves that were not finite when one was last, the worst first."""
    step = int(state.seen.last_nonfinite_step)
    if step < 0:
        return []
    entries = np.asarray(state.seen.nonfinite_entries)
    found = [
        Culprit(path, step, *(int(n) for n in entries[i]))
        for i, path in known(state.seen.leaf_code, names)
        if entries[i].any()
    ]
    return sorted(found, key=lambda c: -(c.nan + c.pos_inf + c.neg_inf))


def _left_out(state: SkipState, names: dict[int, str]) -> list[Culprit]:
    """Returns the worst leaf of each of the last steps left out, the newest first."""
    paths: dict[int, Any] = dict(known(state.seen.leaf_code, names))
    rows = zip(*map(np.asarray, state.last_bad), strict=True)
    found: list[Culprit] = []
    for step, norm, loss, leaf, bad in sorted(rows, key=lambda row: -int(row[0])):
        if step < 0:
            break
        all_leaves = [c for c in _not_finite(state, names) if c.step == step]
        worst = Culprit(paths.get(int(leaf)), int(step), *(int(n) for n in bad))
        for culprit in all_leaves or [worst]:
            found.append(culprit._replace(norm=float(norm), loss=float(loss)))
    return found


def culprits(opt_state: Any, params: Any) -> list[Culprit]:
    """Returns the leaves that held NaN or inf at the last such update, the worst first.

    With `skip_steps` in the optimizer, also those that made a step a spike: for each of
    the last steps left out, the newest first, its worst leaf.

    Args:
        opt_state: Any tree that holds states of clips, of `monitor` or of `skip_steps`.
            The first that met something bad counts: it stands nearest to the gradients.
        params: The parameters that the optimizer was initialised with, for their paths.

    Returns:
        One `Culprit` a leaf, empty if all went well so far. The last bad update is
        kept: compare ``step`` with `clip/steps`. Call it outside of jit; it fetches the
        counts from the device.

    Raises:
        ValueError: If ``params`` are not those that the optimizer was initialised with,
            or the state is a batch of states (take one of them first).

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> params = {"w": jnp.zeros(3), "b": jnp.zeros(1)}
        >>> tx = optclip.clip_by_global_norm(1.0, nonfinite="skip")
        >>> grads = {"w": jnp.array([1.0, jnp.nan, jnp.inf]), "b": jnp.ones(1)}
        >>> _, state = tx.update(grads, tx.init(params), params)
        >>> optclip.culprits(state, params)
        [Culprit(path='w', step=0, nan=1, pos_inf=1, neg_inf=0, norm=None, loss=None)]
    """
    names = names_of(params)
    wrappers = find(opt_state, (SkipState,))
    states = find(opt_state, (ClipState, MonitorState))
    if not states and not wrappers:
        raise ValueError(
            "`opt_state` holds no state of a clip, `monitor` or `skip_steps` of "
            "optclip. Pass the state of the optimizer that it is part of."
        )
    for look, several in ((_left_out, wrappers), (_not_finite, states)):
        for state in several:
            _one_state(state)
            known(state.seen.leaf_code, names)  # raises if the parameters are others
            found = look(state, names)
            if found:
                return found
    return []
