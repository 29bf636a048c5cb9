"""TensorFlow's `clip_by_global_norm`, `clip_by_norm` and `clip_by_value`."""

import numpy as np
import pytest
from trees import SHAPES, SIZES, assert_same, draw, imported, updates_of

import optclip

tf = imported("tensorflow")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
each_size = pytest.mark.parametrize("size", SIZES)


def tensors(grads):
    return [tf.constant(x) for x in grads.values()]


def named(arrays):
    return {name: x.numpy() for name, x in zip(SHAPES, arrays, strict=True)}


@each_size
@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 1.0])
def test_clip_by_global_norm(size, clip_norm):
    grads = draw(size)
    theirs, norm = tf.clip_by_global_norm(tensors(grads), clip_norm)
    tx = optclip.clip_by_global_norm(clip_norm)
    ours, state = tx.update(grads, tx.init(grads))
    assert_same(ours, named(theirs))
    np.testing.assert_allclose(state.norm_before, norm.numpy(), rtol=1e-6)


@each_size
def test_clip_by_norm_of_each_tensor(size):
    grads = draw(size)
    theirs = [tf.clip_by_norm(x, 0.5) for x in tensors(grads)]
    assert_same(updates_of(optclip.clip_by_leaf_norm(0.5), grads), named(theirs))


@each_size
def test_clip_by_norm_over_axes(size):
    grads = draw(size)["w"]
    theirs = tf.clip_by_norm(tf.constant(grads), 0.2, axes=[1]).numpy()
    ours = updates_of(optclip.clip_by_unit_norm(0.2, axis=1), grads)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@each_size
def test_clip_by_value(size):
    grads = draw(size)
    theirs = [tf.clip_by_value(x, -0.1, 0.3) for x in tensors(grads)]
    assert_same(updates_of(optclip.clip_by_value((-0.1, 0.3)), grads), named(theirs))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_nonfinite_entry_makes_all_tensorflow_gradients_nan_but_not_optclip(bad):
    grads = draw(3.0)
    grads["w"][1, 1] = bad
    theirs, _ = tf.clip_by_global_norm(tensors(grads), 1.0)
    assert all(np.isnan(x.numpy()).all() for x in theirs)
    assert_same(updates_of(optclip.clip_by_global_norm(1.0), grads), grads)
