"""Tasks of the split "fresh": each takes a seed and returns twelve batches."""

import jax
import jax.numpy as jnp
import numpy as np

COUNT = 12


def collect(draw, count=COUNT):
    """Returns batches of 32-bit arrays."""

    def convert(x):
        whole = np.issubdtype(x.dtype, np.integer)
        return jnp.asarray(x, jnp.int32 if whole else jnp.float32)

    return [jax.tree.map(convert, draw()) for _ in range(count)]


def gratings(seed, size=16, raw=False):
    """Noisy gratings of six orientations; ``raw`` leaves the pixels in 0..255."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:12, :12]

    def draw():
        y = rng.integers(0, 6, size)
        turn, phase = np.pi * y / 6, rng.uniform(0, 1.5, size)
        along = (
            np.cos(turn)[:, None, None] * columns + np.sin(turn)[:, None, None] * rows
        )
        x = np.sin(1.3 * along + phase[:, None, None])
        x = (x + 0.3 * rng.normal(size=x.shape))[..., None]
        return (np.clip(90 * x + 128, 0, 255).round() if raw else x), y

    return collect(draw)


def disks(seed, size=6):
    """Noisy images of one disk each; the label of a pixel is whether it is inside."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:12, :12]

    def draw():
        middle, radius = rng.uniform(3, 8, (size, 2, 1, 1)), rng.uniform(2, 4, size)
        far = np.hypot(rows - middle[:, 0], columns - middle[:, 1])
        y = (far < radius[:, None, None]).astype(int)
        return (2 * y - 1 + rng.normal(size=y.shape))[..., None], y

    return collect(draw)


def bars(seed, size=32):
    """Binary images of bars, flattened, and the noise for the latent variables."""
    rng = np.random.default_rng(seed)

    def draw():
        down, across = rng.random((2, size, 8)) < 0.2
        x = down[:, :, None] | across[:, None, :]
        return x.reshape(size, 64) * 1.0, rng.normal(size=(size, 6))

    return collect(draw)


def recall(seed, size=32, length=20, symbols=5):
    """Sequences of symbols; the label is the first one."""
    rng = np.random.default_rng(seed)

    def draw():
        x = rng.integers(0, symbols, (size, length))
        return x, x[:, 0]

    return collect(draw)


def seasons(seed, size=32, length=24, clock=None):
    """Two noisy waves and the time of day; the target is the next value.

    ``clock`` converts the time of day, which is between 0 and 1, to another unit.
    """
    rng = np.random.default_rng(seed)

    def draw():
        start = rng.random((size, 1))
        time = start + np.arange(length + 1) / 12
        value = np.sin(2 * np.pi * time) + 0.5 * np.sin(4.2 * np.pi * time + start)
        value = value + 0.1 * rng.normal(size=value.shape)
        hour = clock(time, rng) if clock else 2 * (time % 1) - 1
        x = np.stack([value, hour], -1)[:, :-1]
        return x, value[:, -1:]

    return collect(draw)


def orbits(seed, size=16, steps=24):
    """Starting points, and where a damped nonlinear rotation takes them."""
    rng = np.random.default_rng(seed)

    def draw():
        x = start = 1.5 * rng.normal(size=(size, 2))
        path = []
        for _ in range(steps):
            for _ in range(10):
                slope = np.stack([x[:, 1], -np.sin(2 * x[:, 0]) - 0.1 * x[:, 1]], 1)
                x = x + 0.01 * slope
            path.append(x)
        return start, np.stack(path)

    return collect(draw)


def rod(seed, size=64):
    """Positions and times at which a rod is heated, and positions at its start."""
    rng = np.random.default_rng(seed)
    return collect(lambda: (rng.random((size, 2)), rng.random((size, 1))))


def captions(seed, size=32):
    """Images (24 numbers) and captions (six words) of the same hidden scenes."""
    rng = np.random.default_rng(seed)
    show = rng.normal(size=(6, 24)) / 2

    def draw():
        scene = rng.normal(size=(size, 6))
        words = np.digitize(scene, [-0.7, 0.0, 0.7]) + 4 * np.arange(6)
        return np.tanh(scene @ show) + 0.1 * rng.normal(size=(size, 24)), words

    return collect(draw)


def starts(seed, size=32):
    """Starting positions and speeds of a cart with a pole."""
    rng = np.random.default_rng(seed)
    return collect(lambda: 0.5 * rng.normal(size=(size, 4)))


def moves(seed, size=64, reward=1.0):
    """States, actions, rewards, the target network's next values, and ends of games."""
    rng = np.random.default_rng(seed)
    worth, push = rng.normal(size=(8, 3)) / 3, rng.normal(size=(3, 8)) / 4

    def draw():
        state, action = rng.normal(size=(size, 8)), rng.integers(0, 3, size)
        gain = np.tanh((state @ worth)[np.arange(size), action])
        after = 0.9 * state + push[action] + 0.2 * rng.normal(size=(size, 8))
        later = np.tanh(after @ worth).max(1)
        return (
            state,
            action,
            reward * gain,
            reward * later,
            (rng.random(size) < 0.1) * 1.0,
        )

    return collect(draw)


