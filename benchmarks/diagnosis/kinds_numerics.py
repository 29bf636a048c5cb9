"""Faults of precision, and values that are not finite."""

import functools

import optax

from benchmarks.diagnosis import frameworks, losses, plain, tasks
from benchmarks.diagnosis import kinds_losses as goals
from benchmarks.diagnosis import kinds_nets as nets
from benchmarks.diagnosis import kinds_tasks as own
from benchmarks.diagnosis.kinds_pairs import pair
from benchmarks.diagnosis.problem import Recipe

partial = functools.partial


def precision():
    stored = nets.cast(plain.mlp, inputs=20, outputs=8, depth=3, width=64)
    yield from pair(
        "MLP stored in bfloat16, Adam",
        "MLP stored in float32, Adam",
        "precision",
        Recipe(stored, own.clusters, optax.adam(2e-4)),
        knobs=dict(dtype="bfloat16"),
        fixes={"float32": None},
    )
    yield from pair(
        "sum of 800 steps in bfloat16, Lion",
        "sum of 800 steps in float32, Lion",
        "precision",
        Recipe(nets.counter, own.counts, optax.lion(1e-3), losses.squared_error),
        knobs=dict(dtype="bfloat16"),
        fixes={"float32": None},
    )


def not_finite():
    yield from pair(
        "binary classifier, log of 1 - p, after 150 steps",
        "binary classifier, from its logits, after 150 steps",
        "not_finite",
        Recipe(
            frameworks.linen_mlp,
            own.two_sides,
            optax.sgd(0.1, 0.9),
            goals.binary,
            dict(inputs=20, outputs=1, depth=2),
        ),
        loss=partial(goals.binary, stable=False),
        mid=150,
        fixes={"stable_log": None},
    )
    yield from pair(
        "distances of all pairs, root of 0, Adam",
        "distances of all pairs, root of at least 1e-6, Adam",
        "not_finite",
        Recipe(
            frameworks.eqx_mlp,
            own.clusters,
            optax.adam(2e-3),
            goals.distances,
            dict(inputs=20, outputs=3, depth=2, act="tanh"),
        ),
        loss=partial(goals.distances, floor=0.0),
        fixes={"add_epsilon": 1e-6},
    )
    yield from pair(
        "Haiku MLP, jnp.where with an untaken NaN, RMSprop",
        "Haiku MLP, the same function without jnp.where, RMSprop",
        "not_finite",
        Recipe(nets.haiku_root, own.table, optax.rmsprop(1e-3), losses.squared_error),
        knobs=dict(act="root_where"),
        fixes={"double_where": None},
    )


def bad_batch():
    segments = Recipe(
        nets.linen_cnn,
        own.regions,
        optax.sgd(0.1, 0.9),
        goals.per_pixel,
        dict(outputs=4, colors=1, pool=False),
    )
    yield from pair(
        "segmentation, label 255 in 1 batch",
        "segmentation, labels below 4",
        "bad_batch",
        segments,
        spoil_batches=tasks.spoiled([5], y=lambda y: y.at[2, :, 0].set(255)),
        fixes={"drop_batches": None},
    )


def scenarios():
    for group in (precision, not_finite, bad_batch):
        yield from group()
