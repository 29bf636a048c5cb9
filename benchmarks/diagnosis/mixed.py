"""Two faults at once: the first remedy must name one of them."""

import optax

from benchmarks.diagnosis import frameworks, losses, plain, recurrent, tasks
from benchmarks.diagnosis.faults_signal import BOTH
from benchmarks.diagnosis.faults_training import LARGEST, at_rate
from benchmarks.diagnosis.problem import fault
from benchmarks.diagnosis.recipes import classes, numbers, past


def scenarios():
    yield fault(
        "MLP, init x1.8 and 1 batch x1000",
        "initialization",
        numbers(plain.mlp, optax.sgd(0.01), depth=8),
        also=("bad_batch",),
        knobs=dict(gain=1.8),
        remedies=BOTH,
        spoil_batches=tasks.spoiled([15], y=lambda y: 1000 * y),
    )
    yield fault(
        "CNN, sum and rate 4x",
        "loss_sum",
        at_rate("momentum cnn", LARGEST["momentum cnn"] / 4),
        also=("learning_rate",),
        loss=losses.sum_cross_entropy,
        optimizer=optax.sgd(4 * LARGEST["momentum cnn"], 0.9),
        held_out=True,
    )
    yield fault(
        "relu MLP of 30 layers, init x1.5",
        "depth",
        classes(plain.mlp, depth=30, norm=True, residual=True),
        also=("initialization",),
        knobs=dict(gain=1.5, norm=False, residual=False),
        remedies=BOTH,
    )
    yield fault(
        "Equinox MLP, slope 2 and init x1.8",
        "activation",
        classes(frameworks.eqx_mlp, depth=8),
        also=("initialization",),
        knobs=dict(act="steep", gain=1.8),
        remedies=("change_activation", *BOTH),
        held_out=True,
    )
    yield fault(
        "linear RNN, growth 1.08 and 1 batch x1000",
        "recurrence",
        past(recurrent.elman, 80, cell="linear", growth=0.95),
        also=("bad_batch",),
        knobs=dict(growth=1.08),
        remedies=("gate", "normalize"),
        spoil_batches=tasks.spoiled([8], y=lambda y: 1000 * y),
    )
    yield fault(
        "Linen tanh MLP, init x3 and rate 40x",
        "initialization",
        classes(frameworks.linen_mlp, 0.05, act="tanh", depth=10),
        also=("learning_rate",),
        knobs=dict(gain=3.0),
        optimizer=optax.sgd(2.0),
        remedies=BOTH,
        held_out=True,
    )
