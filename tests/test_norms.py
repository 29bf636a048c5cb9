"""Norms compared with long doubles: every order and magnitude, and edge cases."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import registry

from optclip import norms

ORDERS = [1, 1.5, 2, 3, np.inf, "rms"]
KINDS = ["f32", "bf16", "f16", "f8_e5m2", "mixed"]


@pytest.fixture(scope="module")
def measure():
    """Returns one compiled function per kind of tree that computes all its norms."""
    return jax.jit(
        lambda tree: {
            str(p): (
                norms.global_norm(tree, ord=p),
                norms.leaf_norms(tree, ord=p),
                norms.unit_norms(tree, ord=p),
            )
            for p in ORDERS
        }
    )


def check(measured, tree, rtol=1e-6):
    leaves = jax.tree.leaves(tree)
    for p in ORDERS:
        whole, each, units = measured[str(p)]
        limit = float(jnp.finfo(whole.dtype).max)
        wanted = float(min(oracle.tree_norm(leaves, p), limit))
        np.testing.assert_allclose(whole, wanted, rtol=rtol, err_msg=str(p))
        for x, n, u in zip(
            leaves, jax.tree.leaves(each), jax.tree.leaves(units), strict=True
        ):
            wanted = float(min(oracle.tree_norm([x], p), limit))
            np.testing.assert_allclose(n, wanted, rtol=rtol, err_msg=str(p))
            (ids,) = oracle.groups("unit", None, [""], [x.shape])
            for g, value in enumerate(np.ravel(u)):
                wanted = float(min(oracle.norm(oracle.wide(x)[ids == g], p), limit))
                np.testing.assert_allclose(value, wanted, rtol=rtol, err_msg=str(p))


@pytest.mark.parametrize("kind", KINDS)
def test_norms_are_accurate_at_every_size(kind, measure):
    sizes = {
        "f32": (1e-30, 1.0, 1e25, 1e37), "bf16": (1e-30, 1.0, 1e37),
        "f16": (1e-6, 1.0, 300.0), "f8_e5m2": (1e-3, 300.0), "mixed": (1e-2, 300.0),
    }[kind]  # fmt: skip
    for size in sizes:
        tree = registry.normal_tree(kind, size)
        check(measure(tree), tree)


def test_norms_of_leaves_with_very_different_magnitudes_are_accurate(measure):
    tree = registry.normal_tree("f32", 1.0)
    tree["blocks"] = tree["blocks"] * np.float32(1e30)
    tree["head"]["bias"] = tree["head"]["bias"] * np.float32(1e-25)
    tree["blocks"][0, 0, 0] = 1e-28
    check(measure(tree), tree)


@pytest.mark.parametrize("size", [1e-200, 1.0, 1e200])
def test_float64_norms_are_accurate_to_1e_12(size, measure, x64):
    del x64
    tree = registry.normal_tree("f64", size)
    check(measure(tree), tree, rtol=1e-12)


def test_norms_of_complex_entries_use_their_magnitude():
    tree = [jnp.array([3 + 4j, 1e30j], jnp.complex64), jnp.array([0j])]
    for p in ORDERS:
        wanted = float(oracle.tree_norm(tree, p))
        np.testing.assert_allclose(norms.global_norm(tree, ord=p), wanted, rtol=1e-6)


@pytest.mark.parametrize("ord", ORDERS)
def test_empty_trees_and_leaves_have_norm_zero(ord):
    for tree in ((), [], {"a": None}, [jnp.zeros((0, 3))], [jnp.zeros(2)]):
        assert float(norms.global_norm(tree, ord=ord)) == 0
    assert norms.global_norm(()).dtype == jnp.float32


def test_norms_ignore_non_gradient_leaves():
    tree = {"n": jnp.arange(5), "x": jnp.array([3.0, 4.0]), "f": jnp.array([True])}
    assert float(norms.global_norm(tree)) == 5
    each = norms.leaf_norms(tree)
    assert float(each["x"]) == 5
    assert each["n"] is tree["n"]


def test_nan_or_inf_makes_the_norm_nan_or_inf():
    for value in (np.nan, np.inf, -np.inf):
        for p in ORDERS:
            norm = float(norms.global_norm([jnp.array([1.0, value]), 2.0], ord=p))
            assert not np.isfinite(norm)
            each = norms.leaf_norms({"a": jnp.array([1.0, value]), "b": 2.0}, ord=p)
            assert float(each["b"]) == 2


def test_norm_beyond_float32_saturates_at_the_largest_float32():
    tree = [jnp.full(100, 3e38, jnp.float32)]
    for p in (1, 2, 3):
        assert norms.global_norm(tree, ord=p) == jnp.finfo(jnp.float32).max


@pytest.mark.parametrize("ord", ORDERS)
def test_derivative_at_zero_is_zero(ord):
    slope = jax.grad(lambda x: norms.global_norm(x, ord=ord))(jnp.zeros(3))
    assert np.all(np.isfinite(slope))
    if ord not in (1, np.inf):
        np.testing.assert_array_equal(slope, np.zeros(3))


@pytest.mark.parametrize("ord", [0, 0.5, -1, np.nan, "two", None, True, jnp.float32(2)])
def test_other_orders_are_errors(ord):
    with pytest.raises(ValueError, match="`ord` must be a number >= 1"):
        norms.global_norm(jnp.ones(2), ord=ord)


@pytest.mark.parametrize("axis", [0, 1, (0, 1), {"w": 1}, lambda path: -1])
def test_unit_norms_reduce_over_the_given_axes(axis):
    x = jnp.arange(6.0).reshape(2, 3)
    axes = {0: 0, 1: 1, (0, 1): (0, 1)}.get(
        axis if not callable(axis) and not isinstance(axis, dict) else None, 1
    )
    got = norms.unit_norms({"w": x}, axis=axis)["w"]
    np.testing.assert_allclose(
        got,
        np.linalg.norm(x, axis=axes) if axes != (0, 1) else np.linalg.norm(x.ravel()),
        rtol=1e-6,
    )
