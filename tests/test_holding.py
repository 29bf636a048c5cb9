"""Optimizers whose step is not taken if a flag is set."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip
from optclip.wrappers._holding import update_unless

PARAMS = {"w": jnp.arange(6.0).reshape(2, 3) / 7, "b": jnp.full(3, 0.5)}
GRADS = {"w": jnp.ones((2, 3)), "b": jnp.array([1.0, -2.0, 0.5])}


class Twice(NamedTuple):
    """A state with one array in two fields, and a constant field."""

    first: jax.Array
    second: jax.Array
    constant: jax.Array


def twice():
    def init(params):
        del params
        return Twice(jnp.zeros(3), jnp.ones(3), jnp.full(3, 2.0))

    def update(updates, state, params=None):
        del params
        new = state.first + state.second * updates["b"]
        return jax.tree.map(lambda u: -u, updates), Twice(new, new, state.constant)

    return optax.GradientTransformation(init, update)


def in_a_program_of_its_own():
    inner = optax.adam(0.1)
    return optax.GradientTransformation(inner.init, jax.jit(inner.update))


OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1),
    # The updates and the state share one array.
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "nesterov": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adamw": lambda: optax.adamw(optax.linear_schedule(0.1, 0.01, 5)),
    "bf16 moments": lambda: optax.adamw(0.1, mu_dtype=jnp.bfloat16),
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=2),
    "lion": lambda: optax.lion(0.1),
    "several steps": lambda: optax.MultiSteps(optax.adam(0.1), 2),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(0.1),
    "partition": lambda: optax.partition(
        {"x": optax.adam(0.1), "y": optax.sgd(0.1)}, {"w": "x", "b": "y"}
    ),
    "clipped": lambda: optax.chain(optclip.zclip(), optax.adam(0.1)),
    "twice": twice,
    "jitted": in_a_program_of_its_own,
}


def stepped(tx, flags, update):
    state, out = tx.init(PARAMS), None
    for i, flag in enumerate(flags):
        grads = jax.tree.map(lambda x, k=i: x * (1 + k), GRADS)
        out, state = update(jnp.array(flag), grads, state)
    return out, state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_match_the_optimizer_or_are_not_taken(name):
    tx = OPTIMIZERS[name]()

    @jax.jit
    def ours(flag, grads, state):
        return update_unless(flag, tx, grads, state, PARAMS, {})

    @jax.jit
    def plain(flag, grads, state):
        out, after = tx.update(grads, state, PARAMS)
        out = jax.tree.map(lambda u: jnp.where(flag, 0.0, u), out)
        kept = jax.tree.map(lambda o, n: jnp.where(flag, o, n), state, after)
        return out, kept

    for skipped in ("000", "010", "10", "001", "11"):
        flags = [flag == "1" for flag in skipped]
        got, wanted = stepped(tx, flags, ours), stepped(tx, flags, plain)
        chex.assert_trees_all_equal_shapes_and_dtypes(got, wanted)
        chex.assert_trees_all_close(got, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step_that_is_not_taken_leaves_the_state_bitwise_unchanged(name):
    tx = OPTIMIZERS[name]()
    update = jax.jit(lambda f, g, s: update_unless(f, tx, g, s, PARAMS, {}))
    _, state = stepped(tx, (False, False), update)
    nan = jax.tree.map(lambda x: x * jnp.nan, GRADS)
    for run in (update, lambda f, g, s: update_unless(f, tx, g, s, PARAMS, {})):
        out, after = run(jnp.array(True), nan, state)
        chex.assert_trees_all_equal(after, state)
        chex.assert_trees_all_equal(out, jax.tree.map(jnp.zeros_like, out))


def test_extra_arguments_including_functions_reach_the_optimizer():
    tx = optax.lbfgs()

    def loss(params):
        return jnp.sum((params["w"] - 1) ** 2) + jnp.sum(params["b"] ** 2)

    @jax.jit
    def step(flag, params, state):
        value, grads = jax.value_and_grad(loss)(params)
        extra = {"value": value, "grad": grads, "value_fn": loss}
        return update_unless(flag, tx, grads, state, params, extra)

    state = tx.init(PARAMS)
    out, after = step(jnp.array(False), PARAMS, state)
    assert float(loss(optax.apply_updates(PARAMS, out))) < float(loss(PARAMS))
    held = step(jnp.array(True), PARAMS, after)[1]
    chex.assert_trees_all_equal(held, after)


def test_python_control_flow_on_values_still_works_without_jit():
    def update(updates, state, params=None):
        del params
        factor = 1.0 if float(state) < 1 else 0.5
        return jax.tree.map(lambda u: factor * u, updates), state + 1

    tx = optax.GradientTransformation(lambda params: jnp.zeros([]), update)
    out, after = update_unless(jnp.array(False), tx, GRADS, jnp.ones([]), None, {})
    np.testing.assert_array_equal(out["b"], 0.5 * GRADS["b"])
    assert float(after) == 2
