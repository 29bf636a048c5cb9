"""A linear system, identified by Adam; gradients fall by orders of magnitude early."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.training.task import Task

STATES = 8
STEPS = 20
# The largest magnitude of the eigenvalues: those of the true system decay, and those
# of the initial parameters grow to 1.3**20 = 190, whose square is in the first losses.
TRUE, INITIAL = 0.95, 1.3
NOISE = 0.1


def turning(magnitude, seed):
    """Returns float[STATES, STATES], rotations in planes, in a random basis."""
    random = np.random.default_rng(seed)
    matrix = np.zeros((STATES, STATES))
    for i, angle in enumerate(random.uniform(0.1, 1.5, STATES // 2)):
        c, s = np.cos(angle), np.sin(angle)
        matrix[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = [[c, s], [-s, c]]
    basis = np.linalg.qr(random.normal(size=(STATES, STATES)))[0]
    return np.float32(magnitude * basis @ matrix @ basis.T)


SYSTEM = turning(TRUE, 0)
TEST = np.random.default_rng(1).normal(size=(128, STATES)).astype(np.float32)


def init(key):
    noise = jax.random.normal(key, (STATES, STATES))
    return {"system": turning(INITIAL, 2) + 0.1 * noise}


def trajectory(system, start):
    """Returns float[STEPS, n, STATES]."""

    def step(x, _):
        x = x @ system.T
        return x, x

    return jax.lax.scan(step, start, length=STEPS)[1]


def batch(key, step):
    first, noise = jax.random.split(key)
    start = jax.random.normal(first, (16, STATES))
    seen = trajectory(SYSTEM, start)
    return start, seen + NOISE * jax.random.normal(noise, seen.shape)


def loss(params, batch):
    return jnp.mean((trajectory(params["system"], batch[0]) - batch[1]) ** 2)


def clean(params):
    # What the noise of the observations adds to the loss of a perfect model.
    return NOISE**2 + loss(params, (TEST, trajectory(SYSTEM, TEST)))


TASK = Task(
    name="unstable_system",
    split="tune",
    trouble="falling gradients",
    optimizer="adam",
    rates=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
    steps=400,
    init=init,
    batch=batch,
    loss=loss,
    clean=clean,
    # The loss of a model whose trajectories are zero.
    chance=float(NOISE**2 + np.mean(np.square(trajectory(SYSTEM, TEST)))),
)
