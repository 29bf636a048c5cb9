"""Hand-computed examples for the public clips, and errors for invalid arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import registry
from jax.experimental import checkify

import optclip
from optclip import scopes

GRADS = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([[0.0, 6.0], [0.0, 8.0]])}


def clipped(tx, updates=GRADS, params=None):
    return jax.jit(tx.update)(updates, tx.init(updates), params)[0]


def close(got, a, b):
    np.testing.assert_allclose(got["a"], a, rtol=1e-6)
    np.testing.assert_allclose(got["b"], b, rtol=1e-6)


def test_clip_by_global_norm():
    norm = np.sqrt(125.0)
    close(clipped(optclip.clip_by_global_norm(norm / 2)), [1.5, 2], [[0, 3], [0, 4]])
    got = clipped(optclip.clip_by_global_norm(1.0, ord=1))
    close(got, np.array([3, 4]) / 21, np.array([[0, 6], [0, 8]]) / 21)
    got = clipped(optclip.clip_by_global_norm(4.0, ord=np.inf))
    close(got, [1.5, 2], [[0, 3], [0, 4]])


def test_clip_by_leaf_norm():
    close(clipped(optclip.clip_by_leaf_norm(5.0)), [3, 4], [[0, 3], [0, 4]])


def test_clip_by_unit_norm():
    close(clipped(optclip.clip_by_unit_norm(5.0)), [3, 4], [[0, 3], [0, 4]])
    got = clipped(optclip.clip_by_unit_norm(3.0, axis={"b": 1}))
    close(got, [1.8, 2.4], [[0, 3], [0, 3]])


def test_clip_per_layer():
    got = clipped(optclip.clip_per_layer(3.0, {"b": 1}))
    close(got, [1.8, 2.4], [[0, 3], [0, 3]])


def test_clip_by_block_rms():
    got = clipped(optclip.clip_by_block_rms(2.5))
    close(got, np.array([3, 4]) * 2.5 / np.sqrt(12.5), [[0, 3], [0, 4]])


def test_clip_by_value():
    close(clipped(optclip.clip_by_value(3.5)), [3, 3.5], [[0, 3.5], [0, 3.5]])
    close(clipped(optclip.clip_by_value((1.0, 3.5))), [3, 3.5], [[1, 3.5], [1, 3.5]])
    got = clipped(optclip.clip_by_value(1.0), {"z": jnp.array([3 + 4j, 0.1j])})["z"]
    np.testing.assert_allclose(got, [0.6 + 0.8j, 0.1j], rtol=1e-6)


def test_adaptive_grad_clip():
    params = {"a": jnp.array([0.0, 10.0]), "b": jnp.array([[1.0, 0.0], [0.0, 0.0]])}
    got = clipped(optclip.adaptive_grad_clip(0.25, eps=4.0), params=params)
    close(got, [1.5, 2.0], [[0, 0.6], [0, 0.8]])


def test_normalize_by_norm():
    close(clipped(optclip.normalize_by_norm(10.0, scope=scopes.leaf())), [6, 8],
          [[0, 6], [0, 8]])  # fmt: skip
    got = clipped(optclip.normalize_by_norm(6.0, eps=1.0, scope=scopes.leaf()))
    np.testing.assert_allclose(got["a"], [3, 4], rtol=1e-6)


@pytest.mark.parametrize("kind", ["rational", "tanh", "atan", "sqrt"])
def test_soft_clip(kind):
    f = {
        "rational": 0.5, "tanh": np.tanh(1), "atan": 2 / np.pi * np.arctan(np.pi / 2),
        "sqrt": np.sqrt(0.5),
    }[kind]  # fmt: skip
    got = clipped(optclip.soft_clip(5.0, kind=kind, scope=scopes.leaf()))
    np.testing.assert_allclose(got["a"], np.array([3, 4]) * f, rtol=1e-6)


def test_arrays_give_each_leaf_a_separate_threshold():
    tx = optclip.clip_by_leaf_norm(jnp.array([2.5, 100.0]))
    close(clipped(tx), [1.5, 2], GRADS["b"])


def test_clip_grad_norm_matches_torch():
    got, norm = optclip.clip_grad_norm(GRADS, 1.0)
    np.testing.assert_allclose(norm, np.sqrt(125), rtol=1e-6)
    np.testing.assert_allclose(got["a"], np.array([3, 4]) / (np.sqrt(125) + 1e-6))
    got, norm = optclip.clip_grad_norm(GRADS, 100.0, norm_type=np.inf)
    assert float(norm) == 8
    close(got, GRADS["a"], GRADS["b"])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_clip_grad_norm_of_nonfinite_gradients_matches_torch(value):
    grads = {"a": jnp.array([value, 1.0]), "n": jnp.arange(2)}
    got, norm = optclip.clip_grad_norm(grads, 1.0)
    wanted = [np.nan, np.nan] if np.isnan(value) else [np.nan, 0.0]
    np.testing.assert_array_equal(got["a"], wanted)
    np.testing.assert_array_equal(norm, value)
    np.testing.assert_array_equal(got["n"], [0, 1])


def test_clip_grad_norm_of_infinite_gradients_with_max_norm_inf_is_nan_as_in_torch():
    # Torch multiplies by inf / (inf + 1e-6).
    grads = {"a": jnp.array([np.inf, 1.0]), "b": jnp.zeros(1), "n": jnp.arange(2)}
    for bound in (np.inf, jnp.float32(np.inf)):
        got, norm = optclip.clip_grad_norm(grads, bound)
        np.testing.assert_array_equal(got["a"], [np.nan, np.nan])
        np.testing.assert_array_equal(got["b"], [np.nan])
        np.testing.assert_array_equal(got["n"], [0, 1])
        assert float(norm) == np.inf
    got, _ = optclip.clip_grad_norm({"a": jnp.ones(2)}, np.inf)
    np.testing.assert_array_equal(got["a"], [1, 1])


def test_clip_grad_norm_raises_eagerly_and_through_checkify():
    bad = jnp.array([np.nan])
    with pytest.raises(checkify.JaxRuntimeError, match="is nan, so they can't"):
        optclip.clip_grad_norm(bad, 1.0, error_if_nonfinite=True)

    def run(grads):
        return optclip.clip_grad_norm(grads, 1.0, error_if_nonfinite=True)

    error, _ = jax.jit(checkify.checkify(run))(bad)
    assert "is nan" in error.get()
    error, (got, _) = jax.jit(checkify.checkify(run))(jnp.array([0.5]))
    assert error.get() is None
    np.testing.assert_array_equal(got, [0.5])


def test_clip_grad_value_matches_torch():
    got = optclip.clip_grad_value(jnp.array([-3.0, 0.5, np.inf, np.nan]), 1.0)
    np.testing.assert_array_equal(got, [-1, 0.5, 1, np.nan])


@pytest.mark.parametrize("function", [optclip.clip_grad_norm, optclip.clip_grad_value])
def test_swapped_arguments_raise_an_error(function):
    with pytest.raises(TypeError, match=r"got a dict\. .* the gradients come first"):
        function(1.0, {"w": jnp.ones(3)})


FIRST = {
    "clip_by_value": "max_value", "clip_by_global_norm": "max_norm",
    "clip_by_leaf_norm": "max_norm", "clip_per_layer": "max_norm",
    "clip_by_unit_norm": "max_norm", "clip_by_block_rms": "threshold",
    "adaptive_grad_clip": "ratio|clipping", "normalize_by_norm": "target",
    "soft_clip": "max_norm", "clip": "value|rule",
}  # fmt: skip


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("value", [-1.0, np.nan])
def test_negative_and_nan_thresholds_are_errors(name, value):
    with pytest.raises(ValueError, match=f"`({FIRST[name]})` must be >= 0, got"):
        registry.CASES[name].make(value)


def test_error_names_the_given_argument():
    with pytest.raises(ValueError, match=r"`clipping` must be >= 0, got -1\.0"):
        optclip.adaptive_grad_clip(-1.0)
    with pytest.raises(ValueError, match=r"`eps` must be >= 0, got -1\.0"):
        optclip.adaptive_grad_clip(eps=-1.0)


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("value", ["1.0", None, True])
def test_non_numeric_thresholds_raise_errors(name, value):
    with pytest.raises(TypeError, match="must be a number >= 0, got"):
        registry.CASES[name].make(value)


@pytest.mark.parametrize("name", FIRST)
def test_unknown_policies_are_errors(name):
    message = (
        "`nonfinite` must be one of 'propagate', 'zero', 'drop', 'skip', got 'ignore'"
    )
    with pytest.raises(ValueError, match=message):
        registry.CASES[name].make(1.0, nonfinite="ignore")


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("dtype", [jnp.int32, "float33", jnp.complex64])
def test_other_update_dtypes_are_errors(name, dtype):
    with pytest.raises(ValueError, match="`update_dtype` must be a floating dtype"):
        registry.CASES[name].make(1.0, update_dtype=dtype)


WITH_ORD = ["clip", "clip_by_global_norm", "clip_by_leaf_norm", "clip_per_layer",
            "clip_by_unit_norm", "adaptive_grad_clip", "normalize_by_norm", "soft_clip",
            "record_norms"]  # fmt: skip


@pytest.mark.parametrize("name", WITH_ORD)
def test_other_orders_are_errors(name):
    with pytest.raises(ValueError, match="`ord` must be a number >= 1, inf or"):
        registry.CASES[name].make(1.0, ord=0.5)


WITH_EPS = ["clip_by_global_norm", "clip_by_leaf_norm", "clip_per_layer",
            "clip_by_unit_norm", "normalize_by_norm"]  # fmt: skip


@pytest.mark.parametrize("name", WITH_EPS)
def test_negative_eps_is_an_error(name):
    with pytest.raises(ValueError, match=r"`eps` must be >= 0, got -1\.0"):
        registry.CASES[name].make(1.0, eps=-1.0)


def test_action_must_be_a_function():
    with pytest.raises(TypeError, match=r"`action` must be `rescale`, `normalize`"):
        optclip.clip_by_rule(1.0, action="zero")


def test_pair_must_have_two_numbers():
    with pytest.raises(ValueError, match=r"must be a number or a pair \(low, high\)"):
        optclip.clip_by_value((1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match="`low` must be at most `high`"):
        optclip.clip_by_value((2.0, 1.0))


def test_unknown_curve_raises_an_error():
    with pytest.raises(ValueError, match="`kind` must be one of"):
        optclip.soft_clip(1.0, kind="cubic")


THRESHOLDS = {
    "clip": optclip.clip_by_rule, "clip_by_value": optclip.clip_by_value,
    "clip_by_global_norm": optclip.clip_by_global_norm,
    "clip_by_leaf_norm": optclip.clip_by_leaf_norm,
    "clip_per_layer": lambda t: optclip.clip_per_layer(t, 0),
    "clip_by_unit_norm": optclip.clip_by_unit_norm,
    "clip_by_block_rms": optclip.clip_by_block_rms,
    "adaptive_grad_clip": optclip.adaptive_grad_clip, "soft_clip": optclip.soft_clip,
    "cap_update": optclip.cap_update, "trust_ratio_clip": optclip.trust_ratio_clip,
    "spectral_clip": optclip.spectral_clip, "spam_clip": optclip.spam_clip,
    "normalize_by_norm": optclip.normalize_by_norm,
}  # fmt: skip


@pytest.mark.parametrize("name", THRESHOLDS)
def test_none_raises_an_error_that_explains_how_to_disable_a_clip(name):
    with pytest.raises(TypeError, match=r"got None\. Pass inf to switch"):
        THRESHOLDS[name](None)


@pytest.mark.parametrize("name", [n for n in THRESHOLDS if n != "spam_clip"])
def test_threshold_zero_gives_zeros_and_inf_gives_the_updates(name):
    params = {"a": jnp.ones(2), "b": jnp.ones((2, 2))}
    zeros = clipped(THRESHOLDS[name](0.0), params=params)
    assert all(np.all(x == 0) for x in zeros.values())
    same = clipped(THRESHOLDS[name](np.inf), params=params)
    assert all(np.array_equal(same[k], GRADS[k]) for k in GRADS)


@pytest.mark.parametrize(
    "make", [optclip.clip_by_unit_norm, optclip.adaptive_grad_clip]
)
def test_axis_by_name_makes_each_embedding_row_a_unit(make):
    table = jnp.full((50, 4), 0.01).at[7].set(100.0)  # one large row of [vocab, dim]
    grads = {"embedding": table, "dense": jnp.full((3, 2), 0.01)}
    ones = {k: jnp.full_like(x, 10.0) for k, x in grads.items()}
    # By default a unit is a column over the vocabulary, so every row is scaled down.
    shared = clipped(make(1.0), grads, ones)
    assert np.max(shared["embedding"][0]) < 0.009
    own = clipped(make(1.0, axis={"embedding": 1}), grads, ones)
    good = np.delete(np.arange(50), 7)
    np.testing.assert_array_equal(own["embedding"][good], table[good])
    bound = 1.0 if make is optclip.clip_by_unit_norm else 20.0
    np.testing.assert_allclose(np.linalg.norm(own["embedding"][7]), bound, rtol=1e-6)
    np.testing.assert_array_equal(own["dense"], grads["dense"])
