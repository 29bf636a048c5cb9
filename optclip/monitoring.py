"""A transformation that changes nothing and records the norm of each leaf."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optclip import _checks, _measure, _state, _trees
from optclip._checks import EUCLIDEAN
from optclip._numbers import increment
from optclip._state import Seen

__all__ = ["MonitorState", "monitor"]


class MonitorState(NamedTuple):
    """State of `monitor`.

    Attributes:
        leaf_norm: float32[leaves]. The norm of each leaf at the last update.
        monitored_norm: float32 scalar. The norm of all leaves together.
        monitored_steps: int32 scalar. Updates so far.
        seen: A `Seen`: the non-finite entries.
    """

    leaf_norm: jax.Array
    monitored_norm: jax.Array
    monitored_steps: jax.Array
    seen: Seen


def monitor(
    *, ord: float | str = EUCLIDEAN, axis_name: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Changes nothing, and records the norm of each leaf of the updates.

    Put it before a clip to record gradients, or last in the chain to record the updates
    that are applied. Next to a clip it costs no second pass over the gradients: XLA
    sees that both need the same sums.

    Args:
        ord: The norm's order: a number of at least 1, inf or "rms".
        axis_name: As in `optclip.clip`.

    Returns:
        A transformation with `MonitorState`; ``params`` is not used.

    Raises:
        ValueError: If ``ord`` is not the order of a norm.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> tx = optclip.monitor()
        >>> grads = {"w": jnp.array([3.0, 4.0])}
        >>> _, state = tx.update(grads, tx.init(grads))
        >>> {name: float(x) for name, x in optclip.leaf_metrics(state, grads).items()}
        {'w/norm': 5.0}
    """
    order = _checks.order(ord)

    def init_fn(params) -> Any:
        paths = _trees.leaves_of(params).paths
        return MonitorState(
            leaf_norm=jnp.zeros(max(len(paths), 1), jnp.float32),
            monitored_norm=_state.scalar(0.0),
            monitored_steps=_state.scalar(0, jnp.int32),
            seen=_state.first_seen(paths),
        )

    def update_fn(updates, state, params=None, **extra_args) -> Any:
        del params, extra_args
        found = _trees.leaves_of(updates)
        state = _state.own(state, lambda: init_fn(updates), absent=found.absent)
        step = state.monitored_steps
        if not found.leaves:
            return updates, state._replace(monitored_steps=increment(step))
        measured, total = _measure.measure_leaves(
            updates, found, order=order, axis_name=axis_name
        )
        bad = jnp.any(measured.kinds)
        norms = _state.figures(measured.norm[0])
        return updates, MonitorState(
            leaf_norm=_state.per_leaf(norms, state.leaf_norm, state.seen, found.paths),
            monitored_norm=_state.figures(total),
            monitored_steps=increment(step),
            seen=_state.look(state.seen, measured.kinds, bad, step, found.paths),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
