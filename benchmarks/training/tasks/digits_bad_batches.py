"""An MLP on digits; 2% of the batches have huge inputs and random labels."""

import jax
import numpy as np

from benchmarks.training.data import apply, dense, digits, digits_batch, nll
from benchmarks.training.task import Task

_, _, TEST_IMAGES, TEST_LABELS = digits()


def init(key):
    first, last = jax.random.split(key)
    return {"hidden": dense(first, 64, 32, np.sqrt(2)), "out": dense(last, 32, 10)}


def logits(params, x):
    return apply(params["out"], jax.nn.relu(apply(params["hidden"], x)))


def batch(key, step):
    return digits_batch(key, 16, bad=0.02, factor=1000.0)


def loss(params, batch):
    return nll(logits(params, batch[0]), batch[1])


def clean(params):
    return nll(logits(params, TEST_IMAGES), TEST_LABELS)


TASK = Task(
    name="digits_bad_batches",
    split="tune",
    trouble="bad batches",
    optimizer="adam",
    rates=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
    steps=600,
    init=init,
    batch=batch,
    loss=loss,
    clean=clean,
    chance=float(np.log(10)),
)
