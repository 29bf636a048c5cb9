"""An MLP that solves u'' + 4 u = sin(t); derivatives are large, and terms disagree."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.training.data import apply, dense
from benchmarks.training.task import Task

END = 6.0
FLOOR = 1e-3  # of the clean loss: smaller errors do not count
BOUNDARY = 10.0  # weight of the boundary; with 1, many runs stay near u = sin(t) / 4


def exact(t):
    """Returns the solution with u(0) = 1 and u'(0) = 0."""
    return np.cos(2 * t) - np.sin(2 * t) / 6 + np.sin(t) / 3


TEST = np.linspace(0, END, 200, dtype=np.float32)
ENDS = np.float32([0, END])


def init(key):
    keys = jax.random.split(key, 3)
    return {
        "first": dense(keys[0], 1, 16, 2.0),
        "second": dense(keys[1], 16, 16),
        "out": dense(keys[2], 16, 1),
    }


def solution(params, t):
    x = jnp.tanh(apply(params["first"], jnp.reshape(2 * t / END - 1, (1,))))
    x = jnp.tanh(apply(params["second"], x))
    return apply(params["out"], x)[0]


def batch(key, step):
    return jax.random.uniform(key, (32,), maxval=END)


def loss(params, batch):
    def residual(t):
        second = jax.grad(jax.grad(solution, 1), 1)(params, t)
        return second + 4 * solution(params, t) - jnp.sin(t)

    ends = jax.vmap(lambda t: solution(params, t))(ENDS) - exact(ENDS)
    return jnp.mean(jax.vmap(residual)(batch) ** 2) + BOUNDARY * jnp.mean(ends**2)


def clean(params):
    values = jax.vmap(lambda t: solution(params, t))(TEST)
    return FLOOR + jnp.mean((values - exact(TEST)) ** 2)


TASK = Task(
    name="physics_informed",
    split="tune",
    trouble="disagreeing terms",
    optimizer="adam",
    rates=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
    steps=1000,
    init=init,
    batch=batch,
    loss=loss,
    clean=clean,
    chance=float(FLOOR + np.mean(exact(TEST) ** 2)),
)
