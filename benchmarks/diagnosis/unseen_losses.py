"""Losses of the unseen split: each takes ``forward`` and returns ``loss_fn``."""

import jax
import jax.numpy as jnp
import optax


def pixels(forward, reduce=jnp.mean):
    """Cross-entropy of the pixels that belong to a disk."""

    def loss_fn(params, batch):
        logits = forward(params, batch[0]).astype(jnp.float32)
        return reduce(optax.sigmoid_binary_cross_entropy(logits, batch[1]))

    return loss_fn


def huber(forward, reduce=jnp.mean):
    def loss_fn(params, batch):
        return reduce(optax.huber_loss(forward(params, batch[0]), batch[1]))

    return loss_fn


def pitch_and_loudness(forward):
    """The loss of two tasks: cross-entropy for pitch, Huber loss for loudness."""

    def loss_fn(params, batch):
        x, y = batch
        out = forward(params, x).astype(jnp.float32)
        pitch = y[:, 0].astype(jnp.int32)
        kind = optax.softmax_cross_entropy_with_integer_labels(out[:, :-1], pitch)
        return kind.mean() + 0.5 * optax.huber_loss(out[:, -1], y[:, 1]).mean()

    return loss_fn


def evidence(forward):
    """Negative evidence lower bound of a variational autoencoder, per point."""

    def loss_fn(params, batch):
        out, mean, log_var = forward(params, batch)
        error = jnp.square(out - batch[0]).sum(-1) / 0.2
        kl = 0.5 * (jnp.exp(log_var) + mean**2 - 1 - log_var).sum(-1)
        return (error + kl).mean() / 36

    return loss_fn


def likeness(forward, temperature=0.07):
    """The contrastive loss of two views, as a direct transcription of the paper."""

    def loss_fn(params, batch):
        one, two = (_unit(forward(params, x)) for x in batch)
        weights = jnp.exp(one @ two.T / temperature)
        shares = jnp.diagonal(weights) / weights.sum(-1)
        return -jnp.log(shares).mean().astype(jnp.float32)

    return loss_fn


def _unit(x):
    return x / jnp.sqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-3)


def margin(forward):
    """The Siamese loss: pairs of one class are close, others at least two apart."""

    def loss_fn(params, batch):
        (one, two), same = batch
        squares = jnp.square(forward(params, one) - forward(params, two)).sum(-1)
        apart = jnp.sqrt(squares + 1e-6)
        return (same * squares + (1 - same) * jax.nn.relu(2 - apart) ** 2).mean()

    return loss_fn


def ranking(forward, reduce=jnp.mean):
    """The logistic loss of all pairs of documents that are in the wrong order."""

    def loss_fn(params, batch):
        x, y = batch
        score = forward(params, x)[:, 0]
        better = y > y[:, 0]
        return reduce(better * jax.nn.softplus(score[None] - score[:, None]))

    return loss_fn


def actor_critic(forward):
    """Clipped policy gradient, a value loss, and an entropy bonus."""

    def loss_fn(params, batch):
        out = forward(params, batch["seen"])
        log, gain = jax.nn.log_softmax(out[:, :-1]), batch["advantage"]
        chosen = jnp.take_along_axis(log, batch["done"][:, None], -1)[:, 0]
        ratio = jnp.exp(chosen - batch["log_before"])
        actor = jnp.minimum(ratio * gain, jnp.clip(ratio, 0.7, 1.3) * gain).mean()
        critic = jnp.square(out[:, -1] - gain).mean()
        entropy = -(jnp.exp(log) * log).sum(-1).mean()
        return 0.05 * critic - actor - 0.01 * entropy

    return loss_fn
