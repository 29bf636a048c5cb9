"""Over how many steps an optimizer accumulates each gradient."""

import contextlib
import math
from typing import Any

import jax
import jax.numpy as jnp

from optclip._engine import pytrees
from optclip._engine.scale_invariance import examples_of, ignores_scale

__all__ = ["SHORT", "memory_of", "rehearsal_length"]

# Up to a memory of this many steps (a momentum of 0.95 has 20), rehearsals show what an
# optimizer does. With a longer one, the first steps are far smaller than later ones.
SHORT = 25.0
# The most steps that a rehearsal is extended to.
LONGEST = 200


def _largest(updates: Any) -> float:
    sizes = [
        float(jnp.max(jnp.abs(u)))
        for u in jax.tree.leaves(updates)
        if pytrees.is_measured(u) and jnp.size(u)
    ]
    return max(sizes, default=0.0)


def _decay(optimizer: Any, params: Any) -> float:
    """Returns how much less of a gradient is in the update with each further step.

    A gradient is given one step and two steps before the same step, since the learning
    rate may differ between steps.
    """
    grads = examples_of(params, 1)
    # Zeros, so that weight decay has no effect.
    params, none = (jax.tree.map(jnp.zeros_like, grads) for _ in range(2))
    sizes = []
    for given in ((grads, none, none), (none, grads, none)):
        state, updates = optimizer.init(params), none
        for each in given:
            updates, state = optimizer.update(each, state, params)
        sizes.append(_largest(updates))
    earlier, later = sizes
    return earlier / later if later > 0 else 0.0


def memory_of(optimizer: Any, params: Any) -> float:
    """Returns over how many steps an optimizer spreads each gradient; 1 if over none.

    SGD with momentum m spreads it over about 1 / (1 - m) steps, so that the updates
    keep growing for as long. An optimizer that ignores the scale of gradients, such as
    Adam, has updates of the full size from the first step on, which counts as 1.
    """
    decay = 0.0
    with contextlib.suppress(Exception):  # whatever an optimizer may raise
        decay = _decay(optimizer, params)
    memory = 1 / (1 - decay) if decay < 1 else math.inf
    if not memory > SHORT:
        return max(memory, 1.0)
    return 1.0 if ignores_scale(optimizer, params) else memory


def rehearsal_length(memory: float, steps: int) -> int:
    """Returns the number of steps of a rehearsal that shows what an optimizer does."""
    return max(steps, int(min(2 * memory, LONGEST))) if memory > SHORT else steps
