"""The temporal order task, with a tanh RNN; gradients explode and vanish over time."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.training.data import apply, nll
from benchmarks.training.task import Task

# Pascanu, Mikolov and Bengio (2013), "On the difficulty of training recurrent neural
# networks", at a length that is learned within the steps. Two symbols out of {0, 1}
# stand among distractors out of {2, 3}; their order is the class, one of four.
LENGTH = 20
UNITS = 32
BATCH = 20
SYMBOLS = 4
# Standard deviation of the initial weights. With 0.1 little is learned within the
# steps, and with the square root of 0.1 training explodes at every rate.
SCALE = 0.2
WRONG = 0.05  # share of random classes in training, so that no loss goes to zero


def make(key, count, length=LENGTH):
    """Returns (symbols, classes), with the two symbols where Pascanu puts them."""
    keys = jax.random.split(key, 4)
    two = jax.random.randint(keys[0], (count, 2), 0, 2)
    symbols = jax.random.randint(keys[1], (count, length), 2, SYMBOLS)
    rows = jnp.arange(count)
    first = jax.random.randint(keys[2], (count,), length // 10, length // 5 + 1)
    last = jax.random.randint(keys[3], (count,), 2 * length // 5, length // 2 + 1)
    symbols = symbols.at[rows, first].set(two[:, 0])
    symbols = symbols.at[rows, last].set(two[:, 1])
    return symbols, 2 * two[:, 0] + two[:, 1]


def init(key):
    keys = jax.random.split(key, 3)

    def normal(key, *shape):
        return SCALE * jax.random.normal(key, shape)

    return {
        "in": normal(keys[0], SYMBOLS, UNITS),
        "recurrent": {
            "kernel": normal(keys[1], UNITS, UNITS),
            "bias": jnp.zeros(UNITS),
        },
        "out": {"kernel": normal(keys[2], UNITS, 4), "bias": jnp.zeros(4)},
    }


def batch(key, step):
    key, wrong, other = jax.random.split(key, 3)
    symbols, classes = make(key, BATCH)
    others = jax.random.randint(other, (BATCH,), 0, 4)
    wrong = jax.random.bernoulli(wrong, WRONG, (BATCH,))
    return symbols, jnp.where(wrong, others, classes)


def scores(params, symbols):
    """Returns float[count, classes]."""

    def cell(state, x):
        return jnp.tanh(apply(params["recurrent"], state) + x), None

    inputs = jax.nn.one_hot(symbols.T, SYMBOLS) @ params["in"]
    state, _ = jax.lax.scan(cell, jnp.zeros(inputs.shape[1:]), inputs)
    return apply(params["out"], state)


def loss(params, batch):
    symbols, classes = batch
    return nll(scores(params, symbols), classes)


def clean(params):
    return loss(params, make(jax.random.key(0), 500))


TASK = Task(
    name="temporal_order",
    split="tune",
    trouble="exploding gradients",
    optimizer="momentum",
    # Wide: without clipping all but small rates explode, with it a large one is best.
    rates=(0.001, 0.004, 0.016, 0.06, 0.25, 1.0),
    steps=700,
    init=init,
    batch=batch,
    loss=loss,
    clean=clean,
    chance=float(np.log(4)),
)
