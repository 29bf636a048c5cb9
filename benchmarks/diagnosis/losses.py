"""Losses: each takes ``forward(params, x)`` and returns ``loss_fn(params, batch)``."""

import functools

import jax
import jax.numpy as jnp
import optax


def cross_entropy(forward, reduce=jnp.mean):
    def loss_fn(params, batch):
        x, y = batch
        logits = forward(params, x).astype(jnp.float32)
        return reduce(optax.softmax_cross_entropy_with_integer_labels(logits, y))

    return loss_fn


def squared_error(forward, reduce=jnp.mean, scale=1.0):
    def loss_fn(params, batch):
        x, y = batch
        return scale * reduce(jnp.square(forward(params, x).astype(jnp.float32) - y))

    return loss_fn


def next_token(forward, reduce=jnp.mean, scale=1.0):
    def loss_fn(params, batch):
        seen, wanted = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
        logits = forward(params, seen).astype(jnp.float32)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
        return scale * reduce(each)

    return loss_fn


def reconstruction(forward, reduce=jnp.mean):
    def loss_fn(params, batch):
        x = batch[0].reshape(len(batch[0]), -1)
        return reduce(jnp.square(forward(params, x) - x))

    return loss_fn


def policy_gradient(forward):
    """Policy gradient: the negative advantage times the action's log-probability."""

    def loss_fn(params, batch):
        log = jax.nn.log_softmax(forward(params, batch["seen"]))
        chosen = jnp.take_along_axis(log, batch["done"][:, None], -1)[:, 0]
        ratio = jnp.exp(chosen - batch["log_before"])
        capped = jnp.clip(ratio, 0.8, 1.2)
        gain = batch["advantage"]
        return -jnp.minimum(ratio * gain, capped * gain).mean()

    return loss_fn


def own_softmax(forward, temperature=1.0):
    """Cross-entropy with a softmax that does not subtract the largest logit."""

    def loss_fn(params, batch):
        x, y = batch
        weights = jnp.exp(forward(params, x) * temperature)
        shares = weights / weights.sum(-1, keepdims=True)
        chosen = jnp.take_along_axis(shares, y[:, None], -1)
        return -jnp.log(chosen + 1e-4).mean().astype(jnp.float32)

    return loss_fn


sum_cross_entropy = functools.partial(cross_entropy, reduce=jnp.sum)
sum_squared_error = functools.partial(squared_error, reduce=jnp.sum)
sum_next_token = functools.partial(next_token, reduce=jnp.sum)
sum_reconstruction = functools.partial(reconstruction, reduce=jnp.sum)
