"""Tasks of the split "tune_kinds": each takes a seed and returns eight batches."""

import jax
import jax.numpy as jnp
import numpy as np

COUNT = 8


def _batches(draw, count=COUNT):
    def real(x):
        whole = np.issubdtype(x.dtype, np.integer)
        return jnp.array(x, jnp.int32 if whole else jnp.float32)

    return [jax.tree.map(real, draw()) for _ in range(count)]


def pictures(seed, size=16, raw=False):
    """Color images of 8 by 8 pixels in six classes; ``raw`` leaves them in 0..255."""
    rng = np.random.default_rng(seed)
    patterns = rng.uniform(60, 200, (6, 8, 8, 3))

    def draw():
        y = rng.integers(0, 6, size)
        x = np.clip(patterns[y] + 60 * rng.normal(size=(size, 8, 8, 3)), 0, 255).round()
        return (x if raw else (x - 130) / 70), y

    return _batches(draw)


def table(seed, size=64, change=lambda x, rng: x, target=lambda y: y):
    """Regression from 12 columns; ``change`` and ``target`` change their units."""
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(12, 6)) / 3, rng.normal(size=(6, 1))

    def draw():
        x = rng.normal(size=(size, 12))
        y = np.tanh(x @ first) @ second + 0.1 * rng.normal(size=(size, 1))
        return change(x, rng), target(y)

    return _batches(draw)


def nearly_constant(x, rng):
    """Column 3 is a rare flag, divided by a deviation estimated on too few rows."""
    flag = rng.random(len(x)) < 0.05
    return np.concatenate([x[:, :3], 2000.0 * flag[:, None], x[:, 4:]], 1)


def rare_flag(x, rng):
    """The same column, divided by its true deviation."""
    flag = rng.random(len(x)) < 0.05
    return np.concatenate([x[:, :3], flag[:, None] / 0.22, x[:, 4:]], 1)


def one_large_column(x, rng):
    return x * np.where(np.arange(12) == 5, 1e4, 1.0)


