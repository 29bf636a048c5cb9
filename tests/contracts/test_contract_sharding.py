"""Eight devices give the same results as one; a global norm needs one all-reduce."""

import re
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import registry
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optclip

SPECS = {"blocks": P(None, "x"), "head": {"kernel": P("x", None)}, "scale": P()}
SHAPES = {"blocks": (2, 8, 3), "head": {"kernel": (16, 2)}, "scale": (3,)}
IS_SPEC = {"is_leaf": lambda node: isinstance(node, P)}
IS_SHAPE = {"is_leaf": lambda node: isinstance(node, tuple)}
CASES = [n for n in registry.CORE if n not in ("clip_by_leaf_norm", "clip-element")]


def gradients(size=3.0):
    rng = np.random.default_rng(5)
    return jax.tree.map(
        lambda s: (size * rng.normal(size=s)).astype(np.float32), SHAPES, **IS_SHAPE
    )


def mesh(kind=None):
    if kind is None:
        return jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    return jax.make_mesh((8,), ("x",), axis_types=(kind,))


def placed(tree, where):
    return jax.tree.map(
        lambda x, s: jax.device_put(x, NamedSharding(where, s)), tree, SPECS
    )


def agree(got, wanted):
    chex.assert_trees_all_close(
        jax.device_get(got), jax.device_get(wanted), rtol=1e-6, atol=1e-6
    )


def alone(tx, updates):
    return jax.jit(tx.update)(updates, tx.init(updates), updates)


@pytest.fixture(scope="module")
def eight():
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")


QUICK = ("clip", "clip-unit", "clip-layer", "adaptive_grad_clip", "clip_by_value")


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES],
)
def test_automatic_sharding_matches_one_device(name):
    tx, updates = registry.CASES[name].make(1.0), gradients()
    state = tx.init(updates)
    sharded = placed(updates, mesh())
    got = jax.jit(tx.update)(sharded, state, sharded)
    agree(got, alone(tx, updates))


def entry(text):
    return text[text.index("\nENTRY") :]


@pytest.mark.usefixtures("eight")
def test_global_norm_costs_one_all_reduce():
    tx, updates = optclip.clip_by_global_norm(1.0), placed(gradients(), mesh())
    compiled = jax.jit(tx.update).lower(updates, tx.init(updates)).compile()
    found = re.findall(r"= .* all-reduce(?:-start)?\(", entry(compiled.as_text()))
    assert len(found) == 1, found


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize("name", ["clip", "clip-leaf", "clip-unit", "clip_by_value"])
def test_explicit_sharding_matches_one_device(name):
    tx, updates = registry.CASES[name].make(1.0), gradients()
    where = mesh(jax.sharding.AxisType.Explicit)
    enter = getattr(jax, "set_mesh", None) or jax.sharding.use_mesh
    with enter(where):
        sharded = placed(updates, where)
        out, state = jax.jit(tx.update)(sharded, tx.init(sharded), sharded)
    agree((out, optclip.metrics(state)), _with_metrics(alone(tx, updates)))
    assert out["blocks"].sharding.is_equivalent_to(sharded["blocks"].sharding, 3)


@pytest.mark.usefixtures("eight")
def test_leaves_of_equal_shape_may_be_explicitly_sharded_over_different_axes():
    where = mesh(jax.sharding.AxisType.Explicit)
    rng = np.random.default_rng(0)
    updates = {k: rng.normal(size=(8, 8)).astype(np.float32) for k in "ab"}
    tx = optclip.clip_by_unit_norm(1.0)
    enter = getattr(jax, "set_mesh", None) or jax.sharding.use_mesh
    with enter(where):
        specs = {"a": P("x", None), "b": P(None, "x")}
        placed_ones = {
            k: jax.device_put(x, NamedSharding(where, specs[k]))
            for k, x in updates.items()
        }
        out, state = jax.jit(tx.update)(placed_ones, tx.init(placed_ones))
    agree((out, optclip.metrics(state)), _with_metrics(alone(tx, updates)))


def _with_metrics(result):
    return result[0], optclip.metrics(result[1])


