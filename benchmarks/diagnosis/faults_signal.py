"""Signal faults: initialization, depth, recurrence, activation, vanishing."""

import optax

from benchmarks.diagnosis import frameworks, plain, recurrent
from benchmarks.diagnosis.problem import fault
from benchmarks.diagnosis.recipes import classes, past, scaled, words

BOTH = ("normalize", "residual")


def initialization():
    yield fault(
        "relu MLP, init x2.5",
        "initialization",
        classes(plain.mlp, depth=10),
        knobs=dict(gain=2.5),
        remedies=BOTH,
    )
    yield fault(
        "Equinox gelu MLP, init x3",
        "initialization",
        classes(frameworks.eqx_mlp, act="gelu", depth=7),
        knobs=dict(gain=3.0),
        remedies=BOTH,
        held_out=True,
    )
    yield fault(
        "Linen CNN, init x1.8",
        "initialization",
        classes(frameworks.linen_cnn, depth=8, optimizer=optax.sgd(0.05, 0.9)),
        knobs=dict(gain=1.8),
        remedies=BOTH,
    )
    yield fault(
        "Haiku CNN, init x4",
        "initialization",
        classes(frameworks.haiku_cnn, 0.01),
        knobs=dict(gain=4.0),
        remedies=BOTH,
        held_out=True,
    )
    yield fault(
        "pre-norm transformer, init x6",
        "initialization",
        words(optimizer=optax.adam(1e-3)),
        knobs=dict(gain=6.0),
    )
    yield fault(
        "post-norm transformer, init x5",
        "initialization",
        words(order="post", depth=4, act="relu"),
        knobs=dict(gain=5.0),
        held_out=True,
    )
    yield fault(
        "tanh MLP, init x3",
        "initialization",
        classes(frameworks.linen_mlp, 0.05, act="tanh", depth=12),
        knobs=dict(gain=3.0),
        remedies=BOTH,
    )
    yield fault(
        "NNX MLP, init x6",
        "initialization",
        classes(frameworks.nnx_mlp, depth=5, act="relu"),
        knobs=dict(gain=6.0),
        remedies=("normalize",),
        held_out=True,
    )
    yield fault(
        "relu MLP, weights x2 after 150 steps",
        "initialization",
        classes(plain.mlp, depth=8, width=48, optimizer=optax.sgd(0.01, 0.9)),
        spoil_params=scaled(2.0),
        mid=150,
    )
    yield fault(
        "NNX CNN, weights x1.8 after 150 steps",
        "initialization",
        classes(frameworks.nnx_cnn, depth=8, optimizer=optax.sgd(0.01, 0.9)),
        spoil_params=scaled(1.8),
        mid=150,
        held_out=True,
    )


def depth():
    """Layers that only train with normalization and residual connections."""
    good = dict(norm=True, residual=True)
    bare = dict(norm=False, residual=False)
    yield fault(
        "relu MLP of 40 layers, growth 1.2",
        "depth",
        classes(plain.mlp, depth=40, **good),
        knobs=dict(gain=1.2, **bare),
        remedies=BOTH,
    )
    yield fault(
        "Linen MLP of 40 layers with BatchNorm",
        "depth",
        classes(frameworks.linen_mlp, 0.05, depth=40, norm="batch", residual=True),
        knobs=dict(residual=False),
        remedies=("residual",),
        held_out=True,
    )
    yield fault(
        "50 scanned layers, growth 1.12",
        "depth",
        classes(plain.stacked, depth=50, **good),
        knobs=dict(gain=1.12, **bare),
        remedies=BOTH,
    )
    yield fault(
        "Equinox leaky MLP of 30 layers, growth 1.25",
        "depth",
        classes(frameworks.eqx_mlp, act="leaky", depth=30, **good),
        knobs=dict(gain=1.25, **bare),
        remedies=BOTH,
        held_out=True,
    )
    yield fault(
        "24 residual layers without normalization",
        "depth",
        classes(plain.mlp, depth=24, **good),
        knobs=dict(norm=False),
        remedies=BOTH,
    )
    yield fault(
        "NNX CNN of 30 layers, growth 1.25",
        "depth",
        classes(frameworks.nnx_cnn, depth=30, **good),
        # Zero padding at the edges of an image removes a tenth of the signal per layer.
        knobs=dict(gain=1.35, **bare),
        remedies=BOTH,
        held_out=True,
    )


