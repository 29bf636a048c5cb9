"""Losses of the split "fresh": each takes ``forward``, returns ``loss_fn``."""

import jax
import jax.numpy as jnp
import optax

from benchmarks.diagnosis import losses


def elbo(forward, beta=1.0, reduce=jnp.mean):
    """The negative evidence lower bound of a VAE, per image."""

    def loss_fn(params, batch):
        x, noise = batch
        logits, mean, log_var = forward(params, x, noise)
        code = optax.sigmoid_binary_cross_entropy(logits, x).sum(-1)
        kl = 0.5 * (jnp.exp(log_var) + mean**2 - 1 - log_var).sum(-1)
        return reduce(code + beta * kl) / 10

    return loss_fn


def per_pixel(forward, reduce=jnp.mean):
    def loss_fn(params, batch):
        x, y = batch
        logits = forward(params, x)
        return reduce(optax.softmax_cross_entropy_with_integer_labels(logits, y))

    return loss_fn


def itself(forward, reduce=jnp.mean):
    """The error of an autoencoder."""
    return lambda params, batch: reduce((forward(params, batch[0]) - batch[0]) ** 2)


def ctc(forward, reduce=jnp.mean):
    def loss_fn(params, batch):
        x, y = batch
        none = jnp.zeros(x.shape[:2]), jnp.zeros(y.shape)
        return reduce(optax.ctc_loss(forward(params, x), none[0], y, none[1])) / 10

    return loss_fn


def poisson(forward, link="exp", epsilon=0.0, reduce=jnp.mean):
    """The negative log-likelihood of counts, without its constant."""

    def loss_fn(params, batch):
        x, y = batch
        out = forward(params, x)[:, 0]
        if link == "exp":
            return reduce(jnp.exp(out) - y * out)
        rate = jax.nn.relu(out) + epsilon
        return reduce(rate - y * jnp.log(rate))

    return loss_fn


def flow(forward, reduce=jnp.mean):
    """The negative log-likelihood of points under a normalizing flow."""

    def loss_fn(params, batch):
        z, log_det = forward(params, batch[0])
        return reduce(0.5 * jnp.square(z).sum(-1) - log_det)

    return loss_fn


def flow_matching(forward, after=1.0):
    """Predicts the direction from noise to data; ``after`` multiplies the time."""

    def loss_fn(params, batch):
        x, noise, t = batch
        mixed = t * x + (1 - t) * noise
        got = forward(params, jnp.concatenate([mixed, after * t], -1))
        return jnp.square(got - (x - noise)).mean()

    return loss_fn


def mixture(forward, weight=0.01):
    """Squared error, and ``weight`` times the terms for the choice of experts."""

    def loss_fn(params, batch):
        x, y = batch
        out, router = forward(params, x)
        return jnp.square(out - y).mean() + weight * router

    return loss_fn


def matching(forward):
    """CLIP: the right caption for each image, and the right image per caption."""

    def loss_fn(params, batch):
        logits = forward(params, *batch)
        right = jnp.arange(len(logits))
        each = optax.softmax_cross_entropy_with_integer_labels
        return (each(logits, right) + each(logits.T, right)).mean() / 2

    return loss_fn


def negatives(forward):
    """word2vec with negative sampling."""

    def loss_fn(params, batch):
        word, near, other = batch
        good = jax.nn.log_sigmoid(forward(params, word, near))
        bad = jax.nn.log_sigmoid(-forward(params, word[:, None], other))
        return -(good + bad.sum(-1)).mean()

    return loss_fn


def heat(forward, border=1.0, start=1.0):
    """The heat equation, with the ends held at 0 and a sine at time 0."""

    def loss_fn(params, batch):
        inside, along = batch

        def u(x, t):
            return forward(params, jnp.stack([x, t])[None])[0, 0]

        def wrong(x, t):
            bend = jax.grad(jax.grad(u))(x, t)
            return jax.grad(u, 1)(x, t) - 0.1 * bend

        x, t = inside.T
        equation = jnp.square(jax.vmap(wrong)(x, t)).mean()
        values = jax.vmap(u)
        ends = jnp.square(values(jnp.zeros_like(t), t)).mean()
        ends += jnp.square(values(jnp.ones_like(t), t)).mean()
        x = along[:, 0]
        first = jnp.square(values(x, jnp.zeros_like(x)) - jnp.sin(jnp.pi * x)).mean()
        return equation + border * ends + start * first

    return loss_fn


def bellman(forward, discount=0.9, shift=0):
    """Q-learning; ``shift`` rolls the actions, so that they belong to other states."""

    def loss_fn(params, batch):
        state, action, gain, later, ended = batch
        action = jnp.roll(action, shift)
        target = gain + discount * (1 - ended) * later
        value = jnp.take_along_axis(forward(params, state), action[:, None], 1)[:, 0]
        return jnp.square(value - target).mean()

    return loss_fn


def cox(forward, reduce=jnp.mean):
    """The partial likelihood of survival; the patients are sorted by their time."""

    def loss_fn(params, batch):
        x, died = batch
        risk = forward(params, x)[:, 0]
        later = jax.lax.cumlogsumexp(risk, reverse=True)
        return reduce(died * (later - risk))

    return loss_fn


def same_first_word(forward, epsilon=1e-6):
    """Pulls images whose captions begin alike together, and others apart by 1."""

    def loss_fn(params, batch):
        x, words = batch
        z = forward(params, x)
        # Also between each image and itself, where the distance is zero.
        far = jnp.square(z[:, None] - z).sum(-1)
        far = jnp.sqrt(far + epsilon)
        same = words[:, :1] == words[:, 0]
        return jnp.where(same, far**2, jax.nn.relu(1 - far) ** 2).mean()

    return loss_fn


def hinge_critic(forward):
    """The critic of a GAN, on points and on noise that imitates them."""

    def loss_fn(params, batch):
        real, noise, _ = batch
        real, fake = forward(params, real), forward(params, noise)
        return (jax.nn.relu(1 - real) + jax.nn.relu(1 + fake)).mean()

    return loss_fn


def gaussian(forward, floor=-6.0):
    """The negative log-likelihood of a mean and a variance that are both predicted."""

    def loss_fn(params, batch):
        x, y = batch
        mean, log_var = jnp.split(forward(params, x), 2, -1)
        log_var = jnp.maximum(log_var, floor)
        return 0.5 * (jnp.exp(-log_var) * jnp.square(mean - y) + log_var).mean()

    return loss_fn


def decayed(loss, weight):
    """Adds ``weight`` times half the squared norm of the parameters."""

    def made(forward):
        plain = loss(forward)

        def loss_fn(params, batch):
            norm = sum(jnp.vdot(x, x) for x in jax.tree.leaves(params))
            return plain(params, batch) + 0.5 * weight * norm

        return loss_fn

    return made


def softmax_twice(forward):
    """Takes the outputs for logits although they are probabilities."""
    return losses.cross_entropy(lambda params, x: jax.nn.softmax(forward(params, x)))


def scaled(loss, factor):
    def made(forward):
        plain = loss(forward)
        return lambda params, batch: factor * plain(params, batch)

    return made


def cost(forward):
    return lambda params, batch: forward(params, batch).mean()