def mapped(make, axis_name, where, updates):
    """Runs a clip under shard_map."""
    tx = make(1.0, axis_name=axis_name)

    def step(u, s):
        return tx.update(u, s, u)

    state = tx.init(updates)
    specs = optclip.state_specs(tx, updates, SPECS)
    run = jax.shard_map(
        step, mesh=where, in_specs=(SPECS, specs), out_specs=(SPECS, specs)
    )
    return jax.jit(run)(updates, state)


POOLED = [
    "clip",
    "clip-leaf",
    "clip-label",
    "clip_by_block_rms",
    "soft_clip",
    "record_norms",
]
NAMES = {
    "auto": "auto",
    "names": {"blocks": "x", "head": "x", "scale": None},
    "specs": SPECS,
}


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize("how", NAMES)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in ("clip", "clip-leaf") else pytest.mark.slow)
        for n in POOLED
    ],
)
def test_shard_map_sums_sharded_leaves_and_not_replicated_ones(name, how):
    make = registry.CASES[name].make
    for size in (3.0, 1e25):
        updates = gradients(size)
        got = mapped(make, NAMES[how], mesh(), updates)
        agree(_with_metrics(got), _with_metrics(alone(make(1.0), updates)))


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize("name", ["clip-ord3", "clip-max", "clip-ord1", "clip-element"])
def test_shard_map_supports_every_norm_order(name):
    make, updates = registry.CASES[name].make, gradients()
    got = mapped(make, SPECS, mesh(), updates)
    agree(_with_metrics(got), _with_metrics(alone(make(1.0), updates)))


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize("name", ["clip-unit", "clip-layer", "adaptive_grad_clip"])
def test_shard_map_needs_specs_for_units_and_layers(name):
    make, updates = registry.CASES[name].make, gradients()
    # Units of `blocks` are sharded over a mesh axis, so their statistics are too.
    got = mapped(make, SPECS, mesh(), updates)
    agree(_with_metrics(got), _with_metrics(alone(make(1.0), updates)))


@pytest.mark.usefixtures("eight")
def test_auto_axes_raise_an_error_where_they_cannot_be_inferred():
    make = registry.CASES["clip-unit"].make
    with pytest.raises(ValueError, match="tree of PartitionSpecs"):
        mapped(make, "auto", mesh(), gradients())


@pytest.mark.usefixtures("eight")
def test_nonfinite_entries_on_one_device_are_counted_on_all():
    updates = gradients()
    updates["head"]["kernel"][3, 0] = np.nan
    for policy in ("zero", "drop", "skip"):
        make = registry.CASES["clip"].make

        def with_policy(t, policy=policy, make=make, **options):
            return make(t, nonfinite=policy, **options)

        got = mapped(with_policy, "auto", mesh(), updates)
        agree(
            _with_metrics(got),
            _with_metrics(alone(make(1.0, nonfinite=policy), updates)),
        )
        assert optclip.nonfinite_leaves(got[1], updates)[0].nan == 1


@pytest.mark.usefixtures("eight")
def test_pmap_sums_over_its_axis():
    updates = {"w": np.arange(16, dtype=np.float32).reshape(8, 2)}
    tx = optclip.clip_by_global_norm(1.0, axis_name="i")
    state = jax.tree.map(lambda x: jnp.stack([x] * 8), tx.init({"w": updates["w"][0]}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out, state = jax.pmap(tx.update, axis_name="i")(updates, state)
    wanted, _ = alone(optclip.clip_by_global_norm(1.0), updates)
    agree(out, wanted)
    np.testing.assert_allclose(state.norm_before, [np.linalg.norm(updates["w"])] * 8)


@pytest.mark.usefixtures("eight")
def test_complete_sharded_step_matches_one_device():
    tx = optax.chain(
        optclip.record_norms(), optclip.clip_by_leaf_norm(1.0), optax.adamw(1e-2)
    )
    updates = gradients()
    sharded = placed(updates, mesh())
    got, _ = jax.jit(tx.update)(sharded, tx.init(sharded), sharded)
    agree(got, alone(tx, updates)[0])
