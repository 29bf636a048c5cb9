"""REINFORCE with a learned baseline on CartPole; noisy gradients, growing returns."""

import jax
import jax.numpy as jnp

from benchmarks.training.data import STEPS, apply, cartpole, dense
from benchmarks.training.task import Task

DISCOUNT = 0.98
# Observations are small numbers: about 1 over their standard deviations.
SCALE = jnp.array([1.0, 1.0, 8.0, 1.0])


def init(key):
    first, second, policy, value = jax.random.split(key, 4)
    return {
        "first": dense(first, 4, 16),
        "second": dense(second, 16, 16),
        # A small gain, so that the first policy is nearly uniform.
        "policy": dense(policy, 16, 2, 0.1),
        "value": dense(value, 16, 1, 0.1),
    }


def hidden(params, states):
    x = jnp.tanh(apply(params["first"], states * SCALE))
    return jnp.tanh(apply(params["second"], x))


def policy(params, states):
    return apply(params["policy"], hidden(params, states))


def batch(key, step):
    return key


def loss(params, key):
    fixed = jax.lax.stop_gradient(params)
    states, actions, up = cartpole(lambda x: policy(fixed, x), key, 8)
    states, rewards = states[:-1], up[1:].astype(jnp.float32)

    def back(total, reward):
        total = reward + DISCOUNT * total
        return total, total

    _, returns = jax.lax.scan(back, jnp.zeros(8), rewards, reverse=True)
    x = hidden(params, states)
    error = returns - apply(params["value"], x)[..., 0]
    logs = jax.nn.log_softmax(apply(params["policy"], x))
    logs = jnp.take_along_axis(logs, actions[..., None], axis=-1)[..., 0]
    each = 0.5 * error**2 - logs * jax.lax.stop_gradient(error)
    return jnp.sum(each * up[:-1]) / 8


def clean(params):
    _, _, up = cartpole(lambda x: policy(params, x), jax.random.key(0), 32)
    # The largest possible return over the return, so that ratios are those of returns.
    return STEPS / jnp.mean(jnp.sum(up[1:], axis=0))


TASK = Task(
    name="reinforce",
    split="tune",
    trouble="noisy gradients, growing returns",
    optimizer="rmsprop",
    rates=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
    steps=300,
    init=init,
    batch=batch,
    loss=loss,
    clean=clean,
    chance=12.0,  # one and the same action keeps the pole up for about 8 steps
)
