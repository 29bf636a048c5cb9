"""Growth inside a model: depth, recurrence, activation, and initialization."""

import optax

from benchmarks.diagnosis import kinds_losses as goals
from benchmarks.diagnosis import kinds_nets as nets
from benchmarks.diagnosis import kinds_tasks as own
from benchmarks.diagnosis import losses, recurrent
from benchmarks.diagnosis.kinds_pairs import pair
from benchmarks.diagnosis.problem import Recipe


def depth():
    blocks = Recipe(nets.residual, own.clusters, optax.sgd(0.02, 0.9))
    yield from pair(
        "40 residual blocks without normalization, momentum",
        "40 residual blocks with normalization, momentum",
        "depth",
        blocks,
        knobs=dict(norm=False),
        fixes={"normalize": None},
    )


def recurrence():
    stable = Recipe(nets.state_space, own.past, optax.adam(3e-3), losses.squared_error)
    yield from pair(
        "associative scan with factors of 1 to 1.08, 128 steps, Adam",
        "associative scan with factors of 0.8 to 0.98, 128 steps, Adam",
        "recurrence",
        stable,
        knobs=dict(low=1.0, high=1.08),
        fixes={"scale_weights": 0.87},
        other={"gate": stable.but(net=recurrent.elman, knobs=dict(cell="gru"))},
    )


def sums():
    # The sum over 30 neighbors multiplies the signal by about 30 in every round. The
    # cause is the initialization, not the depth: there are only four rounds, and He's
    # weights divided by the number of neighbors would train without any normalization.
    graph = Recipe(nets.messages, own.graphs, optax.sgd(0.05, 0.9), goals.graph_error)
    yield from pair(
        "messages added up over 30 neighbors, momentum",
        "messages averaged over 30 neighbors, momentum",
        "initialization",
        graph,
        knobs=dict(mean=False),
        fixes={"change_sum": None},
        other={
            "normalize": graph.but(knobs=dict(mean=False, norm=True)),
            "scale_weights": graph.but(knobs=dict(mean=False, gain=1 / 30)),
        },
    )


def activation():
    cnn = Recipe(nets.nnx_cnn, own.pictures, optax.adamw(2e-3))
    yield from pair(
        "NNX CNN with x**2, AdamW",
        "NNX CNN with relu, AdamW",
        "activation",
        cnn,
        knobs=dict(act="square"),
        fixes={"change_activation": None},
        other={"normalize": cnn.but(knobs=dict(act="square", norm=True))},
    )


def frequencies():
    # A second derivative multiplies each feature by its frequency squared, which makes
    # the residual of the equation 10000 times larger. The frequencies are drawn at the
    # start, so that this is a fault of the initialization.
    equation = Recipe(nets.fourier, own.charges, optax.rmsprop(1e-3), goals.poisson)
    yield from pair(
        "equation u'' = f, Fourier features of frequency 10, RMSprop",
        "equation u'' = f, Fourier features of frequency 0.3, RMSprop",
        "initialization",
        equation,
        knobs=dict(frequency=10.0),
        fixes={"scale_weights": 0.03},
    )


def scenarios():
    for group in (depth, recurrence, sums, activation, frequencies):
        yield from group()
