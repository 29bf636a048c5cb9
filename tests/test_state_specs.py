"""PartitionSpecs of an optimizer's state, derived from those of the parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optclip
from optclip import scopes

PARAMS = {
    "blocks": jnp.zeros((8, 4, 16)),
    "wq": jnp.zeros((8, 16)),
    "wo": jnp.zeros((8, 16)),
    "bias": jnp.zeros(16),
    "gain": jnp.zeros(()),
}
SPECS = {
    "blocks": P("pipe", None, "data"),
    "wq": P(None, ("data", "pipe")),
    "wo": P("data", None),
    "bias": P(None),
    "gain": None,
}


def optimizer(specs):
    stacked = scopes.layer({"blocks": 1})
    return optclip.skip_steps(
        optax.chain(
            optclip.zclip(scope=stacked, warmup_steps=2, axis_name=specs),
            optclip.rolling_sigma_clip(window=4, scope=scopes.unit(), axis_name=specs),
            optclip.record_norms(axis_name=specs),
            optax.adam(1e-2),
        ),
        axis_name=specs,
    )


def mesh():
    kinds = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((2, 4), ("pipe", "data"), axis_types=kinds)


def gradients(steps, seed=0):
    rng = np.random.default_rng(seed)

    def tree(size):
        return {
            k: jnp.asarray(size * rng.normal(size=x.shape)) for k, x in PARAMS.items()
        }

    return [tree(size) for size in np.exp(0.5 * rng.normal(size=steps))]


def test_moments_are_sharded_like_parameters_and_statistics_like_their_groups():
    tx = optimizer(SPECS)
    state = optclip.state_specs(tx, PARAMS, SPECS)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(PARAMS))
    adam = state.optimizer_state[-1][0]
    for moment in (adam.mu, adam.nu):
        assert moment == SPECS | {"bias": P(), "gain": P()}
    layers = [leaf for leaf in jax.tree.leaves(state.optimizer_state[0]) if any(leaf)]
    # Norms per layer have shape [leaves, layers], and only layers are sharded.
    assert set(layers) == {P(None, "pipe")}
    windows = [leaf for leaf in jax.tree.leaves(state.optimizer_state[1]) if any(leaf)]
    assert any(("data", "pipe") in spec for spec in windows)
    others = (state.nonfinite, state.last_bad, state.optimizer_state[2])
    assert {spec for spec in jax.tree.leaves(others)} == {P()}


def test_clips_by_layer_and_unit_with_memory_agree_with_one_device_under_shard_map():
    # Every leaf has a different spec, so leaves of equal shape differ in local shape.
    one, many = optimizer(None), optimizer(SPECS)
    state_specs = optclip.state_specs(many, PARAMS, SPECS)
    specs = jax.tree.map(lambda s: s or P(), SPECS, is_leaf=lambda s: s is None)
    step = jax.jit(
        jax.shard_map(
            many.update,
            mesh=mesh(),
            in_specs=(specs, state_specs, specs),
            out_specs=(specs, state_specs),
            check_vma=False,
        )
    )
    alone = jax.jit(one.update)
    where = jax.tree.map(lambda spec: NamedSharding(mesh(), spec), state_specs)
    # Placed like the returned state, so that one compiled step suffices.
    ours, theirs = jax.device_put(many.init(PARAMS), where), one.init(PARAMS)
    for grads in gradients(8):
        got, ours = step(grads, ours, PARAMS)
        wanted, theirs = alone(grads, theirs, PARAMS)
        for key in PARAMS:
            np.testing.assert_allclose(got[key], wanted[key], rtol=2e-5, atol=1e-8)
    metrics = jax.device_get((optclip.metrics(ours), optclip.metrics(theirs)))
    for key in metrics[0]:
        np.testing.assert_allclose(metrics[0][key], metrics[1][key], rtol=2e-5)
    rows = optclip.leaf_metrics(ours, PARAMS), optclip.leaf_metrics(theirs, PARAMS)
    assert rows[0].keys() == rows[1].keys()
    for key in rows[0]:
        np.testing.assert_allclose(rows[0][key], rows[1][key], rtol=2e-5)


def test_state_created_under_jit_is_sharded_like_its_parameters():
    tx = optimizer(None)
    specs = optclip.state_specs(tx, PARAMS, SPECS)
    where = jax.tree.map(lambda spec: NamedSharding(mesh(), spec), specs)
    state = jax.jit(tx.init, out_shardings=where)(PARAMS)
    mu = state.optimizer_state[-1][0].mu
    assert mu["wq"].sharding.spec == SPECS["wq"]
    assert mu["blocks"].addressable_shards[0].data.shape == (4, 4, 4)


OPTIMIZERS = {
    "stabilize": lambda: optclip.stabilize(optax.adamw(1e-3)),
    "by leaf": lambda: optclip.stabilize(optax.adamw(1e-3), scope=scopes.leaf()),
    "MultiSteps": lambda: optax.MultiSteps(optimizer(SPECS), 4),
    "partition": lambda: optax.partition(
        {"a": optax.sgd(0.1, momentum=0.9), "b": optclip.adagc(scope=scopes.leaf())},
        lambda tree: {k: "a" if k.startswith("w") else "b" for k in tree},
    ),
    "u_clip": lambda: optclip.u_clip(optclip.clip_by_rule(1.0)),
    "stable_adam": lambda: optclip.scale_by_stable_adam(),
    "inject": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    "elements with memory": lambda: optclip.spam_clip(),
    "lamb": lambda: optax.lamb(1e-3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_local_shapes_match_init_on_local_parameters(name):
    sizes = dict(mesh().shape)
    each = optclip.state_specs(OPTIMIZERS[name](), PARAMS, SPECS)

    def local(x, spec):
        shape = list(x.shape)
        for axis, entry in enumerate(spec or ()):
            names = (entry,) if isinstance(entry, str) else entry or ()
            for own in names:
                assert shape[axis] % sizes[own] == 0
                shape[axis] //= sizes[own]
        return jax.ShapeDtypeStruct(shape, x.dtype)

    none = {"is_leaf": lambda spec: spec is None or isinstance(spec, P)}
    init = OPTIMIZERS[name]().init
    inner = jax.tree.map(lambda s, x: local(x, s), SPECS, PARAMS, **none)
    wanted = [x.shape for x in jax.tree.leaves(jax.eval_shape(init, inner))]
    whole = jax.tree.leaves(jax.eval_shape(init, PARAMS))
    pairs = zip(whole, jax.tree.leaves(each), strict=True)
    assert [local(x, spec).shape for x, spec in pairs] == wanted


def test_specs_of_shape_dependent_states_fall_back_to_those_of_their_parameter():
    # Adafactor factors dimensions of at least 128: one of the two leaves here, both if
    # enlarged.
    params = {"a": jnp.zeros((100, 64)), "b": jnp.zeros((256, 512))}
    specs = {"a": P("data", None), "b": P(None, "data")}
    state = optclip.state_specs(optax.adafactor(1e-3), params, specs)[0]
    assert state.v["a"] == P("data", None)
    assert state.v["b"] == state.v_row["a"] == state.v_col["a"] == P()
    assert {state.v_row["b"], state.v_col["b"]} == {P(), P("data")}


def test_one_mesh_axis_is_not_used_twice_for_a_leaf():
    pairs = optax.GradientTransformation(
        lambda params: jnp.zeros((params.size, params.size)),
        lambda u, s, p=None: (u, s),
    )
    assert optclip.state_specs(pairs, jnp.zeros(4), P("data")) == P("data", None)


def test_specs_can_be_a_prefix_of_the_parameters():
    params = {"enc": {"w": jnp.zeros((4, 4)), "b": jnp.zeros(4)}, "t": jnp.zeros(())}
    state = optclip.state_specs(optax.trace(0.9), params, {"enc": P("x"), "t": P()})
    assert state.trace["enc"] == {"w": P("x", None), "b": P("x")}
    assert optclip.state_specs(optax.trace(0.9), params, None).trace["t"] == P()


@pytest.mark.parametrize(
    ("specs", "error", "message"),
    [
        ({"w": P("x")}, ValueError, "structure of `params`"),
        ({"w": P("x"), "b": "x"}, TypeError, "PartitionSpec.*'x' for `b`"),
        ({"w": P(), "b": P(None, "x")}, ValueError, "`b` has 2 entries.*shape"),
        ({"w": P("x", "x"), "b": P()}, ValueError, "`w` names the mesh axis 'x' more"),
    ],
)
def test_mismatched_specs_raise_an_error(specs, error, message):
    params = {"w": jnp.zeros((4, 4)), "b": jnp.zeros(4)}
    with pytest.raises(error, match=message):
        optclip.state_specs(optax.adam(1e-3), params, specs)


def test_object_without_init_raises_an_error():
    with pytest.raises(TypeError, match="with a function `init`"):
        optclip.state_specs(optax.adam, PARAMS, SPECS)


def test_replicated_per_layer_state_in_shard_map_raises_an_error_naming_state_specs():
    tx = optclip.clip_per_layer(1.0, {"blocks": 1}, axis_name={"blocks": P("pipe")})
    params = {"blocks": jnp.ones((8, 4))}
    state = tx.init(params)
    whole = jax.tree.map(lambda _: P(), state)
    step = jax.shard_map(
        tx.update, mesh=mesh(), in_specs=({"blocks": P("pipe")}, whole),
        out_specs=({"blocks": P("pipe")}, whole), check_vma=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"this is the local shape.*state_specs"):
        step(params, state)
