"""Runs an optimizer and discards its step if a flag is set."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from optclip._engine import state as states
from optclip._engine.jaxprs import carried_out, is_literal

__all__ = ["update_unless"]


def update_unless(
    flag: jax.Array, optimizer: Any, updates: Any, state: Any, params: Any, extra: dict
) -> tuple[Any, Any]:
    """Returns the new updates and state, or zeros and the old state if ``flag`` is set.

    Both are selected with ``jnp.where``, so NaN is never multiplied by zero. Under jit,
    each leaf of the state is selected as soon as it is computed, and the updates are
    computed from the selected values. This does not change the result: if the old
    values are selected, the updates are zeros anyway. XLA can then update each moment
    in place in a single loop instead of copying the old moment first.
    """
    if not any(isinstance(x, Tracer) for x in jax.tree.leaves(updates)):
        out, after = optimizer.update(updates, state, params, **extra)
        after = states.tree_where(flag, state, after)
    else:
        out, after = _traced(flag, optimizer, updates, state, params, extra)
    out = jax.tree.map(lambda u: jnp.where(flag, jnp.zeros_like(u), u), out)
    return out, after


def _traced(flag, optimizer, updates, state, params, extra) -> tuple[Any, Any]:
    """Returns (updates, selected state) for traced arguments.

    The optimizer's jaxpr is evaluated one equation at a time, and each output that is a
    leaf of the new state is selected as soon as it is computed.
    """
    shapes: Any
    program, shapes = jax.make_jaxpr(
        lambda u, s, p: optimizer.update(u, s, p, **extra), return_shape=True
    )(updates, state, params)
    jaxpr, old = program.jaxpr, jax.tree.leaves(state)
    after = jaxpr.outvars[len(jaxpr.outvars) - len(jax.tree.leaves(shapes[1])) :]
    selected: dict[Any, Any] = {}
    if jax.tree.structure(shapes[1]) == jax.tree.structure(state):
        given = {*jaxpr.invars, *jaxpr.constvars}
        for var, before in zip(after, old, strict=True):
            alone = sum(other is var for other in after) == 1
            if alone and not is_literal(var) and var not in given:
                selected[var] = before
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, program.consts, strict=True))
    inputs = jax.tree.leaves((updates, state, params))
    values |= zip(jaxpr.invars, inputs, strict=True)

    def value_of(atom):
        return atom.val if is_literal(atom) else values[atom]

    done = set()
    for eqn in jaxpr.eqns:
        found = carried_out(jaxpr, eqn, list(map(value_of, eqn.invars)))
        for var, value in zip(eqn.outvars, found, strict=True):
            before = selected.get(var)
            if before is not None and jnp.shape(before) == jnp.shape(value):
                if jnp.result_type(before) == jnp.result_type(value):
                    value = jnp.where(flag, before, value)
                    done.add(var)
            values[var] = value
    found = list(map(value_of, jaxpr.outvars))
    out, new = jax.tree.unflatten(jax.tree.structure(shapes), found)
    if len(done) == len(old):
        return out, new
    rest = jax.tree.leaves(states.tree_where(flag, state, new))
    kept = [
        value if is_literal(var) or var not in done else values[var]
        for var, value in zip(after, rest, strict=True)
    ]
    return out, jax.tree.unflatten(jax.tree.structure(shapes[1]), kept)
