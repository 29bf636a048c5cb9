"""A deep linear network with small initial weights; gradients rise for good reasons."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.training.task import Task

SIZE = 16
LAYERS = 5
GAIN = 0.4  # the initial product of the layers is about 0.4**5 = 0.01 of the target
NOISE = 0.5  # standard deviation of the observations; that of the targets is 1
TRUE = np.random.default_rng(0).standard_normal((SIZE, SIZE)) / np.sqrt(SIZE)
TRUE = TRUE.astype(np.float32)


def init(key):
    return GAIN / np.sqrt(SIZE) * jax.random.normal(key, (LAYERS, SIZE, SIZE))


def batch(key, step):
    inputs, noise = jax.random.split(key)
    x = jax.random.normal(inputs, (32, SIZE))
    return x, x @ TRUE + NOISE * jax.random.normal(noise, x.shape)


def forward(params, x):
    for kernel in params:
        x = x @ kernel
    return x


def loss(params, batch):
    return jnp.mean((forward(params, batch[0]) - batch[1]) ** 2)


def clean(params):
    """Returns the expected squared error, without the noise of the observations."""
    return jnp.sum((forward(params, jnp.eye(SIZE)) - TRUE) ** 2) / SIZE


TASK = Task(
    name="linear_small_init",
    split="held_out",
    trouble="rising gradients",
    optimizer="momentum",
    rates=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
    steps=1000,
    init=init,
    batch=batch,
    loss=loss,
    clean=clean,
    chance=float(np.sum(TRUE**2) / SIZE),
)
