"""Edge cases of element scope: huge entries, all actions, infinities, intervals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip
from optclip import actions, rules, scopes

ELEMENT = scopes.element()


def clipped(tx, grads):
    grads = jnp.asarray(grads, jnp.float32)
    updates, state = jax.jit(tx.update)(grads, tx.init(grads), grads)
    return np.asarray(updates), optclip.metrics(state)


BROUGHT = {
    "rescale-eps": (functools.partial(actions.rescale, eps=1e-6), 1.0),
    "normalize": (actions.normalize, 1.0),
    "soften-rational": (actions.soften(), 1.0),
    "soften-sqrt": (actions.soften("sqrt"), 1.0),
    "zero": (actions.zero, 0.0),
}


@pytest.mark.parametrize("threshold", [1.0, 1e-3, 1e-20])
@pytest.mark.parametrize("name", BROUGHT)
def test_every_action_clips_entries_of_any_size_to_the_bound(name, threshold):
    action, share = BROUGHT[name]
    tx = optclip.clip_by_rule(threshold, scope=ELEMENT, action=action)
    updates, _ = clipped(tx, [1e20, -1e36, 3e38, -np.inf, 3.4028235e38])
    signs = np.array([1, -1, 1, -1, 1])
    np.testing.assert_allclose(updates, signs * share * threshold, rtol=1e-5)


@pytest.mark.parametrize("scope", [scopes.tree(), scopes.leaf(), scopes.unit()])
def test_norms_far_from_the_threshold_are_scaled_to_it(scope):
    @jax.jit
    def run(threshold, grads):
        tx = optclip.clip_by_rule(threshold, scope=scope)
        return tx.update(grads, tx.init(grads))

    for threshold in (1e-36, 1e-20, 1.0):
        for size in (1e-30, 1.0, 2e38, 3.4e38):
            updates, state = run(jnp.float32(threshold), jnp.array([size, 0.0]))
            wanted = min(size, threshold)
            np.testing.assert_allclose(updates, [wanted, 0.0], rtol=1e-5)
            np.testing.assert_allclose(state.norm_after, wanted, rtol=1e-5)


@pytest.mark.parametrize("scope", [scopes.tree(), scopes.leaf(), scopes.unit()])
def test_interval_raises_an_error_outside_the_element_scope(scope):
    with pytest.raises(ValueError, match="about single entries"):
        optclip.clip_by_rule(rules.interval(-3.0, -1.0), scope=scope)

    def update(norm, state, context):
        return rules.Limit(norm, norm, -norm), state

    tx = optclip.clip_by_rule(rules.Rule(lambda norm: (), update), scope=scope)
    with pytest.raises(ValueError, match="two bounds"):
        clipped(tx, [10.0, 0.0])


def test_max_ema_raises_an_error_outside_the_element_scope():
    with pytest.raises(ValueError, match="about single entries"):
        optclip.clip_by_rule(rules.max_ema())


def test_interval_metrics_are_correct():
    tx = optclip.clip_by_value((-0.1, 5.0), record=True)
    updates, metrics = clipped(tx, [-3.0, 0.2, 4.0])
    np.testing.assert_allclose(updates, [-0.1, 0.2, 4.0], rtol=1e-6)
    assert float(metrics["clip/clipped"]) == 1.0
    np.testing.assert_allclose(metrics["clip/worst_scale"], 0.1 / 3.0, rtol=1e-6)
    _, metrics = clipped(tx, [-0.05, 0.2, 4.0])
    assert float(metrics["clip/clipped"]) == 0.0
    assert float(metrics["clip/worst_scale"]) == 1.0


def test_scale_is_the_smallest_factor_even_if_not_of_the_largest_entry():
    tx = optclip.clip_by_rule(jnp.array([1.0, 100.0]), scope=ELEMENT)
    _, metrics = clipped(tx, [10.0, 50.0])
    np.testing.assert_allclose(metrics["clip/worst_scale"], 0.1, rtol=1e-6)
    assert float(metrics["clip/clipped"]) == 1.0


def test_scale_of_entries_that_a_rule_raises_is_above_one():
    def update(size, state, context):
        del context
        return rules.Limit(jnp.zeros_like(size), 1.5 * size), state

    raising = rules.Rule(init=jnp.zeros_like, update=update, name="raising")
    tx = optclip.clip_by_rule(raising, scope=ELEMENT)
    updates, metrics = clipped(tx, [2.0, 0.0, -4.0])
    np.testing.assert_allclose(updates, [3.0, 0.0, -6.0], rtol=1e-6)
    np.testing.assert_allclose(metrics["clip/worst_scale"], 1.5, rtol=1e-6)
    _, metrics = clipped(tx, [0.0, 0.0])
    assert float(metrics["clip/worst_scale"]) == 1.0


# Per-entry methods. After a warm start on entries of size 1, an infinite entry gets the
# same bound as a large finite one.
METHODS = {
    "clip_by_value": lambda p: optclip.clip_by_value(2.0, nonfinite=p),
    "adamw_clip": lambda p: optclip.adamw_clip(nonfinite=p),
    "spam_clip": lambda p: optclip.spam_clip(warmup_steps=2, nonfinite=p),
    "stable_spam_clip": lambda p: optclip.stable_spam_clip(nonfinite=p),
}
LARGE = {"inf": np.inf, "1e30": 1e30}


@pytest.mark.parametrize("policy", ["propagate", "zero", "drop", "skip"])
@pytest.mark.parametrize("name", METHODS)
def test_infinite_entry_is_clipped_like_a_large_one_or_follows_the_policy(name, policy):
    tx = METHODS[name](policy)
    state, update = tx.init(jnp.ones(4)), jax.jit(tx.update)
    for _ in range(50):
        _, state = update(jnp.array([1.0, -1.0, 1.0, 1.0]), state)
    out = {
        kind: np.asarray(update(jnp.array([1.0, value, 1.0, 0.5]), state)[0])
        for kind, value in LARGE.items()
    }
    bound = out["1e30"][1]
    assert 0.9 < bound
    if name != "stable_spam_clip":  # its average includes the large entry
        assert bound < 100
    wanted = np.array([1.0, 0, 1.0, 0.5])
    if policy == "propagate":
        assert np.isfinite(out["inf"][1])
        assert 0.9 < out["inf"][1] < 100
        wanted[1] = out["inf"][1]
    if policy == "skip":
        wanted = np.zeros(4)
    np.testing.assert_allclose(out["inf"], wanted, rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw_clip", "spam_clip"])
def test_infinite_entry_follows_the_policy_before_a_bound_exists(name):
    grads = jnp.array([1.0, jnp.inf])
    for policy, wanted in (("propagate", np.inf), ("zero", 0), ("drop", 0)):
        tx = METHODS[name](policy)
        updates, _ = tx.update(grads, tx.init(grads))
        np.testing.assert_array_equal(updates, [1.0, wanted])


def test_default_action_needs_no_static_args_with_inject_hyperparams():
    tx = optax.inject_hyperparams(optclip.clip_by_rule)(rule=0.5)
    grads = jnp.array([3.0, 4.0])
    updates, state = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(updates, [0.3, 0.4], rtol=1e-6)
    state.hyperparams["rule"] = jnp.float32(1.0)
    np.testing.assert_allclose(tx.update(grads, state)[0], [0.6, 0.8], rtol=1e-6)


WITHOUT = {
    "inf": (lambda: jnp.inf, 1),
    "window_sigma": (lambda: rules.window_sigma(3.0, window=8), 3),
    "log_window_sigma": (lambda: rules.log_window_sigma(window=8), 3),
    "previous_norm": (rules.previous_norm, 1),
    "dual_ema": (rules.dual_ema, 1),
    "ema_sigma": (rules.ema_sigma, 1),
}
ACTIONS = {
    "normalize": actions.normalize,
    "rescale": actions.rescale,
    "soften": actions.soften("tanh"),
    "zero": actions.zero,
}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("name", WITHOUT)
def test_groups_without_a_threshold_are_unchanged_by_every_action(name, action):
    make, steps = WITHOUT[name]
    tx = optclip.clip_by_rule(make(), action=ACTIONS[action])
    grads = jnp.array([3.0, -4.0])
    state, update = tx.init(grads), jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(grads, state)
        np.testing.assert_array_equal(updates, grads)


def test_invalid_regular_expression_is_named_in_the_error():
    with pytest.raises(ValueError, match=r"'\(' is not one"):
        optclip.clip_by_leaf_norm({"(": 1.0}).init({"w": jnp.ones(2)})
