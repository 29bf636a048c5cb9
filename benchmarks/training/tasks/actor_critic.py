"""Advantage actor-critic on CartPole; the rewards are 10 times as large."""

import jax
import jax.numpy as jnp

from benchmarks.training.data import STEPS, apply, cartpole, dense
from benchmarks.training.task import Task

DISCOUNT = 0.98
TRACE = 0.9  # lambda of the generalized advantage estimates
REWARD = 10.0
EPISODES = 2
# Of the first states. With 0.05, as in Gymnasium, training reaches the best return.
SPREAD = 0.2
# Observations are small numbers: about 1 over their standard deviations.
SCALE = jnp.array([1.0, 1.0, 8.0, 1.0])


def init(key):
    actor, critic = jax.random.split(key)
    # Small gains, so that the first policy is nearly uniform, and values near zero.
    return {"actor": network(actor, 2), "critic": network(critic, 1)}


def network(key, size):
    first, second, last = jax.random.split(key, 3)
    return [dense(first, 4, 16), dense(second, 16, 16), dense(last, 16, size, 0.1)]


def outputs(layers, states):
    x = jnp.tanh(apply(layers[0], states * SCALE))
    return apply(layers[2], jnp.tanh(apply(layers[1], x)))


def policy(params, states):
    return outputs(params["actor"], states)


def batch(key, step):
    return key


def loss(params, key):
    fixed = jax.lax.stop_gradient(params)
    states, actions, up = cartpole(lambda x: policy(fixed, x), key, EPISODES, SPREAD)
    values = outputs(params["critic"], states)[..., 0]
    # The last value stands for what comes after the time limit.
    known = jax.lax.stop_gradient(values)
    errors = up[1:] * (REWARD + DISCOUNT * known[1:]) - known[:-1]

    def back(total, now):
        error, still = now
        total = error + DISCOUNT * TRACE * still * total
        return total, total

    _, advantages = jax.lax.scan(
        back, jnp.zeros(EPISODES), (errors, up[1:]), reverse=True
    )
    logs = jax.nn.log_softmax(policy(params, states[:-1]))
    chosen = jnp.take_along_axis(logs, actions[..., None], axis=-1)[..., 0]
    entropy = -jnp.sum(jnp.exp(logs) * logs, axis=-1)
    critic = 0.5 * (known[:-1] + advantages - values[:-1]) ** 2
    each = critic - advantages * chosen - 0.01 * entropy
    return jnp.sum(each * up[:-1]) / jnp.sum(up[:-1])


def clean(params):
    _, _, up = cartpole(lambda x: policy(params, x), jax.random.key(0), 32, SPREAD)
    # The largest possible return over the return, so that ratios are those of returns.
    return STEPS / jnp.mean(jnp.sum(up[1:], axis=0))


TASK = Task(
    name="actor_critic",
    split="held_out",
    trouble="large rewards, noisy gradients",
    optimizer="adam",
    rates=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
    steps=300,
    init=init,
    batch=batch,
    loss=loss,
    clean=clean,
    chance=13.0,  # one and the same action keeps the pole up for 7 to 8 steps
)
