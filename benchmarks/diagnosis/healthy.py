"""Models with nothing wrong: at the start, during training, and near their minimum."""

import functools

import optax

from benchmarks.diagnosis import attention, frameworks, losses, plain, recurrent, tasks
from benchmarks.diagnosis.problem import Recipe, Scenario
from benchmarks.diagnosis.recipes import classes, numbers, past, words


def healthy(name, recipe, after=0, held_out=False):
    make = recipe.after(after) if after else recipe
    return Scenario(name, "healthy", make, recipe, (), held_out)


def scenarios():
    yield healthy("pre-norm transformer", words())
    yield healthy(
        "post-norm transformer, AdamW",
        words(order="post", act="relu", optimizer=optax.adamw(2e-3)),
        held_out=True,
    )
    yield healthy(
        "Linen CNN with BatchNorm", classes(frameworks.linen_cnn, 0.1, norm="batch")
    )
    yield healthy(
        "NNX CNN with GroupNorm",
        classes(frameworks.nnx_cnn, norm=True, optimizer=optax.adam(2e-3)),
        held_out=True,
    )
    yield healthy(
        "Haiku LSTM",
        past(recurrent.haiku_rnn, 60, time_major=True, cell="lstm").but(
            optimizer=optax.adam(3e-3)
        ),
    )
    yield healthy(
        "Equinox GRU",
        past(frameworks.eqx_gru, 60).but(optimizer=optax.rmsprop(1e-3)),
        held_out=True,
    )
    yield healthy("MLP-Mixer", classes(attention.mixer, optimizer=optax.adam(2e-3)))
    yield healthy(
        "Haiku autoencoder",
        classes(
            frameworks.haiku_mlp,
            sizes=(32, 8, 32, 64),
            act="gelu",
            optimizer=optax.adam(2e-3),
        ).but(loss=losses.reconstruction),
        held_out=True,
    )
    policy = dict(inputs=16, outputs=4, depth=2, act="tanh")
    yield healthy(
        "policy network",
        Recipe(
            plain.mlp, tasks.choices, optax.adam(1e-3), losses.policy_gradient, policy
        ),
    )
    yield healthy(
        "Linen ResNet, momentum, after 150 steps",
        classes(
            frameworks.linen_cnn,
            norm="batch",
            residual=True,
            optimizer=optax.sgd(0.02, 0.9),
        ),
        after=150,
        held_out=True,
    )
    yield healthy(
        "linear regression from zero",
        Recipe(plain.linear, tasks.vectors, optax.sgd(0.05), losses.squared_error),
    )
    yield healthy(
        "logistic regression, heavy tails",
        Recipe(plain.linear, tasks.two_classes, optax.sgd(0.05), knobs=dict(outputs=2)),
        held_out=True,
    )
    yield healthy(
        "embeddings, after 100 steps",
        Recipe(plain.embedding, tasks.pairs, optax.adam(1e-2), losses.squared_error),
        after=100,
    )
    yield healthy(
        "Linen tanh MLP of 20 layers, Xavier",
        classes(frameworks.linen_mlp, 0.05, act="tanh", depth=20),
        held_out=True,
    )
    # After 400 steps the sharpest curvature times the rate is 2.1; 2 is the stability
    # limit.
    one = functools.partial(_one_batch, size=256)
    yield healthy(
        "tanh MLP, all data at once, at the edge of stability",
        numbers(plain.mlp, optax.sgd(0.3), depth=3, act="tanh").but(task=one),
        after=400,
    )
    yield healthy(
        "NNX MLP, Adam, near its floor",
        numbers(frameworks.nnx_mlp, optax.adam(1e-3), depth=2),
        after=3000,
        held_out=True,
    )
    yield healthy(
        "Elman RNN of rotations, momentum, after 150 steps",
        past(recurrent.elman, 50, growth=0.95).but(optimizer=optax.sgd(0.01, 0.9)),
        after=150,
    )
    yield healthy(
        "scanned pre-norm transformer, after 150 steps",
        words(scanned=True, depth=6, optimizer=optax.adamw(2e-3)),
        after=150,
        held_out=True,
    )
    yield healthy(
        "pre-norm transformer, near its floor",
        words(depth=2, optimizer=optax.adam(2e-3)),
        after=1500,
    )
    yield healthy(
        "MLP in float16", classes(plain.mlp, depth=4, dtype="float16"), held_out=True
    )


def _one_batch(seed, size):
    return [tasks.vectors(seed, size)[0]] * tasks.COUNT
