"""A GRU on characters; 3% of the batches are random, their loss multiplied by 100."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.training.data import CHARACTERS, apply, dense, nll, text
from benchmarks.training.task import Task

TRAIN, TEST = text()
SYMBOLS = CHARACTERS + 1
UNITS = 24
LENGTH = 16
# Windows at fixed places of the test text.
PLACES = np.linspace(0, len(TEST) - LENGTH - 1, 128).astype(np.int32)
WINDOWS = TEST[PLACES[:, None] + np.arange(LENGTH + 1)]


def init(key):
    embed, gates, new, out = jax.random.split(key, 4)
    return {
        "embed": jax.random.normal(embed, (SYMBOLS, UNITS)) * 0.5,
        "gates": dense(gates, 2 * UNITS, 2 * UNITS),
        "new": dense(new, 2 * UNITS, UNITS),
        "out": dense(out, UNITS, SYMBOLS),
    }


def logits(params, codes):
    def cell(state, x):
        both = jax.nn.sigmoid(apply(params["gates"], jnp.concatenate([state, x], -1)))
        reset, update = jnp.split(both, 2, axis=-1)
        new = jnp.tanh(apply(params["new"], jnp.concatenate([reset * state, x], -1)))
        state = update * state + (1 - update) * new
        return state, state

    x = params["embed"][codes.T]
    _, states = jax.lax.scan(cell, jnp.zeros_like(x[0]), x)
    return apply(params["out"], states)


def batch(key, step):
    place, which, other = jax.random.split(key, 3)
    first = jax.random.randint(place, (8, 1), 0, len(TRAIN) - LENGTH)
    codes = jnp.asarray(TRAIN)[first + jnp.arange(LENGTH + 1)]
    random = jax.random.randint(other, codes.shape, 0, SYMBOLS)
    bad = jax.random.bernoulli(which, 0.03)
    return jnp.where(bad, random, codes), jnp.where(bad, 100.0, 1.0)


def loss(params, batch):
    codes, weight = batch
    return weight * nll(logits(params, codes[:, :-1]), codes[:, 1:].T)


def clean(params):
    return loss(params, (jnp.asarray(WINDOWS), 1.0))


TASK = Task(
    name="gru_poisoned",
    split="held_out",
    trouble="bad batches",
    optimizer="momentum",
    rates=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
    steps=400,
    init=init,
    batch=batch,
    loss=loss,
    clean=clean,
    chance=float(np.log(SYMBOLS)),
)
