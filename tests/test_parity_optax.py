"""Optax's and optclip's clips give the same results where Optax is correct.

Random float32 trees of several shapes and depths, with thresholds above and below.
"""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip

SHAPES = {
    "vector": (7,),
    "flat": {"w": (5, 3), "b": (3,), "s": ()},
    "deep": {
        "conv": {"kernel": (3, 3, 2, 4), "bias": (4,)},
        "blocks": [{"w": (6, 5)}, {"w": (6, 5)}, ({"w": (2, 3, 4)}, None)],
        "empty": (0, 3),
    },
}
KERNELS = {"a": (4, 3, 2), "b": (2, 5, 3)}
VOLUMES = {"a": (2, 2, 2, 3, 4), "b": (4,)}
THRESHOLDS = [1e-4, 0.5, 3.0, 1e3]


def is_shape(node):
    return isinstance(node, tuple) and all(isinstance(n, int) for n in node)


def draw(name, seed, low=-2, high=2):
    """Returns a tree whose leaves have very different magnitudes."""
    rng = np.random.default_rng(seed)
    shapes = (SHAPES | {"kernels": KERNELS, "volumes": VOLUMES})[name]

    def leaf(shape):
        size = 10.0 ** rng.uniform(low, high)
        return jnp.asarray(rng.normal(size=shape) * size, jnp.float32)

    return jax.tree.map(leaf, shapes, is_leaf=is_shape)


@functools.lru_cache
def jitted(make):
    """Jits one update as a function of the threshold, so that it is traced once."""

    @jax.jit
    def update(threshold, grads, params):
        tx = make(threshold)
        return tx.update(grads, tx.init(params), params)[0]

    return update


def assert_same_updates(ours, peer, threshold, name):
    params = draw(name, seed=1, low=-4, high=1)
    for seed in (2, 3):
        grads = draw(name, seed)
        mine, theirs = (jitted(m)(threshold, grads, params) for m in (ours, peer))
        chex.assert_trees_all_close(mine, theirs, rtol=1e-6, atol=0)


younger = pytest.mark.skipif(
    "axis" not in inspect.signature(optax.adaptive_grad_clip).parameters,
    reason="this Optax has neither `axis` nor rank five",
)
each_tree = pytest.mark.parametrize("name", SHAPES)
each_threshold = pytest.mark.parametrize("threshold", THRESHOLDS)


@each_tree
@each_threshold
@pytest.mark.parametrize(
    ("ours", "peer"),
    [
        pytest.param(optclip.clip_by_value, optax.clip, id="value"),
        pytest.param(
            optclip.clip_by_global_norm, optax.clip_by_global_norm, id="global_norm"
        ),
        pytest.param(
            optclip.clip_by_block_rms, optax.clip_by_block_rms, id="block_rms"
        ),
    ],
)
def test_clips_match_optax(ours, peer, name, threshold):
    assert_same_updates(ours, peer, threshold, name)


@each_tree
@pytest.mark.parametrize("clipping", [1e-3, 0.1, 1e3])
def test_agc_matches_optax(name, clipping):
    # No leaf has an axis of length one, because Optax squeezes those (fault N22).
    peer = optax.adaptive_grad_clip
    assert_same_updates(optclip.adaptive_grad_clip, peer, clipping, name)


@pytest.mark.parametrize("eps", [1e-3, 1.0])
def test_agc_with_another_floor_matches_optax(eps):
    ours = functools.partial(optclip.adaptive_grad_clip, eps=eps)
    peer = functools.partial(optax.adaptive_grad_clip, eps=eps)
    assert_same_updates(ours, peer, 0.1, "flat")


@younger
@pytest.mark.parametrize("clipping", [0.01, 1e3])
def test_agc_of_rank_five_matches_optax(clipping):
    peer = optax.adaptive_grad_clip
    assert_same_updates(optclip.adaptive_grad_clip, peer, clipping, "volumes")


@younger
@pytest.mark.parametrize("axis", [0, 1, -1, (0, 1), (1, 2)])
def test_agc_over_a_given_axis_matches_optax(axis):
    ours = functools.partial(optclip.adaptive_grad_clip, axis=axis)
    peer = functools.partial(optax.adaptive_grad_clip, axis=axis)
    for clipping in (0.01, 1e3):
        assert_same_updates(ours, peer, clipping, "kernels")


def our_normalization(target):
    return optclip.normalize_by_norm(target, eps=1e-6)


def optax_normalization(target):
    return optax.normalize_by_update_norm(scale_factor=target, eps=1e-6)


@pytest.mark.skipif(
    not hasattr(optax, "normalize_by_update_norm"), reason="this Optax has none"
)
@each_tree
@pytest.mark.parametrize("target", [0.1, 1.0, 20.0])
def test_normalizing_matches_optax(name, target):
    assert_same_updates(our_normalization, optax_normalization, target, name)


def test_norms_match_optax():
    tree = draw("flat", seed=5)
    for order in (1, 2, np.inf):
        ours = optclip.norms.global_norm(tree, ord=order)
        np.testing.assert_allclose(ours, optax.tree.norm(tree, ord=order), rtol=1e-6)
