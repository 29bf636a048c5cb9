"""Whether the last step was taken: for what lives outside the optimizer."""

from __future__ import annotations

import functools
from typing import Any

import jax

from optclip._engine.lookup import find
from optclip.wrappers.skip_steps import SkipState
from optclip.wrappers.stabilize import StabilizeState

__all__ = ["step_taken"]


@jax.jit
def _all_taken(runs: list[jax.Array]) -> jax.Array:
    # In jit, so that no constant is sent to the device at each call.
    return functools.reduce(lambda a, b: a & b, [run == 0 for run in runs])


def step_taken(opt_state: Any) -> jax.Array:
    """Returns whether the last update was taken, as a boolean array.

    It is False if a `skip_steps` or `stabilize` in the state skipped its last update.
    Use it for what lives outside the optimizer and must not see a bad batch either:
    batch statistics, an average of the parameters, a schedule of your own. See "What
    lives outside the optimizer" in the documentation.

    Args:
        opt_state: Any tree that holds states of `skip_steps` or `stabilize`, as
            ``update`` returned it, however deep they are nested: of a chain, of
            `optax.partition`, of `flax.nnx.Optimizer`, a whole train state, ... Inside
            `optax.MultiSteps` it tells of the last step that reached the wrapper.

    Returns:
        A boolean scalar, True before the first update; of a batch of states, an array
        with one entry per state. Works inside jit.

    Raises:
        TypeError: If ``opt_state`` is an optimizer.
        ValueError: If it holds no state of `skip_steps` or `stabilize`.

    Example:
        >>> import jax.numpy as jnp, optax, optclip
        >>> tx = optclip.skip_steps(optax.adam(1e-3))
        >>> params = jnp.ones(2)
        >>> _, state = tx.update(params * jnp.nan, tx.init(params), params)
        >>> average = jnp.where(optclip.step_taken(state), 0.0, 7.0)  # the old one
        >>> float(average)
        7.0
    """
    states = find(opt_state, (SkipState, StabilizeState))
    if not states:
        raise ValueError(
            "`opt_state` must hold the state of a `skip_steps` or a `stabilize`, and "
            "holds none: without one of them every step is taken. Wrap the optimizer, "
            "as in `optclip.skip_steps(optimizer)`, and pass the state that `update` "
            "returned."
        )
    return _all_taken([state.skipped_run for state in states])
