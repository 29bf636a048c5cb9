"""The adding problem, with a small gated RNN; what matters is far in the past."""

import jax
import jax.numpy as jnp

from benchmarks.training.data import apply, dense
from benchmarks.training.task import Task

LENGTH = 30
UNITS = 16
NOISE = 0.1  # standard deviation, of the sums in training; errors do not go to zero


def make(key, count):
    """Returns sequences of (number, mark), and the sums of the two marked numbers."""
    numbers, first, last = jax.random.split(key, 3)
    half = LENGTH // 2
    x = jax.random.uniform(numbers, (count, LENGTH))
    first = jax.random.randint(first, (count,), 0, half)
    last = jax.random.randint(last, (count,), half, LENGTH)
    marks = jax.nn.one_hot(first, LENGTH) + jax.nn.one_hot(last, LENGTH)
    return jnp.stack([x, marks], axis=-1), jnp.sum(x * marks, axis=-1)


def init(key):
    first, recurrent, last = jax.random.split(key, 3)
    kernel = jax.random.normal(recurrent, (UNITS, 2 * UNITS)) / jnp.sqrt(UNITS)
    return {
        "in": dense(first, 2, 2 * UNITS),
        "recurrent": kernel,
        "out": dense(last, UNITS, 1),
    }


def batch(key, step):
    key, noise = jax.random.split(key)
    x, sums = make(key, 16)
    return x, sums + NOISE * jax.random.normal(noise, sums.shape)


def loss(params, batch):
    x, sums = batch

    def cell(state, x):
        # A GRU with one gate, whose bias lets it remember for about 8 steps at first.
        gate, h = jnp.split(x + state @ params["recurrent"], 2, axis=-1)
        gate = jax.nn.sigmoid(gate - 2.0)
        return state + gate * (jnp.tanh(h) - state), None

    inputs = apply(params["in"], x.swapaxes(0, 1))
    state, _ = jax.lax.scan(cell, jnp.zeros((inputs.shape[1], UNITS)), inputs)
    return jnp.mean((apply(params["out"], state)[:, 0] - sums) ** 2)


def clean(params):
    return loss(params, make(jax.random.key(0), 500))


TASK = Task(
    name="adding_problem",
    split="held_out",
    trouble="long dependencies",
    optimizer="rmsprop",
    rates=(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
    steps=800,
    init=init,
    batch=batch,
    loss=loss,
    clean=clean,
    chance=1 / 6,  # the variance of the sum of two uniform numbers
)
