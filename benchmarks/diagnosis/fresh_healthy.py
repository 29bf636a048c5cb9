"""Models of the split "fresh" with nothing wrong, although some look unusual.

Their twins in the other files are the models of which only one thing was changed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.diagnosis import fresh_flows as flows
from benchmarks.diagnosis import fresh_losses as goals
from benchmarks.diagnosis import fresh_recipes as make
from benchmarks.diagnosis import fresh_sequences as series
from benchmarks.diagnosis import fresh_tasks as tasks
from benchmarks.diagnosis import losses
from benchmarks.diagnosis.healthy import healthy
from benchmarks.diagnosis.problem import Recipe

partial = functools.partial


def rare_rewards(batches):
    """All rewards but those of every twentieth move are zero."""

    def thin(batch):
        state, action, gain, later, ended = batch
        kept = jnp.arange(len(gain)) % 20 == 0
        return state, action, jnp.where(kept, 10 * gain, 0.0), 0 * later, ended

    return [thin(b) for b in batches]


@jax.custom_vjp
def binary(x):
    """The sign of x, with the derivative of a clipped identity."""
    return jnp.sign(x)


def _forward(x):
    return jnp.sign(x), x


def _backward(x, g):
    return (jnp.where(jnp.abs(x) < 1, g, 0.0),)


binary.defvjp(_forward, _backward)


def binary_code(key, *, width=24):
    """An autoencoder whose latent variables are -1 or 1."""
    keys = jax.random.split(key, 2)
    params = {
        "encode": series.draw(keys[0], 64, width),
        "decode": series.draw(keys[1], width, 64),
        "mean": jnp.zeros(64),
    }

    def forward(params, x):
        return binary(x @ params["encode"]) @ params["decode"] + params["mean"]

    return params, forward


def checkpointed(key, **knobs):
    """A network whose hidden values are computed again in the backward pass."""
    params, forward = flows.kan(key, **knobs)
    return params, jax.checkpoint(forward)


def scenarios():
    yield healthy("U-Net, Adam", make.unet())
    yield healthy("dilated convolutions, CTC", make.listener(optax.lamb(0.02)))
    yield healthy("ViT computed in bfloat16", make.vit(dtype="bfloat16"))
    yield healthy(
        "rents of 3000 +- 900 without a change of units, Adam",
        make.rents(flows.head_net, optax.adam(0.05), inputs=9).but(
            task=partial(tasks.rentals, price=lambda y: 3000 + 900 * y)
        ),
    )
    yield healthy(
        "rents from heavy-tailed columns, Adam",
        make.rents(flows.maxout, optax.adam(5e-3), depth=3).but(
            task=partial(tasks.rentals, columns=lambda x, rng: np.sinh(1.5 * x) / 2)
        ),
    )
    yield healthy(
        "GRU, loss x100, Adam",
        make.forecast().but(loss=partial(losses.squared_error, scale=100.0)),
    )
    yield healthy(
        "Q-learning, rare rewards, Adam",
        make.player(optax.adam(3e-3)).but(spoil_batches=rare_rewards),
    )
    yield healthy(
        "autoencoder with a binary code, its own derivative",
        Recipe(binary_code, tasks.bars, optax.adam(0.01), goals.itself),
    )
    yield healthy(
        "Q-learning, momentum 0.99 and a small rate",
        make.player(optax.sgd(0.003, 0.99)),
    )
    yield healthy("mean and variance, Adam", make.uncertain())
    yield healthy("mean and variance, after 100 steps", make.uncertain(), after=100)
    yield healthy("critic, hinge loss", make.critic())
    yield healthy("language model, after 100 steps", make.writer(), after=100)
    yield healthy(
        "polynomials with checkpointing, Adafactor, after 100 steps",
        make.rents(checkpointed, optax.adafactor(0.02)),
        after=100,
    )
    yield healthy(
        "ResNet, schedule-free SGD",
        make.resnet(optax.contrib.schedule_free_sgd(0.5)),
    )
    yield healthy("CryptoNet, a third of its rate", make.crypto(optax.sgd(0.007, 0.9)))
    yield healthy("LSTM, twice its rate", make.lstm(optax.adam(0.02)))
    yield healthy("search ranking, twice its rate", make.search(optax.rmsprop(6e-3)))
    yield healthy("word2vec, a third of its rate", make.topics(optax.adagrad(0.1)))
    yield healthy(
        "flow matching, AdamW with a decay, after 150 steps",
        make.matching(optax.adamw(optax.cosine_decay_schedule(5e-3, 400))),
        after=150,
    )
