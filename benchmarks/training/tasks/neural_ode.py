"""A neural ODE that fits a damped oscillator; gradients explode through 40 steps."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.training.data import apply, dense
from benchmarks.training.task import Task

STEPS = 40
LENGTH = 0.25  # of a step in time: 10 in all, which is over three periods
NOISE = 0.1
DAMPING, FREQUENCY = 0.1, 2.0


def flow():
    """Returns float[STEPS, 2, 2], the exact map from the first state to the others."""
    t = LENGTH * np.arange(1, STEPS + 1)
    c, s = np.cos(FREQUENCY * t), np.sin(FREQUENCY * t)
    turn = np.stack([np.stack([c, s], -1), np.stack([-s, c], -1)], -2)
    return np.float32(np.exp(-DAMPING * t)[:, None, None] * turn)


FLOW = flow()
TEST = np.random.default_rng(0).uniform(-2, 2, (64, 2)).astype(np.float32)


def init(key):
    first, last = jax.random.split(key)
    return {"hidden": dense(first, 2, 24), "out": dense(last, 24, 2)}


def trajectory(params, start):
    """Returns float[STEPS, n, 2], by the Runge-Kutta method of order 4."""

    def speed(x):
        return apply(params["out"], jnp.tanh(apply(params["hidden"], x)))

    def step(x, _):
        a = speed(x)
        b = speed(x + LENGTH / 2 * a)
        c = speed(x + LENGTH / 2 * b)
        d = speed(x + LENGTH * c)
        x = x + LENGTH / 6 * (a + 2 * b + 2 * c + d)
        return x, x

    return jax.lax.scan(step, start, length=STEPS)[1]


def truth(start):
    return jnp.einsum("tij,nj->tni", FLOW, start)


def batch(key, step):
    first, noise = jax.random.split(key)
    start = jax.random.uniform(first, (8, 2), minval=-2, maxval=2)
    seen = truth(start)
    return start, seen + NOISE * jax.random.normal(noise, seen.shape)


def loss(params, batch):
    return jnp.mean((trajectory(params, batch[0]) - batch[1]) ** 2)


def clean(params):
    # What the noise of the observations adds to the loss of a perfect model.
    return NOISE**2 + loss(params, (TEST, truth(TEST)))


TASK = Task(
    name="neural_ode",
    split="held_out",
    trouble="exploding gradients",
    optimizer="adam",
    rates=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
    steps=400,
    init=init,
    batch=batch,
    loss=loss,
    clean=clean,
    # The loss of a model whose trajectories are zero.
    chance=float(NOISE**2 + np.mean(np.einsum("tij,nj->tni", FLOW, TEST) ** 2)),
)
