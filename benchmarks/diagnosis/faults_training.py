"""Training faults: learning rate, batches, dtype, and a summed loss."""

import functools

import jax.numpy as jnp
import optax

from benchmarks.diagnosis import attention, frameworks, losses, plain, recurrent, tasks
from benchmarks.diagnosis.problem import Recipe, fault
from benchmarks.diagnosis.recipes import classes, numbers, past, words

# The largest rate that trains, found by `check_truth --rates` on a grid of factor 2.
LARGEST = {
    "sgd mlp": 0.5,
    "momentum cnn": 0.03125,
    "adam transformer": 0.03125,
    "adamw transformer": 0.03125,
    "rmsprop mlp": 0.03125,
    "adam mixer": 0.5,
    "momentum resnet": 0.125,
    "adam gru": 0.0625,
    "sgd linear": 0.25,
}
RECIPES = {
    "sgd mlp": (optax.sgd, classes(plain.mlp, depth=5)),
    "momentum cnn": (
        lambda rate: optax.sgd(rate, 0.9),
        classes(frameworks.haiku_cnn, depth=4),
    ),
    "adam transformer": (optax.adam, words()),
    "adamw transformer": (optax.adamw, words(order="post", depth=2, act="relu")),
    "rmsprop mlp": (optax.rmsprop, classes(frameworks.eqx_mlp, act="tanh", depth=4)),
    "adam mixer": (optax.adam, classes(attention.mixer)),
    "momentum resnet": (
        lambda rate: optax.sgd(rate, 0.9),
        classes(frameworks.linen_cnn, norm="batch", residual=True),
    ),
    "adam gru": (optax.adam, past(frameworks.eqx_gru, 40)),
    "sgd linear": (
        optax.sgd,
        Recipe(plain.linear, tasks.vectors, optax.sgd(0.1), losses.squared_error),
    ),
}


def at_rate(key, rate):
    """Returns the recipe with this learning rate."""
    make, recipe = RECIPES[key]
    return recipe.but(optimizer=make(rate))


def too_high(name, key, times, **how):
    largest = LARGEST[key]
    make, _ = RECIPES[key]
    optimizer = make(times * largest)
    recipe = at_rate(key, largest / 4)
    return fault(name, "learning_rate", recipe, optimizer=optimizer, **how)


def learning_rate():
    yield too_high("MLP, SGD, rate 5x", "sgd mlp", 5)
    yield too_high("Haiku CNN, momentum, rate 5x", "momentum cnn", 5, held_out=True)
    yield too_high("transformer, Adam, rate 10x", "adam transformer", 10)
    yield too_high(
        "post-norm transformer, AdamW, rate 10x", "adamw transformer", 10, held_out=True
    )
    yield too_high("Equinox MLP, RMSprop, rate 100x", "rmsprop mlp", 100)
    yield too_high("MLP-Mixer, Adam, rate 10x", "adam mixer", 10, held_out=True)
    yield too_high(
        "Linen ResNet, momentum, rate 10x after 150 steps",
        "momentum resnet",
        10,
        mid=150,
    )
    yield too_high(
        "Equinox GRU, Adam, rate 5x after 150 steps",
        "adam gru",
        5,
        mid=150,
        held_out=True,
    )
    yield too_high(
        "transformer, Adam, rate 5x after 150 steps", "adam transformer", 5, mid=150
    )
    yield too_high(
        "linear regression, SGD, rate 100x", "sgd linear", 100, held_out=True
    )


