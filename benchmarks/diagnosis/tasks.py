"""Small synthetic tasks: each takes a seed and returns 24 batches."""

import jax.numpy as jnp
import numpy as np

COUNT = 24


def images(seed, size=32, scale=1.0):
    """Images of 8 by 8 pixels in ten classes: one pattern per class, and noise."""
    rng = np.random.default_rng(seed)
    patterns = 0.5 * rng.normal(size=(10, 8, 8, 1))
    batches = []
    for _ in range(COUNT):
        y = rng.integers(0, 10, size)
        x = patterns[y] + rng.normal(size=(size, 8, 8, 1))
        batches.append((jnp.array(scale * x, jnp.float32), jnp.array(y, jnp.int32)))
    return batches


def vectors(seed, size=32, scale=1.0, degrees=None):
    """Regression from 16 numbers; Student's t with ``degrees`` of freedom."""
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(16, 8)) / 4, rng.normal(size=(8, 1))
    batches = []
    for _ in range(COUNT):
        shape = (size, 16)
        x = rng.standard_t(degrees, shape) if degrees else rng.normal(size=shape)
        y = np.tanh(x @ first) @ second + 0.1 * rng.normal(size=(size, 1))
        batches.append((jnp.array(x, jnp.float32), jnp.array(scale * y, jnp.float32)))
    return batches


def two_classes(seed, size=64):
    """Heavy-tailed numbers (Student's t, 3 degrees of freedom) in two classes."""
    rng = np.random.default_rng(seed)
    line = rng.normal(size=16)
    batches = []
    for _ in range(COUNT):
        x = rng.standard_t(3, (size, 16))
        y = x @ line + rng.normal(size=size) > 0
        batches.append((jnp.array(x, jnp.float32), jnp.array(y, jnp.int32)))
    return batches


def tokens(seed, size=16, length=16, vocabulary=16):
    """Sequences of tokens in which each token depends on the one before."""
    rng = np.random.default_rng(seed)
    table = rng.dirichlet(np.full(vocabulary, 0.2), size=vocabulary).cumsum(1)
    batches = []
    for _ in range(COUNT):
        words = [rng.integers(0, vocabulary, size)]
        for _ in range(length):
            drawn = (rng.random((size, 1)) > table[words[-1]]).sum(1)
            words.append(np.minimum(drawn, vocabulary - 1))
        batches.append({"tokens": jnp.array(np.stack(words, 1), jnp.int32)})
    return batches


def sequences(seed, length=100, size=16, time_major=False):
    """A decaying sum of the past: four numbers per step, one number at the end."""
    rng = np.random.default_rng(seed)
    weights = 0.8 ** np.arange(length)[::-1, None] * rng.normal(size=(1, 4))
    batches = []
    for _ in range(COUNT):
        x = rng.normal(size=(size, length, 4))
        y = (x * weights).sum((1, 2))[:, None] / 2
        x = x.swapaxes(0, 1) if time_major else x
        batches.append((jnp.array(x, jnp.float32), jnp.array(y, jnp.float32)))
    return batches


def pairs(seed, size=64, people=40, things=30):
    """Ratings of items by users, from hidden preferences."""
    rng = np.random.default_rng(seed)
    tastes, kinds = rng.normal(size=(people, 4)), rng.normal(size=(things, 4))
    batches = []
    for _ in range(COUNT):
        who, what = rng.integers(0, people, size), rng.integers(0, things, size)
        y = (tastes[who] * kinds[what]).sum(1) / 2 + 0.1 * rng.normal(size=size)
        x = jnp.array(np.stack([who, what], 1), jnp.int32)
        batches.append((x, jnp.array(y, jnp.float32)))
    return batches


def choices(seed, size=64):
    """Observations, actions and rewards of a policy; the best action is observable."""
    rng = np.random.default_rng(seed)
    best = rng.normal(size=(16, 4))
    batches = []
    for _ in range(COUNT):
        seen, done = rng.normal(size=(size, 16)), rng.integers(0, 4, size)
        reward = (seen @ best)[np.arange(size), done] + rng.normal(size=size)
        batch = {
            "seen": jnp.array(seen, jnp.float32),
            "done": jnp.array(done, jnp.int32),
            "advantage": jnp.array(
                (reward - reward.mean()) / reward.std(), jnp.float32
            ),
            "log_before": jnp.full(size, -np.log(4), jnp.float32),
        }
        batches.append(batch)
    return batches


def spoiled(numbers, x=None, y=None):
    """Returns a function that corrupts the batches with these indices."""

    def spoil(batches):
        out = list(batches)
        for i in numbers:
            inputs, targets = out[i]
            out[i] = (x(inputs) if x else inputs, y(targets) if y else targets)
        return out

    return spoil
