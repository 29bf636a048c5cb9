"""An MLP that fits a smooth function; the targets' noise has infinite variance."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.training.data import apply, dense
from benchmarks.training.task import Task

SIZE = 4
FREEDOM = 1.5  # degrees of freedom of Student's t: a mean, but no variance
NOISE = 0.3
# Added to the clean loss, so that ratios of small errors say little.
FLOOR = 0.01
RNG = np.random.default_rng(0)
TRUE = RNG.standard_normal((SIZE, 3)).astype(np.float32) / np.sqrt(SIZE)
TEST = RNG.standard_normal((1000, SIZE)).astype(np.float32)


def target(x):
    """Returns a function of the inputs with variance near 1."""
    return jnp.sum(jnp.sin(1.5 * x @ TRUE), axis=-1)


def init(key):
    first, last = jax.random.split(key)
    return {"hidden": dense(first, SIZE, 32), "out": dense(last, 32, 1)}


def predict(params, x):
    return apply(params["out"], jnp.tanh(apply(params["hidden"], x)))[:, 0]


def batch(key, step):
    inputs, radius, angle = jax.random.split(key, 3)
    x = jax.random.normal(inputs, (32, SIZE))
    # Bailey's polar method: exact for Student's t, and without rejection.
    u = jax.random.uniform(radius, (32,), minval=1e-7, maxval=1.0)
    turn = jnp.cos(2 * jnp.pi * jax.random.uniform(angle, (32,)))
    noise = jnp.sqrt(FREEDOM * (u ** (-2 / FREEDOM) - 1)) * turn
    return x, target(x) + NOISE * noise


def loss(params, batch):
    return jnp.mean((predict(params, batch[0]) - batch[1]) ** 2)


def clean(params):
    return FLOOR + loss(params, (TEST, target(TEST)))


TASK = Task(
    name="regression_student",
    split="held_out",
    trouble="targets with heavy tails",
    optimizer="adam",
    rates=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    steps=800,
    init=init,
    batch=batch,
    loss=loss,
    clean=clean,
    chance=float(FLOOR + np.var(np.sum(np.sin(1.5 * TEST @ TRUE), axis=-1))),
)
