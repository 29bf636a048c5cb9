"""Data that several tasks share: digits, text, and layers in plain JAX."""

import functools
import pydoc_data.topics
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "CHARACTERS",
    "STEPS",
    "apply",
    "bad_batches",
    "cartpole",
    "convnet",
    "convnet_init",
    "dense",
    "digits",
    "digits_batch",
    "nll",
    "text",
    "text_windows",
    "transformer",
    "transformer_init",
]

STEPS = 100  # of an episode of CartPole
CHARACTERS = 48  # the most common ones; all others are one more


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns (images, labels) for training and for testing, of scikit-learn's digits.

    Images are float32[n, 64] between 0 and 1.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.RandomState(0).permutation(len(data.target))
    images = np.float32(data.data[order] / 16)
    labels = np.int32(data.target[order])
    return images[:1400], labels[:1400], images[1400:], labels[1400:]


@functools.cache
def text() -> tuple[np.ndarray, np.ndarray]:
    """Returns the characters of Python's documentation, for training and testing."""
    topics = pydoc_data.topics.topics
    whole = re.sub(r"\s+", " ", " ".join(topics[k] for k in sorted(topics))).lower()
    letters, counts = np.unique(list(whole), return_counts=True)
    common = letters[np.argsort(-counts, kind="stable")][:CHARACTERS]
    number = {letter: i for i, letter in enumerate(common)}
    codes = np.array([number.get(x, CHARACTERS) for x in whole], np.int32)
    at = len(codes) * 9 // 10
    return codes[:at], codes[at:]


def bad_batches(
    key: jax.Array, images: jax.Array, labels: jax.Array, fraction: float
) -> tuple[jax.Array, jax.Array]:
    """Returns the batch, or, for a fraction of the keys, a bad one in its place.

    The images of a bad batch are multiplied by 1000, and its labels are random.
    """
    which, other = jax.random.split(key)
    bad = jax.random.bernoulli(which, fraction)
    wrong = jax.random.randint(other, labels.shape, 0, 10)
    return images * jnp.where(bad, 1000.0, 1.0), jnp.where(bad, wrong, labels)


def cartpole(
    policy: Callable[[jax.Array], jax.Array],
    key: jax.Array,
    episodes: int,
    spread: float = 0.05,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Plays episodes of CartPole: a cart is pushed left or right to balance a pole.

    Args:
        policy: Function of the observations that returns the logits of the two actions.
        key: Key of the first states and of the actions.
        episodes: Number of episodes.
        spread: The first states are uniform between minus this and this.

    Returns:
        float[STEPS + 1, episodes, 4], the observations; int[STEPS, episodes], the
        actions; and bool[STEPS + 1, episodes], whether the pole is still up.
    """

    def step(carry, key):
        state, up = carry
        action = jax.random.categorical(key, policy(state))
        _, speed, angle, spin = jnp.moveaxis(state, -1, 0)
        # The equations, constants and limits are those of Gymnasium's CartPole-v1.
        force = jnp.where(action == 1, 10.0, -10.0)
        push = (force + 0.05 * spin**2 * jnp.sin(angle)) / 1.1
        turn = (9.8 * jnp.sin(angle) - jnp.cos(angle) * push) / (
            0.5 * (4 / 3 - 0.1 * jnp.cos(angle) ** 2 / 1.1)
        )
        push = push - 0.05 * turn * jnp.cos(angle) / 1.1
        change = jnp.stack([speed, push, spin, turn], axis=-1)
        # A state whose pole is down stays as it is.
        after = jnp.where(up[:, None], state + 0.02 * change, state)
        still = (jnp.abs(after[:, 0]) < 2.4) & (jnp.abs(after[:, 2]) < np.pi / 15)
        return (after, up & still), (state, action, up)

    first, rest = jax.random.split(key)
    state = jax.random.uniform(first, (episodes, 4), minval=-spread, maxval=spread)
    carry = state, jnp.ones(episodes, bool)
    (state, last), (states, actions, up) = jax.lax.scan(
        step, carry, jax.random.split(rest, STEPS)
    )
    states = jnp.concatenate([states, state[None]])
    return states, actions, jnp.concatenate([up, last[None]])


def dense(key: jax.Array, fan_in: int, fan_out: int, gain: float = 1.0) -> dict:
    """Returns a kernel with variance ``gain**2 / fan_in``, and a bias of zeros."""
    kernel = jax.random.normal(key, (fan_in, fan_out)) * gain / np.sqrt(fan_in)
    return {"kernel": kernel, "bias": jnp.zeros(fan_out)}


def apply(layer: dict, x: jax.Array) -> jax.Array:
    """Applies a dense layer."""
    return x @ layer["kernel"] + layer["bias"]


def nll(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the mean negative log-likelihood of the labels."""
    logs = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(logs, labels[..., None], axis=-1))


