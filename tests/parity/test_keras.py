"""Keras 3 on JAX: `clipnorm`, `global_clipnorm` and `clipvalue` of an optimizer."""

import os

import numpy as np
import optax
import pytest
from trees import SHAPES, SIZES, assert_same, draw, imported, updates_of

import optclip

os.environ.setdefault("KERAS_BACKEND", "jax")
keras = imported("keras")

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(keras.backend.backend() != "jax", reason="Keras not on JAX"),
]


def steps_of(grads, steps=1, **options):
    """Returns how far Keras's SGD with a learning rate of 1 moves zero parameters."""
    made = [keras.Variable(np.zeros(shape, np.float32)) for shape in SHAPES.values()]
    optimizer = keras.optimizers.SGD(1.0, **options)
    for _ in range(steps):
        optimizer.apply(list(grads.values()), made)
    values = [keras.ops.convert_to_numpy(x) for x in made]
    return dict(zip(SHAPES, values, strict=True))


CLIPS = {
    "clipnorm": optclip.clip_by_leaf_norm,
    "global_clipnorm": optclip.clip_by_global_norm,
    "clipvalue": optclip.clip_by_value,
}
each_clip = pytest.mark.parametrize("name", CLIPS)


@each_clip
@pytest.mark.parametrize("size", SIZES)
def test_optimizer_with_a_clip(name, size):
    grads = draw(size)
    tx = optax.chain(CLIPS[name](0.5), optax.sgd(1.0))
    assert_same(updates_of(tx, grads), steps_of(grads, **{name: 0.5}))


@each_clip
def test_zero_disables_clipping_in_keras_but_gives_zeros_in_optclip(name):
    grads = draw(3.0)
    off = optax.chain(CLIPS[name](np.inf), optax.sgd(1.0))
    assert_same(updates_of(off, grads), steps_of(grads, **{name: 0.0}))
    zeros = updates_of(CLIPS[name](0.0), grads)
    assert not any(np.any(x) for x in zeros.values())


@each_clip
def test_mean_of_accumulated_gradients_is_clipped(name):
    grads = draw(3.0)
    options = {name: 0.5, "gradient_accumulation_steps": 2}
    inner = optax.chain(CLIPS[name](0.5), optax.sgd(1.0))
    tx = optax.MultiSteps(inner, 2)
    state = tx.init(grads)
    for _ in range(2):
        ours, state = tx.update(grads, state)
    assert_same(ours, steps_of(grads, steps=2, **options))
