"""Thresholds by label, path pattern or function: numbers, schedules and rules."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import optclip
from optclip import rules, scopes

GRADS = {
    "encoder": {"kernel": jnp.full((2, 2), 4.0), "bias": jnp.full(4, 3.0)},
    "decoder": {"kernel": jnp.full((2, 2), 4.0), "bias": jnp.full(4, 3.0)},
}
BY_MODULE = scopes.label(lambda path: path.split("/")[0])
TABLE = {"encoder": 5.0, "decoder": 1.0}


def out(tx, grads=GRADS, steps=1):
    state, update = tx.init(grads), jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(grads, state, grads)
    return updates, state


def norms(tree):
    def norm(x):
        return np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(x)))

    return {name: norm(sub) for name, sub in tree.items()}


@pytest.mark.parametrize("order", [("encoder", "decoder"), ("decoder", "encoder")])
def test_labels_get_their_threshold_regardless_of_order(order):
    table = {name: TABLE[name] for name in order}
    updates, _ = out(optclip.clip_by_rule(table, scope=BY_MODULE))
    np.testing.assert_allclose(norms(updates)["encoder"], 5.0, rtol=1e-6)
    np.testing.assert_allclose(norms(updates)["decoder"], 1.0, rtol=1e-6)


@pytest.mark.parametrize(
    "value", [[1.0, 5.0], np.array([1.0, 5.0])], ids=["list", "np"]
)
@pytest.mark.parametrize("make", [optclip.clip_by_rule, optclip.soft_clip])
def test_array_of_thresholds_raises_an_error_in_label_scope(make, value):
    tx = make(jnp.asarray(value), scope=BY_MODULE)
    with pytest.raises(ValueError, match=r"Give a map, as \{"):
        out(tx)


def test_array_valued_schedule_raises_an_error_in_label_scope():
    tx = optclip.clip_by_rule(
        lambda step: jnp.array([1.0, 5.0]) * (step + 1), scope=BY_MODULE
    )
    with pytest.raises(ValueError, match="JAX sorts the keys"):
        out(tx)


def test_leaves_use_the_first_matching_pattern():
    table = {"encoder/kernel": 0.5, "kernel": 2.0, "": 1.0}
    updates, _ = out(optclip.clip_by_leaf_norm(table))
    found = {
        f"{a}/{b}": float(jnp.linalg.norm(x))
        for a, sub in updates.items()
        for b, x in sub.items()
    }
    expected = {"encoder/kernel": 0.5, "decoder/kernel": 2.0,
                "encoder/bias": 1.0, "decoder/bias": 1.0}  # fmt: skip
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)


METHODS = {
    "clip_by_leaf_norm": optclip.clip_by_leaf_norm,
    "clip_by_block_rms": optclip.clip_by_block_rms,
    "clip_by_unit_norm": optclip.clip_by_unit_norm,
    "clip_by_value": optclip.clip_by_value,
    "clip_per_layer": lambda t: optclip.clip_per_layer(t, {"kernel": 1}),
    "soft_clip": lambda t: optclip.soft_clip(t, scope=scopes.leaf()),
    "normalize_by_norm": lambda t: optclip.normalize_by_norm(t, scope=scopes.leaf()),
}


@pytest.mark.parametrize("name", METHODS)
def test_each_module_is_clipped_as_if_by_a_constant_threshold(name):
    updates, _ = out(METHODS[name](TABLE))
    for module, threshold in TABLE.items():
        alone, _ = out(METHODS[name](threshold), {module: GRADS[module]})
        chex.assert_trees_all_close(updates[module], alone[module], rtol=1e-6)


def test_schedules_and_rules_are_accepted_as_values():
    table = {
        "encoder": optax.linear_schedule(4.0, 0.0, 4),
        "decoder": rules.previous_norm(1.5),
    }
    tx = optclip.clip_by_rule(table, scope=BY_MODULE)
    state = tx.init(GRADS)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        state, jax.eval_shape(tx.update, GRADS, state)[1]
    )
    update = jax.jit(tx.update)
    encoder, decoder = [], []
    for size in (1.0, 2.0, 4.0):
        grads = jax.tree.map(lambda x, s=size: x * s, GRADS)
        updates, state = update(grads, state)
        encoder.append(norms(updates)["encoder"])
        decoder.append(norms(updates)["decoder"])
    np.testing.assert_allclose(encoder, [4.0, 3.0, 2.0], rtol=1e-6)
    # Norms are 10, 20, 40; each is bounded by 1.5 times the last clipped one.
    np.testing.assert_allclose(decoder, [10.0, 15.0, 22.5], rtol=1e-6)


def test_function_of_the_leaf_name_is_accepted():
    rule = rules.by_name(lambda label: {"encoder": 5.0, "decoder": 1.0}[label])
    updates, _ = out(optclip.clip_by_rule(rule, scope=BY_MODULE))
    np.testing.assert_allclose(norms(updates)["decoder"], 1.0, rtol=1e-6)


def test_labels_need_not_be_strings():
    labels = {"encoder": 0, "decoder": 1}
    tx = optclip.clip_by_rule({0: 5.0, 1: 1.0}, scope=scopes.label(labels))
    np.testing.assert_allclose(norms(out(tx)[0])["encoder"], 5.0, rtol=1e-6)


def test_units_and_layers_of_equal_shape_keep_separate_thresholds():
    grads = {k: jnp.full((3, 2), 6.0) for k in "abc"}
    tx = optclip.clip_by_unit_norm({"a": 1.0, "b": 2.0, "c": jnp.inf})
    updates, _ = out(tx, grads)
    for name, wanted in (("a", 1.0), ("b", 2.0), ("c", np.sqrt(108))):
        size = np.linalg.norm(updates[name], axis=0)
        np.testing.assert_allclose(size, wanted, rtol=1e-6)
    chex.assert_trees_all_equal(updates["c"], grads["c"])


def test_infinite_threshold_leaves_a_group_bitwise_unchanged():
    updates, _ = out(
        optclip.clip_by_rule({"encoder": jnp.inf, "decoder": 1.0}, scope=BY_MODULE)
    )
    chex.assert_trees_all_equal(updates["encoder"], GRADS["encoder"])


def test_thresholds_by_name_agree_under_shard_map():
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    grads = {"encoder": jnp.arange(16.0), "decoder": jnp.arange(16.0)}
    specs = {"encoder": P("x"), "decoder": P()}
    wanted, _ = out(optclip.clip_by_rule(TABLE, scope=BY_MODULE), grads)
    tx = optclip.clip_by_rule(TABLE, scope=BY_MODULE, axis_name="auto")
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    whole = jax.tree.map(lambda _: P(), tx.init(grads))
    run = jax.shard_map(
        tx.update, mesh=mesh, in_specs=(specs, whole), out_specs=(specs, whole)
    )
    got, _ = jax.jit(run)(grads, tx.init(grads))
    chex.assert_trees_all_close(got, wanted, rtol=1e-6)


ERRORS = [
    (lambda: optclip.clip_by_global_norm(TABLE).init(GRADS), "which is one group"),
    (lambda: optclip.clip_by_leaf_norm({"encoder": 1.0}).init(GRADS),
     "no threshold for the group 'decoder/bias'"),
    (lambda: optclip.clip_by_rule({"encoder": -1.0}, scope=BY_MODULE), "must be >= 0"),
    (lambda: optclip.clip_by_rule({}, scope=BY_MODULE), "threshold for each group"),
    (lambda: rules.by_name(3.0), "must be a map"),
    (lambda: optclip.clip_by_rule({"encoder": (1.0, 2.0)}, scope=BY_MODULE),
     "a number, an"),
    (lambda: optclip.skip_steps(optax.sgd(0.1), when=TABLE), "since only the global"),
    (lambda: optclip.clip_by_rule({"encoder": -2.0}, scope=BY_MODULE),
     r"`table\['encoder'\]` must be >= 0, got -2.0"),
    (lambda: optclip.skip_steps(optax.sgd(0.1), when_loss=(1.0, 2.0)),
     r"`when_loss` must be a number .* got \(1.0, 2.0\) of type tuple"),
    (lambda: optclip.skip_steps(optax.sgd(0.1), when_loss={"a": 1.0}),
     "`when_loss` must be a number .* got a map"),
    (lambda: optclip.skip_steps(optax.sgd(0.1), when_loss=np.ones(3)),
     "since there is one loss"),
    (lambda: optclip.skip_steps(optax.sgd(0.1), when_loss=object()),
     "`when_loss` must be a number .* of type object"),
    (lambda: optclip.clip_by_global_norm(object()), "must be a number .* of type obj"),
    (lambda: optclip.zclip(z_thresh=(1.0, 2.0)), "must be a number .* of type tuple"),
    (lambda: optclip.adaptive_grad_clip({"encoder": 0.1}), "by_name"),
]  # fmt: skip


@pytest.mark.parametrize(("act", "message"), ERRORS, ids=[m for _, m in ERRORS])
def test_misuse_raises_actionable_errors(act, message):
    with pytest.raises((ValueError, TypeError), match=message):
        act()


BY_TOP = optclip.scopes.label(lambda path: path.split("/")[0])
BY_LEAF = [optclip.scopes.leaf(), optclip.scopes.layer(0), optclip.scopes.unit()]
TWO = {"encoder": {"w": jnp.ones((2, 3))}, "decoder": {"b": jnp.ones(2)}}


@pytest.mark.parametrize("scope", [*BY_LEAF, BY_TOP], ids=lambda scope: scope.name)
def test_unused_key_raises_an_error(scope):
    for table, key in (
        ({"encoder": 1.0, "decodr": 2.0, "": 3.0}, "decodr"),
        ({"encoder": 1.0, "decoder": 1.0, "haed": 2.0}, "haed"),
    ):
        with pytest.raises(ValueError, match=f"the key '{key}' belongs to no group"):
            optclip.clip_by_rule(table, scope=scope).init(TWO)
    # A default may be unused.
    optclip.clip_by_rule({"encoder": 1.0, "decoder": 2.0, "": 3.0}, scope=scope).init(
        TWO
    )


@pytest.mark.parametrize("scope", BY_LEAF, ids=lambda scope: scope.name)
def test_unreachable_key_raises_an_error(scope):
    with pytest.raises(ValueError, match="put it before a key that matches more"):
        optclip.clip_by_rule({"": 3.0, "encoder": 1.0}, scope=scope).init(TWO)