def bad_batch():
    yield fault(
        "MLP, 1 batch with targets x1000",
        "bad_batch",
        numbers(plain.mlp, depth=4),
        spoil_batches=tasks.spoiled([17], y=lambda y: 1000 * y),
    )
    yield fault(
        "Linen CNN, NaN in 1 picture",
        "bad_batch",
        classes(frameworks.linen_cnn, 0.1, depth=4, norm="batch"),
        spoil_batches=tasks.spoiled([9], x=lambda x: x.at[3, 2, 2].set(jnp.nan)),
        held_out=True,
    )
    yield fault(
        "Equinox MLP, inf in 2 batches",
        "bad_batch",
        classes(frameworks.eqx_mlp, depth=5, act="gelu"),
        spoil_batches=tasks.spoiled([4, 20], x=lambda x: x.at[0].set(jnp.inf)),
    )
    yield fault(
        "Haiku CNN, 3 batches of 0 to 255",
        "bad_batch",
        classes(frameworks.haiku_cnn, 0.01, depth=4),
        spoil_batches=tasks.spoiled([2, 11, 12], x=lambda x: 255 * x),
        held_out=True,
    )
    yield fault(
        "Haiku LSTM, 1 batch x1000 after 150 steps",
        "bad_batch",
        past(recurrent.haiku_rnn, 40, time_major=True, cell="lstm").but(
            optimizer=optax.sgd(0.1)
        ),
        spoil_batches=tasks.spoiled([13], y=lambda y: 1000 * y),
        mid=150,
    )
    yield fault(
        "NNX MLP, NaN in 2 targets after 150 steps",
        "bad_batch",
        numbers(frameworks.nnx_mlp, optax.adam(1e-3), depth=3),
        spoil_batches=tasks.spoiled([5, 6], y=lambda y: y.at[7].set(jnp.nan)),
        mid=150,
        held_out=True,
    )


def overflow():
    half = dict(dtype="float16")
    unscaled = optax.chain(optax.scale(2.0**-24), optax.adam(3e-3))
    yield fault(
        "MLP in float16, its own softmax",
        "overflow",
        classes(plain.mlp, 0.005, depth=3).but(
            loss=functools.partial(losses.own_softmax, temperature=8.0)
        ),
        knobs=half,
        remedies=("float32",),
    )
    yield fault(
        "Haiku CNN in float16, pixels of 0 to 255",
        "overflow",
        classes(frameworks.haiku_cnn, norm=True, depth=4).but(
            task=functools.partial(tasks.images, scale=255.0)
        ),
        knobs=half,
        remedies=("float32",),
        held_out=True,
    )
    yield fault(
        "transformer in float16, loss x2**24",
        "overflow",
        words(depth=1).but(
            loss=functools.partial(losses.next_token, scale=2.0**24),
            optimizer=unscaled,
        ),
        knobs=half,
        remedies=("float32",),
    )
    yield fault(
        "transformer in float16, mask of -1e9",
        "overflow",
        words(order="post", depth=2, mask_value=-1e9),
        knobs=half,
        remedies=("float32",),
        held_out=True,
    )
    yield fault(
        "MLP in float16, inputs x3000 after 150 steps",
        "overflow",
        numbers(plain.mlp, depth=4, norm=True),
        spoil_batches=tasks.spoiled(range(tasks.COUNT), x=lambda x: 3000 * x),
        knobs=half,
        mid=150,
        remedies=("float32",),
    )
    yield fault(
        "Linen MLP in float16, loss x2**24 after 150 steps",
        "overflow",
        numbers(frameworks.linen_mlp, unscaled, depth=3).but(
            loss=functools.partial(losses.squared_error, scale=2.0**24)
        ),
        knobs=half,
        mid=150,
        remedies=("float32",),
        held_out=True,
    )


def loss_sum():
    yield fault(
        "MLP, sum over 64 examples",
        "loss_sum",
        classes(plain.mlp, 0.02, depth=4).but(
            task=functools.partial(tasks.images, size=64)
        ),
        loss=losses.sum_cross_entropy,
    )
    yield fault(
        "transformer, SGD, sum over examples and words",
        "loss_sum",
        words(optimizer=optax.sgd(0.1, 0.9)),
        loss=losses.sum_next_token,
        held_out=True,
    )
    yield fault(
        "Linen CNN, sum over 32 examples after 150 steps",
        "loss_sum",
        classes(frameworks.linen_cnn, depth=4, optimizer=optax.sgd(0.02, 0.9)),
        loss=losses.sum_cross_entropy,
        mid=150,
    )
    yield fault(
        "Haiku autoencoder, sum over examples and pixels",
        "loss_sum",
        classes(frameworks.haiku_mlp, 0.1, sizes=(32, 8, 32, 64), act="tanh").but(
            loss=losses.reconstruction
        ),
        loss=losses.sum_reconstruction,
        held_out=True,
    )


def scenarios():
    for group in (learning_rate, bad_batch, overflow, loss_sum):
        yield from group()
