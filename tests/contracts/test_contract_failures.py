"""Non-finite gradients: every policy, kind of entry and transformation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import registry

import optclip
from optclip import rules, scopes

BAD = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}
POLICIES = ("propagate", "zero", "drop", "skip")
CLIPS = [name for name in registry.DISTINCT if name != "record_norms"]
# One of each scope, and the one action that scales up; the others share their code.
QUICK = {"clip", "clip-label", "clip_by_leaf_norm", "clip_per_layer", "clip_by_value",
         "adaptive_grad_clip", "normalize_by_norm"}  # fmt: skip
QUICK_CLIPS = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in CLIPS
]


def poisoned(value):
    """Returns a tree with one non-finite entry, so that most groups stay finite."""
    updates = registry.normal_tree("f32", 5.0)
    updates["blocks"][1, 2, 0] = value
    return updates


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", QUICK_CLIPS)
def test_each_nonfinite_policy_matches_the_oracle(name, policy):
    case, params = registry.CASES[name], registry.normal_tree("f32", seed=1)
    for kind, value in BAD.items():
        updates = poisoned(value)
        with np.errstate(invalid="ignore"):
            expected = case.expect(updates, params, 1.0, policy)
        out, state = registry.run(name, updates, 1.0, params, policy)
        for got, exact in zip(jax.tree.leaves(out), expected.leaves, strict=True):
            bad = ~np.isfinite(exact)
            np.testing.assert_array_equal(np.asarray(got)[bad], exact[bad], kind)
            oracle.assert_rounded_once(
                np.where(bad, 0, got).astype(np.float32), np.where(bad, 0, exact), 4e-6
            )
        column = list(BAD).index(kind)
        kinds = np.zeros(3)
        kinds[column] = 1
        np.testing.assert_array_equal(state.nonfinite.nonfinite_kinds.sum(0), kinds)
        assert int(state.nonfinite.nonfinite_steps) == 1
        assert int(state.nonfinite.last_nonfinite_step) == 0
        if policy == "skip":
            assert float(state.norm_after) == 0
        if policy in ("zero", "drop"):
            assert np.isfinite(state.norm_after)


@pytest.mark.parametrize("name", CLIPS)
def test_finite_updates_after_a_bad_step_are_clipped_normally(name):
    make, params = registry.CASES[name].make, registry.normal_tree("f32", seed=1)
    state = make(1.0).init(params)
    step = registry.stepper(name)
    _, state = step(jnp.float32(1), poisoned(np.nan), state, params)
    good = registry.normal_tree("f32", 5.0)
    again, state = step(jnp.float32(1), good, state, params)
    fresh, _ = registry.run(name, good, 1.0, params)
    chex.assert_trees_all_equal(again, fresh)
    assert int(state.nonfinite.nonfinite_steps) == 1
    assert int(state.steps) == 2


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_record_norms_counts_nonfinite_entries_and_passes_them_through(value):
    out, state = registry.run("record_norms", poisoned(value))
    chex.assert_trees_all_equal(out, poisoned(value))
    assert int(state.nonfinite.nonfinite_kinds.sum()) == 1
    assert not np.isfinite(state.recorded_norm)


def first_norm():
    """A rule with memory: the threshold is the largest norm so far, plus one."""

    def update(norm, top, context):
        del context
        top = jnp.maximum(norm, top)
        return rules.Limit(top + 1, top + 1), top

    return rules.Rule(jnp.zeros_like, update)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("scope", [scopes.tree(), scopes.leaf(), scopes.unit()])
def test_state_of_a_user_defined_rule_stays_finite(scope, policy):
    tx = optclip.clip_by_rule(first_norm(), scope=scope, nonfinite=policy)
    params = {"a": jnp.ones((3, 2)), "b": jnp.ones(3)}
    step = jax.jit(tx.update)
    _, before = step(params, tx.init(params))
    for value in BAD.values():
        bad = {"a": params["a"].at[0, 0].set(value), "b": params["b"] * 2}
        _, after = step(bad, before)
        chex.assert_tree_all_finite(after.rule_state)
        if policy == "skip" or (scope.name == "tree" and policy != "drop"):
            chex.assert_trees_all_equal(after.rule_state, before.rule_state)


@pytest.mark.parametrize("name", CLIPS)
def test_norm_overflow_is_not_counted_as_a_nonfinite_gradient(name):
    _, state = registry.run(name, registry.full_tree("f32", 3e38), 1.0)
    assert int(state.nonfinite.nonfinite_steps) == 0
    assert np.isfinite(state.norm_before)


def test_float64_entries_beyond_float32_give_finite_statistics(x64):
    del x64
    for name in ("clip", "clip-leaf", "clip-element", "record_norms"):
        _, state = registry.run(name, registry.full_tree("f64", 1e200), 1.0)
        chex.assert_tree_all_finite(state)
        assert int(state.nonfinite.nonfinite_steps) == 0
