"""Models that do not learn although their gradients show nothing wrong."""

import functools

import optax

from benchmarks.diagnosis import frameworks, plain, tasks
from benchmarks.diagnosis import kinds_losses as goals
from benchmarks.diagnosis import kinds_nets as nets
from benchmarks.diagnosis import kinds_tasks as own
from benchmarks.diagnosis.kinds_faults import eight, numbers, points
from benchmarks.diagnosis.kinds_pairs import faulty
from benchmarks.diagnosis.problem import Recipe

partial = functools.partial


def scenarios():
    yield faulty(
        "CNN, shuffled labels",
        "unknown",
        Recipe(nets.linen_cnn, own.pictures, optax.sgd(0.01)),
        spoil_batches=own.shuffled,
    )
    yield faulty(
        "MLP, targets of noise",
        "unknown",
        numbers(plain.mlp, optax.adam(2e-3)).but(task=partial(own.table, size=256)),
        spoil_batches=own.only_noise,
    )
    yield faulty(
        "Linen MLP of width 1",
        "unknown",
        points(frameworks.linen_mlp, optax.adamw(5e-3), depth=2, act="tanh"),
        knobs=dict(width=1),
    )
    yield faulty(
        "NNX MLP, the same input in every row",
        "unknown",
        points(frameworks.nnx_mlp, optax.sgd(0.03, 0.9), depth=2),
        spoil_batches=own.repeated,
    )
    yield faulty(
        "policy, entropy bonus of the wrong sign",
        "unknown",
        Recipe(
            plain.mlp,
            eight(tasks.choices),
            optax.adam(3e-3),
            goals.reward_and_entropy,
            dict(inputs=16, outputs=4, depth=2, act="tanh"),
        ),
        loss=partial(goals.reward_and_entropy, sign=-1.0),
        judged=True,
    )
    yield faulty(
        "linear head on frozen features without information",
        "unknown",
        points(nets.frozen_features, optax.sgd(0.05)).but(
            task=partial(own.clusters, size=128),
        ),
        task=partial(own.clusters, size=128, keep=slice(20, None)),
    )