def digits_batch(
    key: jax.Array, size: int, bad: float = 0.0, factor: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Returns (images, labels) of ``size`` random training digits.

    With probability ``bad``, the images are multiplied by ``factor``, and all labels
    are random.
    """
    images, labels, _, _ = digits()
    pick, coin, guess = jax.random.split(key, 3)
    rows = jax.random.randint(pick, (size,), 0, len(labels))
    is_bad = jax.random.uniform(coin) < bad
    x, y = jnp.asarray(images)[rows], jnp.asarray(labels)[rows]
    guesses = jax.random.randint(guess, (size,), 0, 10)
    return jnp.where(is_bad, factor * x, x), jnp.where(is_bad, guesses, y)


def convnet_init(key: jax.Array) -> dict:
    """Returns the parameters of `convnet`: 1,418 numbers."""
    first, second, last = jax.random.split(key, 3)
    return {
        "first": dense(first, 9, 8, np.sqrt(2)),
        "second": dense(second, 9 * 8, 16, np.sqrt(2)),
        "out": dense(last, 16, 10),
    }


def _convolve(layer: dict, x: jax.Array, stride: int = 1) -> jax.Array:
    """Applies a 3x3 convolution, as a matrix product: vmap makes that fast on CPUs."""
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifts = [
        x[:, i : i + height : stride, j : j + width : stride]
        for i in range(3)
        for j in range(3)
    ]
    return apply(layer, jnp.concatenate(shifts, axis=-1))


def convnet(
    params: dict,
    images: jax.Array,
    normalize: Callable[[str, jax.Array], jax.Array] = lambda name, x: x,
) -> jax.Array:
    """Returns the logits of digits, with two 3x3 convolutions and a mean pool.

    ``normalize`` is a function of the name of a convolution and its output.
    """
    x = images.reshape(-1, 8, 8, 1)
    x = jax.nn.relu(normalize("first", _convolve(params["first"], x)))
    x = jax.nn.relu(normalize("second", _convolve(params["second"], x, stride=2)))
    return apply(params["out"], jnp.mean(x, axis=(1, 2)))


def text_windows(
    key: jax.Array, count: int, size: int, test: bool = False
) -> jax.Array:
    """Returns int32[count, size + 1]: random windows of the characters of the text."""
    codes = jnp.asarray(text()[test])
    starts = jax.random.randint(key, (count, 1), 0, len(codes) - size)
    return codes[starts + jnp.arange(size + 1)]


def transformer_init(key: jax.Array, context: int, gain: float = 1.0) -> dict:
    """Returns the parameters of `transformer`: 2 layers of width 32, 20,000 numbers.

    ``gain`` is that of all kernels but the last.
    """
    keys = iter(jax.random.split(key, 11))
    layers = [
        {
            "qkv": dense(next(keys), 32, 96, gain),
            "project": dense(next(keys), 32, 32, gain),
            "up": dense(next(keys), 32, 64, gain),
            "down": dense(next(keys), 64, 32, gain),
        }
        for _ in range(2)
    ]
    return {
        "embedding": jax.random.normal(next(keys), (CHARACTERS + 1, 32)),
        "positions": 0.1 * jax.random.normal(next(keys), (context, 32)),
        "layers": layers,
        "out": dense(next(keys), 32, CHARACTERS + 1),
    }


def transformer(params: dict, codes: jax.Array, post_norm: bool = False) -> jax.Array:
    """Returns the logits of the next characters, with 4 causal heads.

    Layers are normalized before their residual branches, or after the sums.
    """
    batch, length = codes.shape
    causal = jnp.tril(jnp.ones((length, length), bool))

    def norm(x):
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5)

    def attend(layer, x):
        q, k, v = jnp.split(apply(layer["qkv"], x), 3, axis=-1)
        q, k, v = (y.reshape(batch, length, 4, 8) for y in (q, k, v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(8)
        weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf))
        x = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return apply(layer["project"], x.reshape(batch, length, 32))

    def feed(layer, x):
        return apply(layer["down"], jax.nn.gelu(apply(layer["up"], x)))

    x = params["embedding"][codes] + params["positions"][:length]
    for layer in params["layers"]:
        for branch in (attend, feed):
            if post_norm:
                x = norm(x + branch(layer, x))
            else:
                x = x + branch(layer, norm(x))
    return apply(params["out"], x if post_norm else norm(x))
