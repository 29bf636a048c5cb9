"""An MLP on digits; heavy-tailed noise, of infinite variance, on the gradients."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.training.data import apply, dense, digits, nll
from benchmarks.training.task import Task

IMAGES, LABELS, TEST_IMAGES, TEST_LABELS = digits()


def init(key):
    first, last = jax.random.split(key)
    return {"hidden": dense(first, 64, 32, np.sqrt(2)), "out": dense(last, 32, 10)}


def logits(params, x):
    return apply(params["out"], jax.nn.relu(apply(params["hidden"], x)))


def batch(key, step):
    rows = jax.random.randint(key, (16,), 0, len(LABELS))
    return jnp.asarray(IMAGES)[rows], jnp.asarray(LABELS)[rows]


def loss(params, batch):
    return nll(logits(params, batch[0]), batch[1])


def clean(params):
    return nll(logits(params, TEST_IMAGES), TEST_LABELS)


def gradient(key, step, grads):
    """Adds an isotropic vector whose length has a Pareto tail of index 1.1."""
    length, *keys = jax.random.split(key, 1 + len(jax.tree.leaves(grads)))
    keys = jax.tree.unflatten(jax.tree.structure(grads), keys)
    noise = jax.tree.map(lambda k, g: jax.random.normal(k, g.shape), keys, grads)
    size = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(noise)))
    tail = jax.random.uniform(length, minval=1e-6, maxval=1.0) ** (-1 / 1.1)
    return jax.tree.map(lambda g, x: g + 0.5 * tail * x / size, grads, noise)


TASK = Task(
    name="digits_heavy_tails",
    split="tune",
    trouble="heavy-tailed noise",
    optimizer="momentum",
    rates=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
    steps=600,
    init=init,
    batch=batch,
    loss=loss,
    clean=clean,
    chance=float(np.log(10)),
    gradient=gradient,
)
