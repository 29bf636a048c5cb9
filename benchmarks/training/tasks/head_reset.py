"""A pre-trained MLP on new classes of digits; its head is reset to zeros."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.training.data import apply, digits, nll
from benchmarks.training.task import Task

IMAGES, LABELS, TEST_IMAGES, TEST_LABELS = digits()
OLD, OLD_LABELS = IMAGES[LABELS < 5], LABELS[LABELS < 5]
NEW, NEW_LABELS = IMAGES[LABELS >= 5], LABELS[LABELS >= 5] - 5
TEST, TEST_NEW = TEST_IMAGES[TEST_LABELS >= 5], TEST_LABELS[TEST_LABELS >= 5] - 5
BODIES = 8  # the seeds start from different ones


def loss(params, batch):
    x = jax.nn.relu(apply(params["first"], batch[0]))
    x = jax.nn.relu(apply(params["second"], x))
    return nll(apply(params["head"], x), batch[1])


def pretrain(params):
    """Returns the body of an MLP, after 300 steps of SGD on the first five classes."""
    rows = np.random.RandomState(0).randint(0, len(OLD_LABELS), (300, 32))

    def step(params, rows):
        batch = jnp.asarray(OLD)[rows], jnp.asarray(OLD_LABELS)[rows]
        grads = jax.grad(loss)(params, batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), None

    params, _ = jax.lax.scan(step, params, rows)
    return {"first": params["first"], "second": params["second"]}


@functools.cache
def bodies():
    """Returns the pre-trained bodies, stacked."""
    rng = np.random.RandomState(0)

    def layer(fan_in, fan_out):
        kernel = rng.standard_normal((BODIES, fan_in, fan_out)) * np.sqrt(2 / fan_in)
        return {"kernel": np.float32(kernel), "bias": np.zeros((BODIES, fan_out), "f")}

    params = {"first": layer(64, 32), "second": layer(32, 32), "head": layer(32, 5)}
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(pretrain))(params))


def init(key):
    body = jax.random.randint(key, (), 0, BODIES)
    params = jax.tree.map(lambda x: jnp.asarray(x)[body], bodies())
    head = {"kernel": jnp.zeros((32, 5)), "bias": jnp.zeros(5)}
    return {**params, "head": head}


def batch(key, step):
    rows = jax.random.randint(key, (16,), 0, len(NEW_LABELS))
    return jnp.asarray(NEW)[rows], jnp.asarray(NEW_LABELS)[rows]


def clean(params):
    return loss(params, (TEST, TEST_NEW))


bodies()  # now, outside of any trace

TASK = Task(
    name="head_reset",
    split="held_out",
    trouble="zero head",
    optimizer="momentum",
    rates=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    steps=400,
    init=init,
    batch=batch,
    loss=loss,
    clean=clean,
    chance=float(np.log(5)),
)
