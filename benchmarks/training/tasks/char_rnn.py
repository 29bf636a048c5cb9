"""A tanh RNN that predicts the next character; its gradients can explode."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.training.data import CHARACTERS, apply, dense, nll, text
from benchmarks.training.task import Task

TEXT, TEST_TEXT = text()
CLASSES = CHARACTERS + 1
UNITS = 32
LENGTH = 24
# One character more than the steps of time, because the targets are shifted by one.
TEST = TEST_TEXT[: 64 * (LENGTH + 1)].reshape(64, LENGTH + 1)


def init(key):
    embed, inward, recurrent, out = jax.random.split(key, 4)
    # Orthogonal weights neither shrink nor grow the state at the start.
    turn = jnp.linalg.qr(jax.random.normal(recurrent, (UNITS, UNITS)))[0]
    return {
        "embedding": jax.random.normal(embed, (CLASSES, UNITS)),
        "inward": dense(inward, UNITS, UNITS),
        "recurrent": turn,
        "out": dense(out, UNITS, CLASSES),
    }


def batch(key, step):
    starts = jax.random.randint(key, (8, 1), 0, len(TEXT) - LENGTH)
    return jnp.asarray(TEXT)[starts + jnp.arange(LENGTH + 1)]


def loss(params, batch):
    # Time comes first: [time, batch, units].
    inputs = apply(params["inward"], params["embedding"][batch.T[:-1]])

    def step(state, x):
        state = jnp.tanh(x + state @ params["recurrent"])
        return state, state

    start = jnp.zeros(inputs.shape[1:])
    states = jax.lax.scan(step, start, inputs)[1]
    return nll(apply(params["out"], states), batch.T[1:])


def clean(params):
    return loss(params, jnp.asarray(TEST))


TASK = Task(
    name="char_rnn",
    split="tune",
    trouble="exploding gradients of an RNN",
    optimizer="momentum",
    rates=(0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
    steps=300,
    init=init,
    batch=batch,
    loss=loss,
    clean=clean,
    chance=float(np.log(CLASSES)),
)
