"""Clips without statistics: they give the same updates and compute no norms."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip
from optclip import rules, scopes
from optclip.rules import Limit, Rule

PARAMS = {"w": jnp.zeros((4, 6)), "b": jnp.zeros(6)}
POLICIES = ("propagate", "zero", "drop", "skip")


def grads(bad=None):
    rng = np.random.default_rng(0)
    found = {k: rng.normal(size=x.shape) for k, x in PARAMS.items()}
    if bad is not None:
        found["w"][1, 2] = bad
    return {k: jnp.asarray(x, jnp.float32) for k, x in found.items()}


def warming_up(step):
    return 0.1 * (step + 1)


CLIPS = {
    "value": functools.partial(optclip.clip_by_value, 0.5),
    "interval": functools.partial(optclip.clip_by_value, (-0.1, 0.7)),
    "schedule": functools.partial(optclip.clip_by_value, warming_up),
    "tree": functools.partial(optclip.clip_by_rule, 1.0),
    "unit": functools.partial(optclip.clip_by_rule, 1.0, scope=scopes.unit()),
    "moments": functools.partial(
        optclip.clip_by_rule, rules.second_moment(2.0), scope=scopes.element()
    ),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", CLIPS)
def test_updates_and_memory_are_the_same_without_a_record(name, policy):
    recorded = CLIPS[name](nonfinite=policy, record=True)
    bare = CLIPS[name](nonfinite=policy, record=False)
    with_record, without = recorded.init(PARAMS), bare.init(PARAMS)
    record_step, bare_step = jax.jit(recorded.update), jax.jit(bare.update)
    for each in (grads(), grads(np.nan), grads(), grads(np.inf), grads()):
        wanted, with_record = record_step(each, with_record)
        got, without = bare_step(each, without)
        chex.assert_trees_all_close(got, wanted, rtol=1e-6)
        chex.assert_trees_all_close(without.rule_state, with_record.rule_state)
    assert int(without.steps) == int(with_record.steps) == 5


def reductions(tx):
    text = jax.jit(tx.update).lower(PARAMS, tx.init(PARAMS)).as_text()
    return len(re.findall(r"stablehlo\.reduce\b", text))


@pytest.mark.parametrize("policy", ["propagate", "zero", "drop"])
@pytest.mark.parametrize("name", ["value", "interval", "schedule"])
def test_clip_by_value_without_a_record_reads_updates_once(name, policy):
    assert reductions(CLIPS[name](nonfinite=policy)) == 0
    assert reductions(CLIPS[name](nonfinite=policy, record=True)) > 0


def test_skip_policy_checks_all_updates_even_without_a_record():
    assert reductions(CLIPS["value"](nonfinite="skip")) > 0


def test_user_defined_rule_sees_the_tree_norm_without_a_record():
    def update(norm, state, context):
        del norm
        return Limit(context.tree_norm / 2, context.tree_norm / 2), state

    rule = Rule(lambda norm: (), update, "half")
    tx = optclip.clip_by_rule(rule, scope=scopes.element(), record=False)
    got, _ = tx.update({"w": jnp.array([1.0, -4.0])}, tx.init({"w": jnp.zeros(2)}))
    chex.assert_trees_all_equal(got, {"w": jnp.array([1.0, -2.0])})


def test_readers_find_nothing_in_a_clip_without_a_record():
    tx = optax.chain(optclip.clip_by_value(0.5), optclip.clip_by_global_norm(1.0))
    _, state = tx.update(grads(), tx.init(PARAMS))
    assert isinstance(state[0], optclip.states.UnrecordedState)
    assert set(optclip.metrics(state)) == set(optclip.metrics(state[1]))
    assert optclip.nonfinite_leaves(state, PARAMS) == []
    assert optclip.metrics(state[0]) == {}
    with pytest.raises(ValueError, match="`record=False`, as `clip_by_value` is"):
        optclip.nonfinite_leaves(state[0])


@pytest.mark.parametrize("make", [optclip.clip_by_rule, optclip.clip_by_value])
@pytest.mark.parametrize("record", [None, 1, "yes"])
def test_record_must_be_true_or_false(make, record):
    with pytest.raises(TypeError, match="`record` must be True or False, got"):
        make(1.0, record=record)


def test_partial_updates_are_accepted_without_a_record():
    tx = optclip.clip_by_value(0.5)
    state = tx.init(PARAMS)
    part = {"w": grads()["w"], "b": None}
    got, after = tx.update(part, state)
    chex.assert_trees_all_equal_structs(after, state)
    chex.assert_trees_all_equal(got["w"], jnp.clip(part["w"], -0.5, 0.5))
    with pytest.raises(ValueError, match="`state` is a `UnrecordedState` that does"):
        tx.update({"w": part["w"]}, state)