def clusters(seed, size=32, noise=1.0, keep=slice(0, 20)):
    """Points around eight centers; ``keep`` selects the columns that are visible."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(8, 20))

    def draw():
        y = rng.integers(0, 8, size)
        x = centers[y] + noise * rng.normal(size=(size, 20))
        hidden = rng.normal(size=(size, 20))
        return np.concatenate([x, hidden], 1)[:, keep], y

    return _batches(draw)


def rotated(seed, size=32):
    """Clusters and, as the auxiliary target, how far each point was shifted."""
    rng = np.random.default_rng(seed)
    centers, direction = rng.normal(size=(8, 20)), rng.normal(size=20)

    def draw():
        y, far = rng.integers(0, 8, size), rng.normal(size=size)
        x = centers[y] + rng.normal(size=(size, 20)) + far[:, None] * direction
        return x, (y, far)

    return _batches(draw)


def two_clouds(seed, size=64):
    """Real and generated points, and a position between each pair."""
    rng = np.random.default_rng(seed)

    def draw():
        turn = 2 * np.pi * rng.random((size, 1))
        real = 2 * np.concatenate([np.cos(turn), np.sin(turn)], 1)
        real = real + 0.1 * rng.normal(size=(size, 2))
        return real, 0.5 * rng.normal(size=(size, 2)) + 1.5, rng.random((size, 1))

    return _batches(draw)


def noised(seed, size=128):
    """Clean points, the noise, and its level, uniform between 0.001 and 1."""
    rng = np.random.default_rng(seed)
    basis = rng.normal(size=(2, 8)) / np.sqrt(2)

    def draw():
        turn = 2 * np.pi * rng.random(size)
        clean = np.stack([np.cos(turn), np.sin(turn)], 1) @ basis
        level = rng.uniform(0.001, 1.0, (size, 1))
        return clean, rng.normal(size=(size, 8)), level

    return _batches(draw)


def views(seed, size=32, noise=0.5):
    """Two noisy views of each of 32 objects that differ in eight hidden numbers."""
    rng = np.random.default_rng(seed)
    show = rng.normal(size=(8, 20)) / 3

    def draw():
        x = rng.normal(size=(size, 8)) @ show
        return tuple(x + noise * rng.normal(size=(size, 20)) for _ in range(2))

    return _batches(draw)


def past(seed, length=128, size=16):
    """A decaying sum of the past: four numbers per step, one number at the end."""
    rng = np.random.default_rng(seed)
    weights = 0.9 ** np.arange(length)[::-1, None] * rng.normal(size=(1, 4))

    def draw():
        x = rng.normal(size=(size, length, 4))
        return x, (x * weights).sum((1, 2))[:, None] / 4

    return _batches(draw)


def counts(seed, length=800, size=32):
    """Sequences of 0 and 1; the target is how many ones there are, standardized."""
    rng = np.random.default_rng(seed)

    def draw():
        share = rng.uniform(0.4, 0.9, (size, 1))
        x = rng.random((size, length)) < share
        return x * 1.0, (x.mean(1, keepdims=True) - 0.65) / 0.145

    return _batches(draw)


# Every graph has these numbers of nodes and edges: 30 neighbors per node, on average.
NODES, EDGES = 40, 1200


def graphs(seed, size=4):
    """Random graphs whose two communities are to be found from noisy node features."""
    rng = np.random.default_rng(seed)

    def one():
        side = np.arange(NODES) % 2
        links = np.empty((0, 2), int)
        while len(links) < EDGES:
            pair = rng.integers(0, NODES, (4 * EDGES, 2))
            same = side[pair[:, 0]] == side[pair[:, 1]]
            links = np.concatenate(
                [links, pair[rng.random(len(pair)) < 0.2 + 0.6 * same]]
            )
        x = rng.normal(size=(NODES, 4)) + 0.7 * side[:, None]
        return x, links[:EDGES], side

    def draw():
        x, links, side = map(np.stack, zip(*(one() for _ in range(size)), strict=True))
        return (x, links), side

    return _batches(draw)


def charges(seed, size=64):
    """Points in [0, 1] for the equation u'' = f, with u = 0 at both ends."""
    rng = np.random.default_rng(seed)

    def draw():
        x = rng.random(size)
        return x, np.sin(np.pi * x) + 0.5 * np.sin(2 * np.pi * x)

    return _batches(draw)


def two_sides(seed, size=64):
    """Two classes of points that a line separates with a wide margin."""
    rng = np.random.default_rng(seed)
    line = rng.normal(size=20) / 2

    def draw():
        y = rng.integers(0, 2, size)
        x = rng.normal(size=(size, 20)) + (2 * y[:, None] - 1) * line
        return x, y

    return _batches(draw)


def regions(seed, size=8):
    """Noisy images of 8 by 8 pixels and, per pixel, which of four classes it shows."""
    rng = np.random.default_rng(seed)

    def draw():
        corners = rng.integers(0, 4, (size, 2, 2))
        y = corners.repeat(4, 1).repeat(4, 2)
        x = y[..., None] - 1.5 + 0.7 * rng.normal(size=(size, 8, 8, 1))
        return x, y

    return _batches(draw)


def shuffled(batches):
    """Permutes the targets within each batch."""
    rng = np.random.default_rng(0)
    return [(x, y[rng.permutation(len(y))]) for x, y in batches]


def only_noise(batches):
    """Replaces the targets by noise of the same mean and deviation."""
    rng = np.random.default_rng(0)
    return [
        (x, y.mean() + y.std() * jnp.array(rng.normal(size=y.shape), y.dtype))
        for x, y in batches
    ]


def repeated(batches):
    """Replaces every input by the first one."""
    first = batches[0][0][:1]
    return [(jnp.broadcast_to(first, x.shape), y) for x, y in batches]
