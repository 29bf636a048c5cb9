"""Contracts 1 to 4: norms, products, bounds and edges, for every transformation."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import registry

import optclip

BIG = float(jnp.finfo(jnp.float32).max)
SIZES = {
    "f32": [1e-30, 1e-3, 1.0, 1e30, 1e38],
    "bf16": [1e-30, 1e-3, 1.0, 1e30],
    "f16": [1e-7, 1e-3, 1.0, 300.0],
    "f8_e4m3fn": [1e-2, 1.0, 50.0],
    "f8_e5m2": [1e-4, 1.0, 300.0],
    "c64": [1e-30, 1.0, 1e30],
    "mixed": [1e-3, 1.0, 300.0],
    "f64": [1e-200, 1e-30, 1.0, 1e200],
    "c128": [1e-200, 1.0, 1e200],
}
FULL = {"f32": 3e38, "bf16": 3e38, "f16": 6e4, "f8_e4m3fn": 448, "f8_e5m2": 57344}


def pair(name, dtype):
    """Returns the parameters of a test; variants of a core case are marked slow.

    The quick dtypes cover the others: "mixed" contains f16 and c64.
    """
    quick = name in registry.DISTINCT and dtype in ("f32", "bf16", "mixed", "f64")
    marks = () if quick else pytest.mark.slow
    return pytest.param(name, dtype, marks=marks)


PAIRS = [
    pair(name, dtype)
    for name in registry.CASES
    for dtype in registry.DTYPES
    if name in registry.DISTINCT or dtype in ("f32", "bf16")
]
WIDE_PAIRS = [
    pair(name, dtype)
    for name in registry.CLIPS
    for dtype in ("f64", "c128")
    if name in registry.DISTINCT or (dtype == "f64" and name not in registry.TWINS)
]


def beyond(updates, expected):
    """Returns whether an expected entry is too large for its dtype."""
    pairs = zip(jax.tree.leaves(updates), expected.leaves, strict=True)
    return any(np.max(np.abs(y)) > float(jnp.finfo(x.dtype).max) for x, y in pairs)


@functools.cache
def runs(name, dtype):
    """Returns (updates, threshold, result, state, expected) for many updates."""
    case, params = registry.CASES[name], registry.normal_tree(dtype, seed=1)
    trees = [(s, registry.normal_tree(dtype, s)) for s in SIZES[dtype]]
    if dtype in FULL:
        trees.append((FULL[dtype], registry.full_tree(dtype, FULL[dtype])))
    done, wide = [], dtype in ("f64", "c128")
    for size, updates in trees:
        for threshold in (1.0, 0.7 * size, 1e3 * size):
            if not wide:
                threshold = float(np.float32(threshold)) if threshold < BIG else np.inf
            if name == "normalize_by_norm" and threshold == np.inf:
                continue
            expected = case.expect(updates, params, threshold)
            if name == "normalize_by_norm" and beyond(updates, expected):
                continue  # entries of updates with this norm overflow their dtype
            if max(expected.thresholds.values()) > BIG and threshold < BIG and not wide:
                continue  # a multiple of the parameter norm that overflows float32
            out, state = registry.run(name, updates, threshold, params)
            out, state = jax.device_get((out, state))
            done.append((updates, threshold, out, state, expected))
    return done


def saturated(value, dtype=np.float32):
    return min(float(value), float(np.finfo(dtype).max))


def check_products(name, dtype, work):
    for updates, threshold, out, _, expected in runs(name, dtype):
        del threshold
        pairs = zip(
            jax.tree.leaves(updates), jax.tree.leaves(out), expected.leaves, strict=True
        )
        for before, after, exact in pairs:
            assert after.dtype == before.dtype
            oracle.assert_rounded_once(after, exact, work)


def check_statistics(name, dtype):
    for _, _, _, state, expected in runs(name, dtype):
        if name == "record_norms":
            np.testing.assert_allclose(
                state.recorded_norm, saturated(expected.before), rtol=1e-6
            )
            continue
        np.testing.assert_allclose(
            state.norm_before, saturated(expected.before), rtol=1e-6, atol=1e-37
        )
        np.testing.assert_allclose(
            state.norm_after, saturated(expected.after), rtol=4e-6, atol=1e-37
        )
        # With `eps`, a norm just below its threshold is also scaled down.
        padded = "eps" in registry.CASES[name].settings
        over = [
            norm > expected.thresholds[g] or (padded and expected.scales[g] < 1)
            for g, norm in expected.norms.items()
        ]
        assert int(state.clipped_steps) == any(over)
        assert int(state.nonfinite.nonfinite_steps) == 0


@pytest.mark.parametrize(("name", "dtype"), PAIRS)
def test_updates_are_the_exact_product_rounded_once(name, dtype):
    check_products(name, dtype, 3e-6)


@pytest.mark.parametrize(("name", "dtype"), PAIRS)
def test_state_statistics_are_exact_and_finite_entries_never_count_as_nonfinite(
    name, dtype
):
    check_statistics(name, dtype)


@pytest.mark.parametrize(("name", "dtype"), PAIRS)
def test_groups_within_their_threshold_are_unchanged_bitwise(name, dtype):
    bound = registry.CASES[name].settings.get("action", "rescale")
    if bound not in ("rescale", "zero", "none"):
        pytest.skip("this action changes short groups too")
    seen = 0
    for updates, _, out, _, expected in runs(name, dtype):
        if set(expected.scales.values()) == {1}:
            chex.assert_trees_all_equal(out, updates)
            seen += 1
    assert seen or registry.CASES[name].relative


@pytest.mark.parametrize(("name", "dtype"), PAIRS)
def test_clipped_norms_exceed_the_threshold_by_at_most_four_ulp(name, dtype):
    case = registry.CASES[name]
    for updates, threshold, out, _, expected in runs(name, dtype):
        if name == "record_norms":
            continue
        after = case.expect(out, registry.normal_tree(dtype, seed=1), threshold)
        leaves = jax.tree.leaves(updates)
        widest = max(oracle.epsilon(x.dtype) for x in leaves)
        lost = max(
            float(jnp.finfo(x.dtype).tiny) * oracle.epsilon(x.dtype) for x in leaves
        )
        for g, length in after.norms.items():
            limit = expected.thresholds[g]
            room = limit * (1 + 4 * widest) + 20 * lost
            assert length <= room, (g, float(length), float(limit))


@pytest.mark.parametrize(("name", "dtype"), WIDE_PAIRS)
def test_float64_updates_are_exact_to_1e_12(name, dtype, x64):
    del x64
    check_products(name, dtype, 1e-12)


@pytest.mark.parametrize(("name", "dtype"), WIDE_PAIRS)
def test_statistics_of_float64_updates_are_float32_and_finite(name, dtype, x64):
    del x64
    check_statistics(name, dtype)
    for _, _, _, state, _ in runs(name, dtype):
        assert {x.dtype.name for x in jax.tree.leaves(state)} <= {"float32", "int32"}


@pytest.mark.parametrize("name", registry.CLIPS)
def test_zero_updates_stay_zero_with_scale_one(name):
    for threshold in (0.0, 1.0, np.inf):
        if name == "torch" and threshold == 0:
            continue  # torch's formula: 0 / (0 + eps)
        updates = registry.full_tree("f32", 0.0)
        out, state = registry.run(name, updates, threshold)
        chex.assert_trees_all_equal(out, updates)
        metrics = optclip.metrics(state)
        (scale,) = (k for k in metrics if k.endswith(("/scale", "/worst_scale")))
        assert float(metrics[scale]) == 1
        assert float(metrics["clip/clipped"]) == 0
        assert float(metrics["clip/norm_after"]) == 0


@pytest.mark.parametrize("name", registry.CLIPS)
def test_threshold_zero_gives_zeros_and_threshold_inf_gives_the_input(name):
    for size in (1e-30, 1.0, 1e30):
        updates = registry.normal_tree("f32", size)
        out, state = registry.run(name, updates, 0.0)
        chex.assert_trees_all_equal(out, registry.full_tree("f32", 0.0))
        assert float(state.scale) == 0
        if name != "normalize_by_norm":
            out, state = registry.run(name, updates, np.inf)
            chex.assert_trees_all_equal(out, updates)
            assert float(state.scale) == 1


@pytest.mark.parametrize("name", registry.HARD)
def test_subnormal_numbers_within_the_threshold_pass_bitwise(name):
    updates = registry.full_tree("f32", 1e-42)
    out, _ = registry.run(name, updates, 1.0)
    same = jax.tree.map(
        lambda a, b: np.array_equal(a.view(np.int32), b.view(np.int32)),
        jax.device_get(out), updates,
    )  # fmt: skip
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("name", ["clip", "clip-leaf", "clip_by_value"])
def test_negative_or_nan_threshold_on_device_is_treated_as_zero(name):
    for threshold in (-1.0, np.nan):
        out, _ = registry.run(name, registry.normal_tree("f32"), threshold)
        chex.assert_trees_all_equal(out, registry.full_tree("f32", 0.0))


def test_per_leaf_scales_match_a_hand_computed_example():
    updates = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.6, 0.8])}
    tx = optclip.clip_by_leaf_norm(2.5)
    out, state = tx.update(updates, tx.init(updates))
    np.testing.assert_allclose(out["a"], [1.5, 2.0], rtol=1e-6)
    chex.assert_trees_all_equal(out["b"], updates["b"])
    assert float(state.scale) == 0.5


def test_oracle_rejects_a_wrong_scale():
    case, updates = registry.CASES["clip"], registry.normal_tree("bf16")
    exact = case.expect(updates, None, 1.0).leaves
    wrong = jax.tree.leaves(updates)[0] * np.float32(0.25)
    with pytest.raises(AssertionError):
        oracle.assert_rounded_once(wrong.astype(jnp.bfloat16), exact[0])
