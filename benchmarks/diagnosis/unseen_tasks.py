"""Tasks of the unseen split: each takes a seed and returns 24 batches."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.diagnosis.tasks import COUNT


def _batches(rng, draw):
    def real(x):
        kind = jnp.int32 if np.issubdtype(x.dtype, np.integer) else jnp.float32
        return jnp.array(x, kind)

    return [jax.tree.map(real, draw(rng)) for _ in range(COUNT)]


def gratings(seed, size=24, side=12):
    """Colored stripes with a random phase; the class is one of six angles."""
    across, down = np.meshgrid(np.arange(side), np.arange(side))

    def draw(rng):
        y = rng.integers(0, 6, size)
        angle = (np.pi * y / 6)[:, None, None]
        place = across * np.cos(angle) + down * np.sin(angle)
        stripes = np.sin(1.2 * place + 2 * np.pi * rng.random((size, 1, 1)))
        color = rng.uniform(0.5, 1.5, (size, 1, 1, 3))
        noise = 0.5 * rng.normal(size=(size, side, side, 3))
        return stripes[..., None] * color + noise, y

    return _batches(np.random.default_rng(seed), draw)


def discs(seed, size=8, side=16):
    """Noisy images of a disk, and which pixels are inside it."""
    across, down = np.meshgrid(np.arange(side), np.arange(side))

    def draw(rng):
        middle = rng.uniform(4, side - 4, (2, size, 1, 1))
        away = np.hypot(across - middle[0], down - middle[1])
        inside = away < rng.uniform(2, 5, (size, 1, 1))
        noise = rng.normal(size=(size, side, side))
        return (inside + 0.7 * noise)[..., None], inside.astype(np.float64)

    return _batches(np.random.default_rng(seed), draw)


def waves(seed, size=24, length=48, scale=1.0):
    """Noisy waves; the targets are the index of the pitch, and the loudness."""

    def draw(rng):
        pitch, loud = rng.integers(0, 5, size), rng.uniform(0.5, 2.0, size)
        turn = 2 * np.pi * rng.random((size, 1))
        time = np.arange(length) * (0.3 + 0.25 * pitch[:, None])
        x = loud[:, None] * np.sin(time + turn) + 0.3 * rng.normal(size=(size, length))
        return scale * x[..., None], np.stack([pitch, loud], 1)

    return _batches(np.random.default_rng(seed), draw)


def neighbors(seed, size=12, length=60):
    """One number per step, whose target depends on the steps before and after it."""
    rng = np.random.default_rng(seed)
    left, right = rng.normal(size=(2, 3, 1)) / 2

    def draw(rng):
        x = rng.normal(size=(size, length, 3))
        return x, np.tanh(np.roll(x, 1, 1) @ left) + np.roll(x, -1, 1) @ right

    return _batches(rng, draw)


def rollouts(seed, size=12, length=50):
    """Trajectories of a damped, rotating system from an initial state under forces."""
    rng = np.random.default_rng(seed)
    turn = 0.95 * np.linalg.qr(rng.normal(size=(6, 6)))[0]
    push = rng.normal(size=(2, 6)) / 2

    def draw(rng):
        first, pushes = rng.normal(size=(size, 6)), rng.normal(size=(size, length, 2))
        states = [first]
        for t in range(length):
            states.append(states[-1] @ turn + pushes[:, t] @ push)
        return (first, pushes), np.stack(states[1:], 1)

    return _batches(rng, draw)


def ring(seed, size=12, cells=16):
    """Numbers on a ring, and their values after each spread over five cells."""

    def draw(rng):
        x = rng.normal(size=(size, cells, 1))
        return x, sum(np.roll(x, k, 1) for k in range(-2, 3)) / 2

    return _batches(np.random.default_rng(seed), draw)


def web(nodes=20):
    """Returns the adjacency matrix of a fixed graph, each row of which sums to one."""
    rng = np.random.default_rng(7)
    links = (rng.random((nodes, nodes)) < 0.15) | np.eye(nodes, k=1, dtype=bool)
    links = links | links.T | np.eye(nodes, dtype=bool)
    return links / links.sum(1, keepdims=True)


def nodes(seed, size=12):
    """Numbers at the nodes of a graph; the target depends on nodes two edges away."""
    rng = np.random.default_rng(seed)
    links, mix = web(), np.linalg.qr(rng.normal(size=(4, 3)))[0]

    def draw(rng):
        x = rng.normal(size=(size, len(links), 4))
        return x, (links @ links @ x @ mix).argmax(-1)

    return _batches(rng, draw)


def sets(seed, size=24, members=15):
    """Sets of points; the targets are their spread and the farthest point."""

    def draw(rng):
        x = rng.normal(size=(size, members, 3)) * rng.uniform(0.3, 2, (size, 1, 1))
        far = np.linalg.norm(x, axis=-1).max(1)
        return x, np.stack([x.std((1, 2)), far / 2], 1)

    return _batches(np.random.default_rng(seed), draw)


def views(seed, size=24):
    """Two noisy views of the same hidden numbers."""
    rng = np.random.default_rng(seed)
    one, two = rng.normal(size=(2, 6, 20)) / 2

    def draw(rng):
        hidden = rng.normal(size=(size, 6))
        noise = 0.3 * rng.normal(size=(2, size, 20))
        return np.tanh(hidden @ one) + noise[0], np.tanh(hidden @ two) + noise[1]

    return _batches(rng, draw)


def couples(seed, size=32):
    """Pairs of vectors, and whether both are from the same of eight classes."""
    rng = np.random.default_rng(seed)
    middles = 1.2 * rng.normal(size=(8, 20))

    def draw(rng):
        first, same = rng.integers(0, 8, size), rng.integers(0, 2, size)
        kinds = np.stack([first, (first + (1 - same) * rng.integers(1, 8, size)) % 8])
        x = middles[kinds] + 0.8 * rng.normal(size=(2, size, 20))
        return x, same.astype(np.float64)

    return _batches(rng, draw)


def kinds(seed, size=32):
    """Vectors in eight classes, each of which has two centers."""
    rng = np.random.default_rng(seed)
    middles = rng.normal(size=(16, 20))

    def draw(rng):
        which = rng.integers(0, 16, size)
        return middles[which] + 0.8 * rng.normal(size=(size, 20)), which % 8

    return _batches(rng, draw)


def clicks(seed, size=64):
    """User, item and context, four numerical features, and whether it was clicked."""
    rng = np.random.default_rng(seed)
    tastes, line = rng.normal(size=(3, 25, 3)), rng.normal(size=4)

    def draw(rng):
        ids, about = rng.integers(0, 25, (size, 3)), rng.normal(size=(size, 4))
        drawn = np.stack([tastes[i][ids[:, i]] for i in range(3)])
        liking = (drawn[0] * drawn[1]).sum(1) + drawn[2, :, 0] + about @ line
        return (ids, about), (liking > 0).astype(np.float64)

    return _batches(rng, draw)


def documents(seed, size=24):
    """Documents to be ranked."""
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(12, 6)) / 3, rng.normal(size=(6, 1))

    def draw(rng):
        x = rng.normal(size=(size, 12))
        return x, np.tanh(x @ first) @ second + 0.1 * rng.normal(size=(size, 1))

    return _batches(rng, draw)


def drawings(seed, size=32):
    """Curves of 36 points from three hidden numbers, and noise to sample with."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(3, 36))

    def draw(rng):
        x = np.tanh(rng.normal(size=(size, 3)) @ mix)
        return x + 0.1 * rng.normal(size=x.shape), rng.normal(size=(size, 4))

    return _batches(rng, draw)