def moons(seed, size=128):
    """Points on two half circles; noise and a time for each, for flow matching."""
    rng = np.random.default_rng(seed)

    def draw():
        turn, side = np.pi * rng.random(size), rng.integers(0, 2, size)
        x = np.stack([np.cos(turn), np.sin(turn)], 1) * (1 - 2 * side[:, None])
        x = x + side[:, None] * [1.0, 0.5] - [0.5, 0.25]
        x = 1.4 * x + 0.07 * rng.normal(size=x.shape)
        return x, rng.normal(size=(size, 2)), rng.random((size, 1))

    return collect(draw)


def papers(seed, nodes=48, chance=(0.05, 0.3)):
    """Citations (a matrix of 0 and 1) between papers of three fields."""
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(3, 6))

    def draw():
        y = rng.integers(0, 3, nodes)
        same = y[:, None] == y
        links = np.triu(rng.random((nodes, nodes)) < np.where(same, *chance[::-1]), 1)
        links = links + links.T + np.eye(nodes)
        return (0.6 * means[y] + rng.normal(size=(nodes, 6)), links), y

    return collect(draw)


def crowds(seed, size=24, members=300):
    """Sets of points in four classes, which differ in the mean of the points."""
    rng = np.random.default_rng(seed)
    means = 0.4 * rng.normal(size=(4, 3))

    def draw():
        y = rng.integers(0, 4, size)
        return means[y][:, None] + rng.normal(size=(size, members, 3)), y

    return collect(draw)


def visits(seed, size=64):
    """How often customers come, depending on ten columns: Poisson counts."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=10) / 4

    def draw():
        x = rng.normal(size=(size, 10))
        return x, rng.poisson(np.exp(0.5 + x @ weights)) * 1.0

    return collect(draw)


def speech(seed, size=16, symbols=5):
    """Recordings of four symbols each, five frames per symbol; 0 is the blank."""
    rng = np.random.default_rng(seed)
    shapes = rng.normal(size=(symbols + 1, 8))

    def draw():
        y = rng.integers(1, symbols + 1, (size, 4))
        x = shapes[y.repeat(5, 1)] * np.tile([0.3, 1, 1, 1, 0.3], 4)[:, None]
        return x + 0.3 * rng.normal(size=x.shape), y

    return collect(draw)


def results(seed, size=32):
    """Lists of eight search results with ten features each, and which was chosen."""
    rng = np.random.default_rng(seed)
    taste = rng.normal(size=10) / 2

    def draw():
        x = rng.normal(size=(size, 8, 10))
        score = np.tanh(x) @ taste + rng.gumbel(size=(size, 8)) / 3
        return x, score.argmax(1)

    return collect(draw)


def neighbors(seed, size=128, words=40):
    """Words, a neighbor of each, and five random words; eight words form a topic."""
    rng = np.random.default_rng(seed)

    def draw():
        word = rng.integers(0, words, size)
        near = word // 8 * 8 + rng.integers(0, 8, size)
        return word, near, rng.integers(0, words, (size, 5))

    return collect(draw)


def lagged(seed, size=16, length=16, words=12):
    """Text in which most words follow from the one two places before."""
    rng = np.random.default_rng(seed)

    def draw():
        text = [rng.integers(0, words, size) for _ in range(2)]
        for _ in range(length - 1):
            known = (text[-2] + 1) % words
            other = rng.integers(0, words, size)
            text.append(np.where(rng.random(size) < 0.85, known, other))
        return {"tokens": np.stack(text, 1)}

    return collect(draw)


def patients(seed, size=64):
    """Eight measurements per patient, in the order of survival, and who died."""
    rng = np.random.default_rng(seed)
    risk = rng.normal(size=8) / 2

    def draw():
        x = rng.normal(size=(size, 8))
        order = np.argsort(rng.exponential(size=size) * np.exp(-x @ risk))
        return x[order], (rng.random(size) < 0.7) * 1.0

    return collect(draw)


def tones(seed, size=16, raw=False):
    """Sounds of four pitches; ``raw`` leaves them as 16-bit integers."""
    rng = np.random.default_rng(seed)

    def draw():
        y, phase = rng.integers(0, 4, size), rng.uniform(0, 6.3, (size, 1))
        x = np.sin(np.arange(96) * (0.2 + 0.25 * y[:, None]) + phase)
        x = (x + 0.2 * rng.normal(size=x.shape))[..., None]
        return ((6000 * x).round() if raw else x), y

    return collect(draw)


def rentals(seed, size=64, columns=lambda x, rng: x, price=lambda y: y):
    """Rents from nine columns; ``columns`` and ``price`` change their units."""
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(9, 5)) / 2, rng.normal(size=(5, 1))
    second /= np.std(np.tanh(rng.normal(size=(1000, 9)) @ first) @ second)

    def draw():
        x = rng.normal(size=(size, 9))
        y = np.tanh(x @ first) @ second + 0.1 * rng.normal(size=(size, 1))
        return columns(x, rng), price(y)

    return collect(draw)
