"""An MLP on digits; the loss grows 100-fold at half-time, and 2% of batches are bad."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.training.data import apply, dense, digits, digits_batch, nll
from benchmarks.training.task import Task

_, _, TEST_IMAGES, TEST_LABELS = digits()
STEPS = 800  # longer than `digits_bad_batches`: each half has to train


def init(key):
    first, last = jax.random.split(key)
    return {"hidden": dense(first, 64, 32, np.sqrt(2)), "out": dense(last, 32, 10)}


def logits(params, x):
    return apply(params["out"], jax.nn.relu(apply(params["hidden"], x)))


def batch(key, step):
    images, labels = digits_batch(key, 16, bad=0.02, factor=1000.0)
    return images, labels, jnp.where(step < STEPS // 2, 0.1, 10.0)


def loss(params, batch):
    images, labels, weight = batch
    return weight * nll(logits(params, images), labels)


def clean(params):
    return nll(logits(params, TEST_IMAGES), TEST_LABELS)


TASK = Task(
    name="digits_shift",
    split="held_out",
    trouble="shift of the loss scale, and bad batches",
    optimizer="adam",
    rates=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
    steps=STEPS,
    init=init,
    batch=batch,
    loss=loss,
    clean=clean,
    chance=float(np.log(10)),
)
