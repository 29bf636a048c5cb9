"""Properties of every hard clip, on trees drawn by Hypothesis."""

import functools

import chex
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import registry

HARD = ["clip", "clip-leaf", "clip-layer", "clip-unit", "clip-element", "clip-ord3"]
few = hypothesis.settings(
    deadline=None, max_examples=25, derandomize=True, database=None
)
# Typical, huge and tiny entries, without subnormal ones, which are flushed to zero.
entries = st.one_of(
    st.floats(-10, 10, width=32), st.floats(-(2.0**120), 2.0**120, width=32),
    st.just(0.0),
).map(lambda x: 0.0 if abs(x) < 1e-30 else x)  # fmt: skip
shapes = {"blocks": (2, 3), "w": (2, 2)}
# Sorted like JAX flattens a dict, because Hypothesis shuffles keys.
trees = st.fixed_dictionaries(
    {k: hnp.arrays(np.float32, shape, elements=entries) for k, shape in shapes.items()}
).map(lambda tree: dict(sorted(tree.items())))
thresholds = st.floats(1e-3, 1e6).map(lambda x: float(np.float32(x)))


@functools.cache
def state_of(name):
    example = {"blocks": np.ones((2, 3), np.float32), "w": np.ones((2, 2), np.float32)}
    return registry.CASES[name].make(1.0).init(example)


def clipped(name, tree, threshold):
    out, _ = registry.stepper(name)(jnp.float32(threshold), tree, state_of(name), tree)
    return jax.device_get(out)


def norms(name, tree):
    return registry.CASES[name].expect(tree, None, 1.0).norms


@pytest.mark.parametrize("name", HARD)
@few
@hypothesis.given(tree=trees, threshold=thresholds)
def test_clip_never_increases_norms_and_reaches_the_threshold(name, tree, threshold):
    after = norms(name, clipped(name, tree, threshold))
    for g, before in norms(name, tree).items():
        wanted = min(before, oracle.WIDE(threshold))
        assert after[g] <= before
        np.testing.assert_allclose(
            np.float64(after[g]), np.float64(wanted), rtol=2e-6, atol=1e-36
        )


@pytest.mark.parametrize("name", HARD)
@few
@hypothesis.given(tree=trees, threshold=thresholds)
def test_clip_preserves_signs_and_the_direction_of_every_group(name, tree, threshold):
    out = clipped(name, tree, threshold)
    case = registry.CASES[name]
    exact = case.expect(tree, None, threshold)
    ids = oracle.groups(
        case.scope, case.argument, list(tree), [x.shape for x in tree.values()]
    )
    for (key, x), group in zip(tree.items(), ids, strict=True):
        assert np.all(out[key] * np.sign(x) >= 0)
        for g in np.unique(group):
            wanted = oracle.wide(x)[group == g] * exact.scales[g]
            np.testing.assert_allclose(
                out[key][group == g], wanted.astype(np.float64), rtol=3e-6, atol=1e-36
            )


@pytest.mark.parametrize("name", HARD)
@few
@hypothesis.given(tree=trees, threshold=thresholds)
def test_clipping_is_idempotent(name, tree, threshold):
    once = clipped(name, tree, threshold)
    twice = clipped(name, once, threshold)
    chex.assert_trees_all_close(twice, once, rtol=5e-7, atol=1e-36)


@pytest.mark.parametrize("name", HARD)
@few
@hypothesis.given(
    tree=trees, threshold=thresholds, factor=st.floats(1, 100, allow_subnormal=False)
)
def test_clip_is_monotonic_in_the_threshold(name, tree, threshold, factor):
    low = clipped(name, tree, threshold)
    high = clipped(name, tree, threshold * factor)
    for key in tree:
        assert np.all(np.abs(low[key]) <= np.abs(high[key]) * (1 + 1e-6) + 1e-36)


@few
@hypothesis.given(tree=trees, threshold=thresholds)
def test_global_clip_is_invariant_to_tree_layout(tree, threshold):
    whole = np.concatenate([x.ravel() for x in tree.values()])
    one = {"blocks": whole[:6].reshape(2, 3)[:, ::-1], "w": whole[6:].reshape(2, 2).T}
    out, moved = clipped("clip", tree, threshold), clipped("clip", one, threshold)
    np.testing.assert_allclose(moved["blocks"][:, ::-1], out["blocks"], rtol=1e-6)
    np.testing.assert_allclose(moved["w"].T, out["w"], rtol=1e-6)


@few
@hypothesis.given(tree=trees, power=st.integers(-20, 20))
def test_clip_commutes_with_rescaling(tree, power):
    tree = jax.tree.map(lambda x: np.clip(x, -1e25, 1e25), tree)
    factor = np.float32(2.0**power)
    larger = jax.tree.map(lambda x: x * factor, tree)
    out = clipped("clip", tree, 1.0)
    for key, x in clipped("clip", larger, factor).items():
        np.testing.assert_allclose(x / factor, out[key], rtol=1e-6, atol=1e-30)