def recurrence():
    remedies = ("gate", "normalize")
    yield fault(
        "linear RNN, growth 1.05, 150 steps",
        "recurrence",
        past(recurrent.elman, 150, cell="linear", growth=0.95),
        knobs=dict(growth=1.05),
        remedies=remedies,
    )
    yield fault(
        "Linen SimpleCell, growth 3, 60 steps",
        "recurrence",
        past(recurrent.linen_rnn, 60, 0.03),
        knobs=dict(growth=3.0),
        remedies=("gate",),
        held_out=True,
    )
    yield fault(
        "tanh RNN, unrolled, growth 4, 30 steps",
        "recurrence",
        past(recurrent.elman, 30, 0.03, unroll=True),
        knobs=dict(growth=4.0),
        remedies=remedies,
    )
    yield fault(
        "Haiku relu RNN, He's weights x1.35, 60 steps",
        "recurrence",
        past(recurrent.haiku_rnn, 60, 0.003, time_major=True, growth=0.9),
        knobs=dict(growth=1.35),
        remedies=("gate",),
        held_out=True,
    )
    yield fault(
        "leaky RNN, growth 1.2, 120 steps",
        "recurrence",
        past(recurrent.elman, 120, 0.003, cell="leaky", growth=0.95),
        knobs=dict(growth=1.2),
        remedies=remedies,
    )
    yield fault(
        "linear RNN, unrolled, growth 1.5, 25 steps",
        "recurrence",
        past(recurrent.elman, 25, cell="linear", unroll=True, growth=0.9, width=24),
        knobs=dict(growth=1.5),
        remedies=remedies,
        held_out=True,
    )
    yield fault(
        "linear RNN, recurrent weights x1.15 after 150 steps",
        "recurrence",
        past(recurrent.elman, 80, cell="linear", growth=0.95, width=24),
        spoil_params=scaled(1.15, "recur"),
        mid=150,
    )
    yield fault(
        "state-space model, growth 1.06, 200 steps",
        "recurrence",
        past(recurrent.diagonal, 200, 3e-4, growth=0.95),
        knobs=dict(growth=1.06),
        remedies=remedies,
        held_out=True,
    )


def activation():
    remedies = ("change_activation", "normalize")
    yield fault(
        "MLP with x**2",
        "activation",
        classes(plain.mlp, depth=6, init="relu"),
        knobs=dict(act="square"),
        remedies=remedies,
    )
    yield fault(
        "Linen MLP with x**3",
        "activation",
        classes(frameworks.linen_mlp, depth=4),
        knobs=dict(act="cube"),
        remedies=remedies,
        held_out=True,
    )
    yield fault(
        "Equinox MLP, leaky with slope 2",
        "activation",
        classes(frameworks.eqx_mlp, depth=10),
        knobs=dict(act="steep"),
        remedies=remedies,
    )
    yield fault(
        "Haiku MLP with softplus**2",
        "activation",
        classes(frameworks.haiku_mlp, sizes=(48, 48, 32, 32, 32, 10)),
        knobs=dict(act="softplus2", init="relu"),
        remedies=remedies,
        held_out=True,
    )
    yield fault(
        "MLP with exp",
        "activation",
        classes(plain.mlp, depth=4, init="relu"),
        knobs=dict(act="exp"),
        remedies=remedies,
    )
    yield fault(
        "NNX CNN with sinh",
        "activation",
        classes(frameworks.nnx_cnn, 0.05, depth=6),
        knobs=dict(act="sinh"),
        remedies=remedies,
        held_out=True,
    )


def vanishing():
    yield fault(
        "sigmoid MLP of 12 layers",
        "vanishing",
        classes(plain.mlp, 0.05, depth=12, norm=True, residual=True, act="tanh"),
        knobs=dict(act="sigmoid", norm=False, residual=False),
        remedies=("change_activation", *BOTH),
    )
    yield fault(
        "Linen tanh MLP, init x0.3",
        "vanishing",
        classes(frameworks.linen_mlp, 0.05, act="tanh", depth=14),
        knobs=dict(gain=0.3),
        remedies=BOTH,
        held_out=True,
    )
    yield fault(
        "30 scanned layers, init x0.6",
        "vanishing",
        classes(plain.stacked, 0.05, depth=30),
        knobs=dict(gain=0.6),
        remedies=BOTH,
    )
    yield fault(
        "Haiku CNN, init x0.25",
        "vanishing",
        classes(frameworks.haiku_cnn, depth=8),
        knobs=dict(gain=0.25),
        remedies=BOTH,
        held_out=True,
    )


def scenarios():
    for group in (initialization, depth, recurrence, activation, vanishing):
        yield from group()
