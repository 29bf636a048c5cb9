"""An MLP with two hidden layers on digits, under Muon; nothing goes wrong."""

import jax
import numpy as np

from benchmarks.training.data import apply, dense, digits, digits_batch, nll
from benchmarks.training.task import Task

_, _, TEST_IMAGES, TEST_LABELS = digits()


def init(key):
    first, second, last = jax.random.split(key, 3)
    return {
        "first": dense(first, 64, 32, np.sqrt(2)),
        "second": dense(second, 32, 32, np.sqrt(2)),
        "out": dense(last, 32, 10),
    }


def logits(params, x):
    x = jax.nn.relu(apply(params["first"], x))
    x = jax.nn.relu(apply(params["second"], x))
    return apply(params["out"], x)


def batch(key, step):
    return digits_batch(key, 16)


def loss(params, batch):
    return nll(logits(params, batch[0]), batch[1])


def clean(params):
    return nll(logits(params, TEST_IMAGES), TEST_LABELS)


TASK = Task(
    name="digits_muon",
    split="tune",
    trouble="none",
    optimizer="muon",
    rates=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
    steps=400,
    init=init,
    batch=batch,
    loss=loss,
    clean=clean,
    chance=float(np.log(10)),
)
