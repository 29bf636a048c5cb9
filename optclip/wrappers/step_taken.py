"""Reports whether the last step was taken, for state outside the optimizer."""

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
    # Jitted so that no constant is transferred to the device on each call.
    return functools.reduce(lambda a, b: a & b, [run == 0 for run in runs])


def step_taken(opt_state: Any) -> jax.Array:
    """Returns whether the last update was taken, as a boolean array.

    The result is False if any `skip_steps` or `stabilize` in the state skipped its last
    update. Use it to protect state outside the optimizer from bad batches, such as
    batch statistics, an average of the parameters or a custom schedule. See
    "State outside the optimizer" in the documentation.

    Args:
        opt_state: Any pytree that contains states of `skip_steps` or `stabilize`, as
            returned by ``update``, at any depth: the state of a chain, of
            `optax.partition` or of `flax.nnx.Optimizer`, or a whole train state. If the
            wrapper is inside `optax.MultiSteps`, the result refers to the last step
            that reached the wrapper.

    Returns:
        A boolean scalar, which is True before the first update, or an array with one
        entry per state for a batch of states. This works inside jit.

    Raises:
        TypeError: If ``opt_state`` is an optimizer.
        ValueError: If ``opt_state`` contains no state of `skip_steps` or `stabilize`.

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
            "`opt_state` must contain the state of a `skip_steps` or a `stabilize`, "
            "but contains none: without one of them, every step is taken. Wrap the "
            "optimizer, as in `optclip.skip_steps(optimizer)`, and pass the state that "
            "`update` returned."
        )
    return _all_taken([state.skipped_run for state in states])
