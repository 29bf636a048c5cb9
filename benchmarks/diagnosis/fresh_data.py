"""Faults of the data; and models that do not learn, for reasons beyond the list."""

import functools

import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.diagnosis import fresh_flows as flows
from benchmarks.diagnosis import fresh_losses as goals
from benchmarks.diagnosis import fresh_recipes as make
from benchmarks.diagnosis import fresh_tasks as tasks
from benchmarks.diagnosis.kinds_pairs import faulty, pair

partial = functools.partial


def at(number, change):
    """Returns a function that changes one batch."""

    def spoil(batches):
        return [change(b) if i == number else b for i, b in enumerate(batches)]

    return spoil


def bad_batch():
    yield faulty(
        "sounds, one batch in 16-bit integers, momentum",
        "bad_batch",
        make.ear(optax.sgd(0.03, 0.9)),
        spoil_batches=at(7, lambda b: (6000 * b[0], b[1])),
    )
    yield faulty(
        "survival analysis, one measurement of -9999",
        "bad_batch",
        make.survival(),
        spoil_batches=at(3, lambda b: (b[0].at[30, 2].set(-9999.0), b[1])),
    )
    yield faulty(
        "Poisson regression, one missing count",
        "bad_batch",
        make.counts(),
        spoil_batches=at(9, lambda b: (b[0], b[1].at[20].set(jnp.nan))),
    )
    yield faulty(
        "graph convolutions, a paper without links",
        "bad_batch",
        make.gcn(),
        spoil_batches=at(5, _alone),
    )
    yield faulty(
        "rents, one batch in cents, momentum, after 50 steps",
        "bad_batch",
        make.rents(flows.kan, optax.sgd(0.01, 0.9)),
        spoil_batches=at(2, lambda b: (b[0], 100 * b[1])),
        mid=50,
    )


def _alone(batch):
    (x, links), y = batch
    return (x, links.at[4].set(0.0).at[:, 4].set(0.0)), y


def incomes(x, rng):
    """Two columns in the currency, seven in units of their deviation."""
    large = np.where(np.arange(9) < 2, 20_000.0, 1.0)
    return x * large + np.where(np.arange(9) < 2, 50_000.0, 0.0)


def input_scale():
    standardize = {"standardize": None}
    yield from pair(
        "sounds in 16-bit integers, momentum",
        "sounds between -1 and 1, momentum",
        "input_scale",
        make.ear(optax.sgd(0.02, 0.9)),
        task=partial(tasks.tones, raw=True),
        fixes=standardize,
    )
    yield from pair(
        "Q-learning, rewards x500, momentum",
        "Q-learning, rewards x1, momentum",
        "input_scale",
        make.player(),
        task=partial(tasks.moves, reward=500.0),
        units=500.0**2,
        fixes=standardize,
    )
    yield from pair(
        "GRU, time in seconds since the start of the year",
        "GRU, time of day",
        "input_scale",
        make.forecast(),
        task=partial(
            tasks.seasons, clock=lambda t, rng: 86_400 * (t + rng.integers(0, 300))
        ),
        fixes=standardize,
    )
    yield from pair(
        "maxout, two columns of 50000 +- 20000",
        "maxout, standardized columns",
        "input_scale",
        make.rents(flows.maxout, optax.sgd(0.01, 0.9), depth=2),
        task=partial(tasks.rentals, columns=incomes),
        fixes=standardize,
    )


def mixed_up(batches):
    """Permutes the labels within each batch."""
    rng = np.random.default_rng(1)
    return [(x, y[rng.permutation(len(y))]) for x, y in batches]


def one_late(batches):
    """Each example has the label of the one before it."""
    return [(x, jnp.roll(y, 1, 0)) for x, y in batches]


def exchanged(batches):
    """Transposes the labels of the pixels, but not the pixels."""
    return [(x, y.swapaxes(1, 2)) for x, y in batches]


def friendly_negatives(batches):
    """The words that should be unrelated are the neighbors themselves."""
    return [(w, near, jnp.repeat(near[:, None], 5, 1)) for w, near, _ in batches]


def unknown():
    yield faulty(
        "Deep Set, labels of other sets",
        "unknown",
        make.crowd(),
        spoil_batches=mixed_up,
    )
    yield faulty(
        "sounds, labels one example late",
        "unknown",
        make.ear(),
        spoil_batches=one_late,
    )
    yield faulty(
        "U-Net, rows and columns of the labels exchanged",
        "unknown",
        make.unet(),
        spoil_batches=exchanged,
    )
    yield faulty(
        "LSTM, no gradient from one step to the one before",
        "unknown",
        make.lstm(),
        knobs=dict(detach=True),
    )
    yield faulty(
        "language model that sees the next word",
        "unknown",
        make.writer(),
        knobs=dict(causal=False),
        judged=True,
    )
    yield faulty(
        "search ranking, softmax before the softmax of the loss",
        "unknown",
        make.search(),
        loss=goals.softmax_twice,
        judged=True,
    )
    yield faulty(
        "autoencoder with a single latent number",
        "unknown",
        make.autoencoder(),
        knobs=dict(latent=1),
    )
    yield faulty(
        "word2vec, negative samples are the neighbors",
        "unknown",
        make.topics(),
        spoil_batches=friendly_negatives,
        judged=True,
    )
    yield faulty(
        "CryptoNet, the rate decays to zero within five steps",
        "unknown",
        make.crypto(optax.sgd(0.005)),
        optimizer=optax.sgd(optax.cosine_decay_schedule(0.005, 5)),
    )
    yield faulty(
        "Q-learning, actions of other states",
        "unknown",
        make.player(),
        loss=partial(goals.bellman, shift=1),
        judged=True,
    )


def scenarios():
    for group in (bad_batch, input_scale, unknown):
        yield from group()
