"""Results that depend only on the types of updates are cached correctly."""

import chex
import jax
import jax.numpy as jnp
import pytest

import optclip
from optclip import scopes
from optclip.rules import Limit, Rule

PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}


def counting():
    """Returns a rule and a list of the calls of its `init`."""
    calls = []

    def init(norm):
        calls.append(norm.shape)
        return jnp.zeros_like(norm)

    def update(norm, state, context):
        del context
        return Limit(norm / 2, norm / 2), state + 1

    return Rule(init, update, "counting"), calls


@pytest.mark.parametrize("scope", [scopes.tree(), scopes.leaf(), scopes.unit()])
def test_update_does_not_run_init_again(scope):
    rule, calls = counting()
    tx = optclip.clip_by_rule(rule, scope=scope)
    state = tx.init(PARAMS)
    before = len(calls)
    tx.update(PARAMS, state)
    pair = jax.tree.map(lambda x: jnp.stack([x, x]), PARAMS)
    jax.eval_shape(tx.update, PARAMS, state)
    jax.eval_shape(jax.vmap(tx.update, (0, None)), pair, state)
    assert len(calls) == before


def test_state_not_returned_by_init_is_checked_once():
    rule, calls = counting()
    tx = optclip.clip_by_rule(rule)
    state = jax.tree.map(jnp.copy, optclip.clip_by_rule(rule).init(PARAMS))
    before = len(calls)
    for _ in range(3):
        _, state = tx.update(PARAMS, state)
    assert len(calls) == before + 1


def test_trees_of_different_types_do_not_share_cached_results():
    tx = optclip.clip_by_rule(1.0, scope=scopes.leaf())
    trees = [
        PARAMS,
        {"w": jnp.ones((3, 2)), "b": jnp.ones(3)},
        {"w": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones(3)},
        {"w": None, "b": jnp.ones(3)},
        {"w": jnp.ones((2, 3)), "b": jnp.arange(3)},
        [jnp.ones((2, 3)), jnp.ones(3)],
    ]
    fresh = [optclip.clip_by_rule(1.0, scope=scopes.leaf()) for _ in trees]
    for _ in range(2):
        for tree, other in zip(trees, fresh, strict=True):
            got = tx.update(tree, tx.init(tree))
            chex.assert_trees_all_equal(got, other.update(tree, other.init(tree)))


def test_state_of_another_tree_raises_an_error_each_time():
    tx = optclip.clip_by_rule(1.0, scope=scopes.leaf())
    state = tx.init({"w": PARAMS["w"]})
    for _ in range(2):
        with pytest.raises(ValueError, match="does not fit here"):
            tx.update(PARAMS, state)


def test_two_programs_do_not_share_tracers():
    tx = optclip.clip_by_rule({"w": jnp.float32(0.5), "b": 2.0}, scope=scopes.leaf())
    state = tx.init(PARAMS)
    first, second = (jax.jit(lambda g, s: tx.update(g, s)) for _ in range(2))
    with jax.checking_leaks():
        chex.assert_trees_all_equal(first(PARAMS, state), second(PARAMS, state))
