"""Losses of the split "tune_kinds": each takes ``forward``, returns ``loss_fn``."""

import jax
import jax.numpy as jnp
import optax

from benchmarks.diagnosis import losses


def two_heads(forward, weight=1.0):
    """Cross-entropy, and ``weight`` times the error of an auxiliary regression."""

    def loss_fn(params, batch):
        x, (y, far) = batch
        out = forward(params, x)
        kind = optax.softmax_cross_entropy_with_integer_labels(out[:, :-1], y)
        return kind.mean() + weight * jnp.square(out[:, -1] - far).mean()

    return loss_fn


def scaled_cross_entropy(forward, scale=1.0):
    mean = losses.cross_entropy(forward)
    return lambda params, batch: scale * mean(params, batch)


def critic(forward, weight=10.0):
    """Wasserstein critic; ``weight`` is that of its gradient penalty."""

    def loss_fn(params, batch):
        real, fake, share = batch
        between = share * real + (1 - share) * fake

        def score(x):
            return forward(params, x[None])[0, 0]

        slopes = jax.vmap(jax.grad(score))(between)
        norms = jnp.sqrt(jnp.square(slopes).sum(-1) + 1e-12)
        gap = forward(params, fake).mean() - forward(params, real).mean()
        return gap + weight * jnp.square(norms - 1).mean()

    return loss_fn


def denoising(forward, weigh=lambda level: 1.0):
    """Error of the predicted noise, weighted by a function of the noise level."""

    def loss_fn(params, batch):
        clean, noise, level = batch
        seen = jnp.sqrt(1 - level**2) * clean + level * noise
        guess = forward(params, jnp.concatenate([seen, level], -1))
        return (weigh(level) * jnp.square(guess - noise)).mean()

    return loss_fn


def likeness(forward, temperature=0.1):
    """Contrastive loss of two views: each must recognize its partner."""

    def loss_fn(params, batch):
        one, two = (_unit(forward(params, x)) for x in batch)
        scores = one @ two.T / temperature
        return -jnp.diagonal(jax.nn.log_softmax(scores)).mean()

    return loss_fn


def _unit(x):
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-6)


def poisson(forward):
    """Residual of u'' = f and of u = 0 at both ends; ``f`` is scaled to be about 1."""

    def loss_fn(params, batch):
        x, wanted = batch

        def u(x):
            return forward(params, x[None, None])[0, 0]

        second = jax.vmap(jax.grad(jax.grad(u)))(x)
        ends = jnp.square(forward(params, jnp.array([[0.0], [1.0]]))).mean()
        return jnp.square(second - wanted).mean() + 10 * ends

    return loss_fn


def binary(forward, stable=True):
    """Binary cross-entropy, from the logits or by the logarithm of probabilities."""

    def loss_fn(params, batch):
        x, y = batch
        logit = forward(params, x)[:, 0]
        if stable:
            return optax.sigmoid_binary_cross_entropy(logit, y).mean()
        p = jax.nn.sigmoid(logit)
        return -(y * jnp.log(p) + (1 - y) * jnp.log(1 - p)).mean()

    return loss_fn


def distances(forward, floor=1e-6):
    """Preserves the distances between all points of a batch, each to itself included.

    Without ``floor``, the gradient of the square root at zero is not finite.
    """

    def loss_fn(params, batch):
        x = batch[0]
        wanted = _all_pairs(x) / jnp.sqrt(x.shape[1])
        return jnp.square(_all_pairs(forward(params, x), floor) - wanted).mean()

    return loss_fn


def _all_pairs(x, floor=0.0):
    return jnp.sqrt(jnp.square(x[:, None] - x[None]).sum(-1) + floor)


def per_pixel(forward, weights=(0.5, 1.0, 1.0, 0.5)):
    """Mean of the cross-entropy of all pixels, weighted by class.

    `jnp.take` and `jnp.take_along_axis` return NaN for a class that does not exist.
    """

    def loss_fn(params, batch):
        x, y = batch
        logs = jax.nn.log_softmax(forward(params, x))
        logs = jnp.take_along_axis(logs, y[..., None], -1)[..., 0]
        weight = jnp.take(jnp.array(weights), y)
        return -(weight * logs).sum() / weight.sum()

    return loss_fn


def graph_error(forward):
    def loss_fn(params, batch):
        (x, links), side = batch
        logits = jax.vmap(forward, (None, 0, 0))(params, x, links)
        return optax.softmax_cross_entropy_with_integer_labels(logits, side).mean()

    return loss_fn


def reward_and_entropy(forward, sign=1.0):
    """Expected advantage of a policy, and a bonus for its entropy if ``sign`` is 1."""

    def loss_fn(params, batch):
        log = jax.nn.log_softmax(forward(params, batch["seen"]))
        chosen = jnp.take_along_axis(log, batch["done"][:, None], -1)[:, 0]
        ratio = jnp.exp(chosen - batch["log_before"])
        entropy = -(jnp.exp(log) * log).sum(-1).mean()
        return 1 - (ratio * batch["advantage"]).mean() - sign * 0.5 * entropy

    return loss_fn


def over(level):
    """Returns the weight of the score itself, 1 / level**2."""
    return 1 / level**2
