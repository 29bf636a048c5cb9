"""Logistic regression from zero weights, with 5% wrong labels; nothing goes wrong."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.training.task import Task

SIZE = 20
RNG = np.random.default_rng(0)
TRUE = RNG.standard_normal(SIZE).astype(np.float32)
WRONG = 0.05
TEST = RNG.standard_normal((1000, SIZE)).astype(np.float32)
TEST_SIGNS = np.float32(np.sign(TEST @ TRUE) * np.sign(RNG.random(1000) - WRONG))


def init(key):
    return {"kernel": jnp.zeros(SIZE), "bias": jnp.zeros([])}


def loss(params, batch):
    x, signs = batch
    margin = (x @ params["kernel"] + params["bias"]) * signs
    return jnp.mean(jax.nn.softplus(-margin))


def batch(key, step):
    inputs, flips = jax.random.split(key)
    x = jax.random.normal(inputs, (64, SIZE))
    return x, jnp.sign(x @ TRUE) * jnp.sign(jax.random.uniform(flips, (64,)) - WRONG)


def clean(params):
    return loss(params, (TEST, TEST_SIGNS))


TASK = Task(
    name="logistic_from_zeros",
    split="tune",
    trouble="zero initial weights",
    optimizer="adam",
    rates=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
    steps=300,
    init=init,
    batch=batch,
    loss=loss,
    clean=clean,
    chance=float(np.log(2)),
)
