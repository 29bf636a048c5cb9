"""Names of leaves are complete and unique."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip
from optclip import scopes


class Pair(NamedTuple):
    value: jax.Array
    raw_value: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Box:
    value: jax.Array
    get_value: jax.Array


def modules():
    eqx = pytest.importorskip("equinox")

    class Module(eqx.Module):
        value: jax.Array
        raw_value: jax.Array

    return {"enc": Module(jnp.ones(2), jnp.ones(3))}


def partitioned():
    linen = pytest.importorskip("flax.linen")
    boxes = {
        "kernel": linen.Partitioned(jnp.ones(2), names=("x",)),
        "value": linen.LogicallyPartitioned(jnp.ones(3), names=("x",)),
    }
    return {"dense": boxes}


def variables():
    nnx = pytest.importorskip("flax.nnx")

    class Attention(nnx.Module):
        def __init__(self, rngs):
            self.value = nnx.Linear(2, 3, use_bias=False, rngs=rngs)
            self.raw_value = nnx.Param(jnp.ones(2))

    return nnx.state(Attention(nnx.Rngs(0)), nnx.Param)


TREES = {
    "dict": (
        lambda: {"q": {"value": jnp.ones(2), "raw_value": jnp.ones(3)}, "value": 1.0},
        ["q/raw_value", "q/value", "value"],
    ),
    "NamedTuple": (
        lambda: {"q": Pair(jnp.ones(2), jnp.ones(3))},
        ["q/value", "q/raw_value"],
    ),
    "dataclass": (
        lambda: {"q": Box(jnp.ones(2), jnp.ones(3))},
        ["q/value", "q/get_value"],
    ),
    "Equinox": (modules, ["enc/value", "enc/raw_value"]),
    "Linen": (partitioned, ["dense/kernel", "dense/value"]),
    "NNX": (variables, ["raw_value", "value/kernel"]),
    "a slash in a key": (
        lambda: {"a": {"b": jnp.ones(2)}, "a/b": jnp.ones(3), "c": jnp.ones(1)},
        ["['a']['b']", "['a/b']", "c"],
    ),
    "a name that spells keys": (
        lambda: {"['a']['b']": 1.0, "a": {"b": jnp.ones(2)}, "a/b": jnp.ones(3)},
        ["['a']['b']", "['a']['b']#2", "['a/b']"],
    ),
    "an array": (lambda: jnp.ones(3), [""]),
}


@pytest.mark.parametrize("kind", TREES)
def test_names_omit_only_the_fields_of_flax_boxes(kind):
    make, names = TREES[kind]
    params = make()
    tx = optax.chain(optclip.record_norms(), optclip.clip_by_leaf_norm(1.0))
    bad = jax.tree.map(lambda x: x * jnp.nan, params)
    _, state = tx.update(bad, tx.init(params), params)
    rows = optclip.leaf_metrics(state, params)
    assert len(rows) == 4 * len(names)
    norms = [f"{name}/norm" if name else "norm" for name in names]
    assert [key for key in rows if key.split("/")[-1] == "norm"] == norms
    assert sorted(c.path for c in optclip.nonfinite_leaves(state, params)) == sorted(
        names
    )


def test_patterns_and_labels_match_a_field_called_value():
    params = {"head": Pair(jnp.full(4, 3.0), jnp.full(4, 4.0))}
    labels = scopes.label(lambda path: path.rpartition("/")[2])
    tx = optclip.clip_by_rule(1.0, scope=labels)
    _, state = tx.update(params, tx.init(params))
    rows = optclip.leaf_metrics(state, params)
    assert rows["head/value/norm_before"] == 6
    assert rows["head/raw_value/norm_before"] == 8


def test_names_in_a_diagnosis_keep_a_field_called_value():
    params = {"v": {"value": jnp.ones((2, 2))}}
    taps = optclip.diagnosis.tap(
        lambda p, x: jnp.sum(x @ p["v"]["value"]), params, jnp.ones(2)
    )
    assert {site.leaf for site in taps.sites} == {"v/value"}


def test_leaf_has_the_same_name_in_a_group_and_in_the_full_tree():
    params = {"a": {"b": jnp.ones(2)}, "a/b": jnp.full(2, 2.0)}
    clips = {"x": optclip.clip_by_leaf_norm(1.0), "y": optclip.clip_by_leaf_norm(1.0)}
    tx = optax.partition(clips, {"a": {"b": "x"}, "a/b": "y"})
    _, state = tx.update(params, tx.init(params))
    rows = optclip.leaf_metrics(state, params)
    assert rows["['a']['b']/norm_before"] == pytest.approx(2**0.5)
    assert rows["['a/b']/norm_before"] == pytest.approx(8**0.5)


def test_leaves_with_colliding_name_checksums_are_distinguished():
    params = {"buckeroo": jnp.zeros(2), "plumless": jnp.zeros(2)}  # equal checksums
    tx = optax.chain(optclip.clip_by_leaf_norm(1.0), optclip.record_norms())
    grads = {"buckeroo": jnp.full(2, 3.0), "plumless": jnp.array([jnp.nan, 1.0])}
    _, state = tx.update(grads, tx.init(params))
    assert len(set(state[0].nonfinite.leaf_code.tolist())) == 2
    rows = optclip.leaf_metrics(state, params)
    assert np.isnan(rows["plumless/norm_before"])
    assert np.isfinite(rows["buckeroo/norm_before"])
    assert [c.path for c in optclip.nonfinite_leaves(state, params)] == ["plumless"]
