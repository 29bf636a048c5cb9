"""Cosine classification of digits; the learned temperature makes gradients grow."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.training.data import apply, dense, digits, nll
from benchmarks.training.task import Task

IMAGES, LABELS, TEST_IMAGES, TEST_LABELS = digits()


def init(key):
    embed, classes = jax.random.split(key)
    return {
        "embed": dense(embed, 64, 16),
        "classes": jax.random.normal(classes, (10, 16)),
        "log_temperature": jnp.zeros([]),
    }


def unit(x):
    """Returns the vectors with length 1."""
    return x / jnp.sqrt(jnp.sum(x**2, axis=-1, keepdims=True) + 1e-12)


def logits(params, x):
    cosines = unit(apply(params["embed"], x)) @ unit(params["classes"]).T
    return cosines * jnp.exp(params["log_temperature"])


def batch(key, step):
    rows = jax.random.randint(key, (16,), 0, len(LABELS))
    return jnp.asarray(IMAGES)[rows], jnp.asarray(LABELS)[rows]


def loss(params, batch):
    return nll(logits(params, batch[0]), batch[1])


def clean(params):
    return nll(logits(params, TEST_IMAGES), TEST_LABELS)


TASK = Task(
    name="temperature",
    split="tune",
    trouble="gradients that grow for good reasons",
    optimizer="adamw",
    rates=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
    steps=500,
    init=init,
    batch=batch,
    loss=loss,
    clean=clean,
    chance=float(np.log(10)),
)
