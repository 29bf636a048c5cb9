"""Mesh axes are inferred from types; if types don't show them, "auto" is an error."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import optclip

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")

GRADS = {"kernel": np.ones((8, 4), np.float32), "bias": np.ones(4, np.float32)}
SPECS = {"kernel": P("x"), "bias": P()}
WHOLE = 6.0  # the root of 36 ones


def norm(axis_name, check=True, clip=optclip.clip_by_global_norm):
    """Returns the norm that a clip measures within `shard_map`."""
    tx = clip(1.0, axis_name=axis_name)

    def step(grads):
        return tx.update(grads, tx.init(grads))[1].norm_before

    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(SPECS,), out_specs=P(), check_vma=check
    )
    return float(jax.jit(mapped)(GRADS))


BY_VALUE = functools.partial(optclip.clip_by_value, record=True)


@pytest.mark.parametrize("clip", [optclip.clip_by_global_norm, BY_VALUE])
@pytest.mark.parametrize("axis_name", ["auto", "x", SPECS, P("x"), ("x",)])
def test_leaf_with_replicated_type_is_counted_once(axis_name, clip):
    wanted = {optclip.clip_by_global_norm: WHOLE, BY_VALUE: 1.0}[clip]
    assert norm(axis_name, clip=clip) == pytest.approx(wanted)


def test_auto_raises_an_error_where_types_do_not_show_the_axes():
    with pytest.raises(ValueError, match=r"types don't show \['x'\]"):
        norm("auto", check=False)
    assert norm(SPECS, check=False) == pytest.approx(WHOLE)


def test_auto_raises_an_error_in_pmap():
    version = tuple(map(int, jax.__version__.split(".")[:2]))
    if version < (0, 10):
        pytest.skip("before JAX 0.10 nothing tells that it is `pmap`")
    tx = optclip.clip_by_global_norm(1.0, axis_name="auto")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"types don't show \['i'\]"):
            jax.pmap(tx.init, axis_name="i")(jnp.ones((8, 3)))


def test_auto_ignores_vmap_axis_names():
    tx = optclip.clip_by_global_norm(1.0, axis_name="auto")

    def step(grads):
        return tx.update(grads, tx.init(grads))[1].norm_before

    norms = jax.vmap(step, axis_name="v")(jnp.ones((3, 4)))
    np.testing.assert_allclose(norms, 2.0)


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(
    ("axis_name", "message"),
    [
        ("y", r"`axis_name` names 'y', which is not a bound mesh axis: \['x'\] can"),
        (("x", "y"), "names 'y'"),
        ({"kernel": P("y"), "bias": P()}, "names 'y'"),
        (3, "must be the name of a mesh axis or several, .*, got 3"),
        ({"kernel": "x"}, "`axis_name` must be a tree with the structure of the upd"),
    ],
)
def test_mismatched_axis_names_raise_errors(axis_name, message, check):
    with pytest.raises(ValueError, match=message):
        norm(axis_name, check)


def test_axis_name_outside_shard_map_raises_an_error():
    tx = optclip.clip_by_global_norm(1.0, axis_name="x")
    with pytest.raises(ValueError, match=r"under `jax\.jit` leave it out"):
        tx.update(GRADS, tx.init(GRADS))
