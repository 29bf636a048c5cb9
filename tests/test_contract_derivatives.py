"""Contract 4: the derivative through a clip is finite everywhere, and right."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import registry

CASES = [n for n in registry.CLIPS if n != "clip-zero"]


def tree(size, dtype):
    rng = np.random.default_rng(3)
    shapes = {"blocks": (2, 2, 2), "w": (3, 2)}
    return {k: np.asarray(rng.normal(size=s) * size, dtype) for k, s in shapes.items()}


@functools.cache
def derivative(name):
    """Returns a jitted (updates, threshold, weights, params) -> (value, gradient)."""
    make = registry.CASES[name].make

    def inner(updates, threshold, weights, params):
        tx = make(threshold)
        out, _ = tx.update(updates, make(1.0).init(params), params)
        return sum(jnp.vdot(w, x) for w, x in zip(
            jax.tree.leaves(weights), jax.tree.leaves(out), strict=True))  # fmt: skip

    return jax.jit(jax.value_and_grad(inner))


@pytest.mark.parametrize("name", CASES)
def test_derivatives_equal_finite_differences(name, x64):
    del x64
    params = jax.tree.map(np.ones_like, tree(1.0, np.float64))
    weights = jax.tree.map(lambda x: np.sin(np.arange(x.size)).reshape(x.shape), params)
    way = jax.tree.map(lambda x: np.cos(np.arange(x.size)).reshape(x.shape), params)
    for size, threshold in ((1.0, 0.3), (1.0, 50.0), (1e150, 0.3)):
        updates, step = tree(size, np.float64), 1e-6 * size
        _, slope = derivative(name)(updates, threshold, weights, params)
        ends = [
            derivative(name)(
                jax.tree.map(lambda x, d, h=s * step: x + h * d, updates, way),
                threshold, weights, params,
            )[0]
            for s in (1, -1)
        ]  # fmt: skip
        wanted = float(ends[0] - ends[1]) / (2 * step)
        got = sum(np.vdot(slope[k], way[k]) for k in way)
        lost = 1e-8 * abs(float(ends[0])) / size  # to rounding, in the difference
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=lost)


@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_finite_everywhere(name):
    ones = jax.tree.map(np.ones_like, tree(1.0, np.float32))
    zeros = jax.tree.map(np.zeros_like, ones)
    half = {"blocks": np.zeros_like(ones["blocks"]), "w": ones["w"]}
    points = [zeros, half, *(tree(s, np.float32) for s in (1e-30, 1.0, 1e30, 1e37))]
    points.append(jax.tree.map(lambda x: np.full_like(x, 3e38), ones))
    for updates in points:
        for threshold in (0.0, 1.0, np.inf):
            tiny = np.max(updates["w"]) < 1e-20
            if name == "normalize_by_norm" and (tiny or threshold == np.inf):
                continue  # its derivative, target / norm, is beyond float32
            _, slope = derivative(name)(updates, np.float32(threshold), ones, ones)
            assert all(np.all(np.isfinite(s)) for s in slope.values()), threshold
            if threshold == np.inf and name != "normalize_by_norm":
                np.testing.assert_array_equal(slope["w"], ones["w"])


@pytest.mark.parametrize("name", ["clip", "clip-leaf", "soft_clip", "clip_by_value"])
def test_the_derivative_at_zero_is_that_of_the_identity(name):
    ones = jax.tree.map(np.ones_like, tree(1.0, np.float32))
    zeros = jax.tree.map(np.zeros_like, ones)
    _, slope = derivative(name)(zeros, np.float32(1.0), ones, ones)
    np.testing.assert_array_equal(slope["w"], ones["w"])
