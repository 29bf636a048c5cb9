"""An MLP with two hidden layers on digits, under Muon; 2% of the batches are bad."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.training.data import apply, bad_batches, dense, digits, nll
from benchmarks.training.task import Task

IMAGES, LABELS, TEST_IMAGES, TEST_LABELS = digits()


def init(key):
    first, second, last = jax.random.split(key, 3)
    return {
        "first": dense(first, 64, 32, np.sqrt(2)),
        "second": dense(second, 32, 32, np.sqrt(2)),
        "out": dense(last, 32, 10),
    }


def logits(params, x):
    x = jax.nn.relu(apply(params["first"], x))
    return apply(params["out"], jax.nn.relu(apply(params["second"], x)))


def batch(key, step):
    row, bad = jax.random.split(key)
    rows = jax.random.randint(row, (16,), 0, len(LABELS))
    return bad_batches(bad, jnp.asarray(IMAGES)[rows], jnp.asarray(LABELS)[rows], 0.02)


def loss(params, batch):
    return nll(logits(params, batch[0]), batch[1])


def clean(params):
    return nll(logits(params, TEST_IMAGES), TEST_LABELS)


TASK = Task(
    name="mlp_muon_bad_batches",
    split="held_out",
    trouble="bad batches",
    optimizer="muon",
    rates=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
    steps=400,
    init=init,
    batch=batch,
    loss=loss,
    clean=clean,
    chance=float(np.log(10)),
)
