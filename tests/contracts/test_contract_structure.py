"""Contract 5: structure, shape, dtype, weak type, sharding, and other leaves."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import registry
from jax.sharding import NamedSharding, PartitionSpec

import optclip


def update(name, updates, threshold=1e-2, **options):
    tx = registry.CASES[name].make(threshold, **options)
    return jax.jit(tx.update)(updates, tx.init(updates), updates)


@pytest.mark.parametrize("name", registry.CORE)
def test_non_gradient_leaves_pass_through_and_are_not_measured(name):
    gradient = jnp.array([3.0, 4.0])
    others = {
        "count": jnp.arange(3),
        "flag": jnp.array([True, False]),
        "key": jax.random.key(0),
        "none": None,
        "masked": optax.MaskedNode(),
        "nothing": jnp.zeros((0, 3)),
    }
    out, state = update(name, {"blocks": gradient, **others}, 1.0)
    assert jax.tree.structure(out) == jax.tree.structure({"blocks": gradient, **others})
    chex.assert_trees_all_equal(out["count"], others["count"])
    chex.assert_trees_all_equal(out["flag"], others["flag"])
    assert out["key"] == others["key"]
    assert out["nothing"].shape == (0, 3)
    if name != "record_norms" and "element" not in name and "value" not in name:
        rms = name == "clip_by_block_rms"
        if not rms:
            assert float(state.norm_before) == 5.0
        assert int(state.nonfinite.nonfinite_steps) == 0


@pytest.mark.parametrize("name", ["clip", "clip-leaf", "clip-unit", "clip-element"])
def test_float0_leaves_pass_through_outside_jit(name):
    empty = np.zeros(2, jax.dtypes.float0)
    updates = {"blocks": jnp.array([3.0, 4.0]), "int": empty}
    tx = registry.CASES[name].make(1.0)
    out, _ = tx.update(updates, tx.init(updates), updates)
    assert out["int"] is empty


@pytest.mark.parametrize("name", registry.CORE)
@pytest.mark.parametrize("updates", [(), {"a": None}, {"n": np.arange(3)}], ids=repr)
def test_trees_without_gradients_pass_through(name, updates):
    tx = registry.CASES[name].make(1.0)
    state = tx.init(updates)
    out, after = tx.update(updates, state, updates)
    chex.assert_trees_all_equal(out, updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


@pytest.mark.parametrize("name", registry.CORE)
def test_scalars_and_empty_leaves_are_clipped(name):
    updates = {"blocks": jnp.zeros((0, 2)), "t": jnp.float32(5.0)}
    out, _ = update(name, updates, 0.5)
    chex.assert_trees_all_equal_shapes_and_dtypes(out, updates)
    wanted = {"record_norms": 5.0, "adaptive_grad_clip": 2.5, "soft_clip": 5 / 11}
    np.testing.assert_allclose(out["t"], wanted.get(name, 0.5), rtol=1e-6)


@pytest.mark.parametrize("name", registry.CORE)
def test_weak_types_are_kept(name):
    updates = {"weak": jnp.asarray(3.0), "blocks": jnp.ones(2)}
    assert updates["weak"].weak_type
    out, _ = update(name, updates)
    assert out["weak"].weak_type
    assert not out["blocks"].weak_type


@pytest.mark.parametrize("name", registry.CORE)
def test_shardings_are_kept(name):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = NamedSharding(mesh, PartitionSpec("x"))
    whole = NamedSharding(mesh, PartitionSpec())
    updates = {
        "blocks": jax.device_put(jnp.ones((16, 2)), sharded),
        "w": jax.device_put(jnp.ones(3), whole),
    }
    out, _ = update(name, updates)
    for key, value in updates.items():
        assert out[key].sharding.is_equivalent_to(value.sharding, value.ndim)


@pytest.mark.parametrize("kind", registry.DTYPES)
def test_update_dtype_keeps_half_precision_updates_unrounded(kind):
    updates = registry.normal_tree(kind)
    out, _ = update("clip", updates, update_dtype=jnp.float32)
    exact = registry.CASES["clip"].expect(updates, None, 1e-2).leaves
    leaves = zip(jax.tree.leaves(updates), jax.tree.leaves(out), exact, strict=True)
    for before, after, wanted in leaves:
        is_complex = np.iscomplexobj(before)
        assert after.dtype == (before.dtype if is_complex else np.float32)
        oracle.assert_rounded_once(after, wanted)


def test_norm_of_many_bfloat16_leaves_is_accurate():
    rng = np.random.default_rng(0)
    updates = [rng.normal(size=3).astype(jnp.bfloat16) for _ in range(3000)]
    norm = jax.jit(optclip.norms.global_norm)
    for size in (1.0, 1e30):  # the second takes the overflow-safe branch
        updates[500] = size * updates[500]
        wanted = float(oracle.tree_norm(updates))
        np.testing.assert_allclose(norm(updates), wanted, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip_by_global_norm", "clip_by_leaf_norm"])
def test_tree_of_a_thousand_leaves_is_clipped(name):
    leaves = [
        np.full((2, 2), 1e25 if i == 500 else 0.1, np.float32) for i in range(1000)
    ]
    out, state = update(name, leaves, 1.0)
    np.testing.assert_allclose(state.norm_before, 2e25, rtol=1e-6)
    np.testing.assert_allclose(out[500], 0.5, rtol=1e-6)
    tree = name == "clip_by_global_norm"
    np.testing.assert_allclose(out[0], 0.1 / 2e25 if tree else 0.1, rtol=1e-6)
