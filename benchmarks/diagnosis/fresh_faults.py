"""Faults of the network: its weights, its depth, its activations and its gates."""

import functools

import haiku as hk
import optax

from benchmarks.diagnosis import fresh_flows as flows
from benchmarks.diagnosis import fresh_recipes as make
from benchmarks.diagnosis import fresh_sequences as series
from benchmarks.diagnosis import fresh_tasks as tasks
from benchmarks.diagnosis.kinds_pairs import faulty, pair

partial = functools.partial


def initialization():
    yield from pair(
        "Deep Set that adds up 300 points, momentum",
        "Deep Set that averages 300 points, momentum",
        "initialization",
        make.crowd(),
        knobs=dict(pool="sum"),
        fixes={"change_sum": None},
    )
    yield from pair(
        "heat equation, sines of 20 times the frequency",
        "heat equation, sines of low frequency",
        "initialization",
        make.pinn(),
        knobs=dict(frequency=60.0),
        fixes={"scale_weights": 0.05},
    )
    yield from pair(
        "Q-learning, Haiku's RandomNormal()",
        "Q-learning, Haiku's default weights",
        "initialization",
        make.player(depth=3),
        knobs=dict(weights=hk.initializers.RandomNormal()),
        fixes={"scale_weights": 0.2},
    )
    yield faulty(
        "U-Net, weights with 16 times He's variance, Adam",
        "initialization",
        make.unet(),
        knobs=dict(spread=32.0),
        fixes={"scale_weights": 0.25},
    )
    yield from pair(
        "language model, table of deviation 3 is also the last layer",
        "language model, table of deviation 0.2 is also the last layer",
        "initialization",
        make.writer(),
        knobs=dict(spread=3.0),
        fixes={"scale_weights": 0.07},
    )


def depth():
    yield from pair(
        "maxout network of 14 layers",
        "maxout network of 14 layers with normalization",
        "depth",
        make.rents(flows.maxout, optax.sgd(0.005, 0.9), depth=14, norm=True),
        knobs=dict(norm=False),
        fixes={"normalize": None},
    )
    yield from pair(
        "graph convolutions, 20 residual layers without normalization",
        "graph convolutions, 20 residual layers with normalization",
        "depth",
        make.gcn(optax.sgd(0.01, 0.9), depth=20),
        knobs=dict(layer_norm=False),
        fixes={"normalize": None},
    )
    yield faulty(
        "ResNet of 10 blocks without normalization",
        "depth",
        make.resnet(optax.sgd(0.02, 0.9), blocks=10),
        knobs=dict(norm=False),
        fixes={"normalize": None},
    )


def recurrence():
    yield from pair(
        "IndRNN, recurrent weights from 1.1 to 1.2, 60 steps",
        "IndRNN, recurrent weights from 0.6 to 0.95, 60 steps",
        "recurrence",
        make.forecast(optax.sgd(0.003, 0.9), net=series.independent).but(
            task=partial(tasks.seasons, length=60)
        ),
        knobs=dict(low=1.1, high=1.2),
        fixes={"scale_weights": 0.7},
        other={
            "gate": make.forecast().but(task=partial(tasks.seasons, length=60)),
        },
    )
    yield from pair(
        "stacked LRU, eigenvalues from 1.08 to 1.15",
        "stacked LRU, eigenvalues from 0.5 to 0.95",
        "recurrence",
        make.forecast(net=series.lru, length=64).but(
            task=partial(tasks.seasons, length=64)
        ),
        knobs=dict(low=1.08, high=1.15),
        fixes={"scale_weights": 0.8},
        other={
            "gate": make.forecast().but(task=partial(tasks.seasons, length=64)),
        },
    )
    yield from pair(
        "neural ODE, time in the wrong unit",
        "neural ODE",
        "recurrence",
        make.neural_ode(act="relu"),
        knobs=dict(time=3.0),
    )
    yield from pair(
        "fixed point of a graph convolution, weights of 2.2",
        "fixed point of a graph convolution, weights of 0.5",
        "recurrence",
        make.gcn(net=series.equilibrium),
        knobs=dict(gain=2.2),
        fixes={"scale_weights": 0.23},
    )
    yield from pair(
        "controller, gradient through 40 steps of an unstable cart",
        "controller, gradient through 40 steps of a stable cart",
        "recurrence",
        make.pole(steps=40),
        knobs=dict(drift=0.12),
    )


def activation():
    yield from pair(
        "CryptoNet, squares",
        "CryptoNet, relu",
        "activation",
        make.crypto(),
        knobs=dict(act="square"),
        fixes={"change_activation": None},
    )
    yield from pair(
        "Chebyshev polynomials without tanh",
        "Chebyshev polynomials of tanh",
        "activation",
        make.rents(flows.kan, optax.sgd(0.01, 0.9)),
        knobs=dict(squash=False),
        fixes={"change_activation": None, "normalize": None},
    )
    yield from pair(
        "RealNVP, unbounded scales",
        "RealNVP, scales within tanh",
        "activation",
        make.real_nvp(optax.sgd(0.005, 0.9)),
        knobs=dict(clamp=False),
        fixes={"change_activation": None},
    )
    yield from pair(
        "gated layers, the gate is a square",
        "gated layers, the gate is a sigmoid",
        "activation",
        make.rents(flows.gated, optax.sgd(0.02, 0.9), depth=3),
        knobs=dict(gate="square"),
        fixes={"change_activation": None},
    )


def vanishing():
    yield from pair(
        "12 gated layers without normalization",
        "12 gated layers with normalization",
        "vanishing",
        make.rents(flows.gated, optax.sgd(0.05, 0.9), depth=12, norm=True),
        knobs=dict(norm=False),
        fixes={"normalize": None},
    )
    yield from pair(
        "search ranking, weights of deviation 0.01, 5 layers",
        "search ranking, default weights, 5 layers",
        "vanishing",
        make.search(optax.sgd(0.2, 0.9), depth=5),
        knobs=dict(weights=hk.initializers.RandomNormal(0.01)),
        fixes={"scale_weights": 18.0},
    )
    yield from pair(
        "survival analysis, biases of -6 before relu",
        "survival analysis, biases of 0 before relu",
        "vanishing",
        make.survival(),
        knobs=dict(bias=-6.0),
    )
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.5))
    yield faulty(
        "LSTM, forget gates nearly closed",
        "vanishing",
        make.lstm(clipped, forget=3.0),
        knobs=dict(forget=-4.0),
    )


def scenarios():
    for group in (initialization, depth, recurrence, activation, vanishing):
        yield from group()
