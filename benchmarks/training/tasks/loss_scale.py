"""An MLP on digits whose loss is multiplied by 1000; 2% of the batches are bad."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.training.data import apply, bad_batches, dense, digits, nll
from benchmarks.training.task import Task

IMAGES, LABELS, TEST_IMAGES, TEST_LABELS = digits()
SCALE = 1e3


def init(key):
    first, last = jax.random.split(key)
    return {"hidden": dense(first, 64, 32, np.sqrt(2)), "out": dense(last, 32, 10)}


def logits(params, x):
    return apply(params["out"], jax.nn.relu(apply(params["hidden"], x)))


def batch(key, step):
    row, bad = jax.random.split(key)
    rows = jax.random.randint(row, (16,), 0, len(LABELS))
    return bad_batches(bad, jnp.asarray(IMAGES)[rows], jnp.asarray(LABELS)[rows], 0.02)


def loss(params, batch):
    return SCALE * nll(logits(params, batch[0]), batch[1])


def clean(params):
    return nll(logits(params, TEST_IMAGES), TEST_LABELS)


TASK = Task(
    name="loss_scale",
    split="tune",
    trouble="bad batches, large loss",
    optimizer="adam",
    rates=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
    steps=600,
    init=init,
    batch=batch,
    loss=loss,
    clean=clean,
    chance=float(np.log(10)),
)
