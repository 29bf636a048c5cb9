"""Which entries share a norm in each scope, and errors for invalid arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optclip
from optclip import rules, scopes

PARAMS = {"blocks": {"w": jnp.ones((2, 3, 4))}, "head": {"b": jnp.ones(2)}}
ALL = {
    "tree": scopes.tree(),
    "leaf": scopes.leaf(),
    "label": scopes.label(lambda path: path.split("/")[0]),
    "layer": scopes.layer({"blocks": 1}),
    "unit": scopes.unit(),
    "element": scopes.element(),
}


def clipped(scope, updates=PARAMS, threshold=1.0):
    tx = optclip.clip_by_rule(threshold, scope=scope)
    return jax.jit(tx.update)(updates, tx.init(updates))[0]


def norms_of(x, axes=None):
    return np.sqrt(np.sum(np.square(x), axis=axes))


def test_tree_scope_is_one_group():
    out = clipped(scopes.tree())
    np.testing.assert_allclose(
        np.hypot(norms_of(out["blocks"]["w"]), norms_of(out["head"]["b"])), 1, rtol=1e-6
    )


def test_leaf_scope_has_one_group_per_leaf():
    for leaf in jax.tree.leaves(clipped(scopes.leaf())):
        np.testing.assert_allclose(norms_of(leaf), 1, rtol=1e-6)


@pytest.mark.parametrize("stack", [1, {"blocks": 1}, lambda path: int("w" in path)])
def test_layer_scope_has_one_group_per_layer_of_a_stacked_leaf(stack):
    updates = {"blocks": {"w": PARAMS["blocks"]["w"]}}
    out = clipped(scopes.layer(stack), updates)["blocks"]["w"]
    np.testing.assert_allclose(norms_of(out, (1, 2)), [1, 1], rtol=1e-6)


def test_leaf_that_matches_no_pattern_is_one_group():
    out = clipped(scopes.layer({"blocks": 1}))["head"]["b"]
    np.testing.assert_allclose(norms_of(out), 1, rtol=1e-6)


def test_two_leading_axes_may_index_layers():
    out = clipped(scopes.layer({"blocks": 2}))["blocks"]["w"]
    np.testing.assert_allclose(norms_of(out, 2), np.ones((2, 3)), rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((), ()), ((4,), (0,)), ((4, 3), (0,)), ((2, 4, 3), (0,)),
        ((2, 2, 3, 4), (0, 1, 2)), ((2, 1, 2, 3, 4), (0, 1, 2, 3)),
    ],
)  # fmt: skip
def test_default_units_are_the_output_channels(shape, axes):
    out = clipped(scopes.unit(), {"x": jnp.full(shape, 3.0)})["x"]
    np.testing.assert_allclose(
        norms_of(out, axes), np.ones(norms_of(out, axes).shape), rtol=1e-6
    )


@pytest.mark.parametrize("axis", [-1, (1,), {"w": 1}, lambda path: (1,)])
def test_unit_axes_can_be_given(axis):
    out = clipped(scopes.unit(axis), {"w": jnp.ones((2, 3))})["w"]
    np.testing.assert_allclose(norms_of(out, 1), [1, 1], rtol=1e-6)


@pytest.mark.parametrize(
    "labels",
    [lambda path: path[0], {"blocks": "x", "head": "y"},
     {"blocks": {"w": "x"}, "head": {"b": "y"}}],
    ids=["function", "prefix", "tree"],
)  # fmt: skip
def test_leaves_with_the_same_label_share_a_norm(labels):
    out = clipped(scopes.label(labels))
    np.testing.assert_allclose(norms_of(out["head"]["b"]), 1, rtol=1e-6)
    updates = {
        "blocks": {"w": jnp.ones(3), "v": jnp.ones(1)},
        "head": {"b": jnp.ones(2)},
    }
    if callable(labels):
        out = clipped(scopes.label(labels), updates)
        np.testing.assert_allclose(out["blocks"]["w"], [0.5] * 3, rtol=1e-6)


def test_element_scope_has_one_group_per_entry_and_keeps_signs():
    out = clipped(scopes.element(), {"x": jnp.array([-3.0, 0.5, jnp.inf, -0.0])})["x"]
    np.testing.assert_array_equal(out, [-1, 0.5, 1, 0])


def half_of_mean():
    """A user-defined rule in under ten lines."""

    def update(norm, mean, context):
        mean = (mean * context.step + norm) / (context.step + 1)
        return rules.Limit(mean / 2, mean / 2), mean

    return rules.Rule(lambda norm: jnp.zeros_like(norm), update)


@pytest.mark.parametrize("name", ALL)
def test_user_defined_rule_works_in_every_scope(name):
    tx = optclip.clip_by_rule(half_of_mean(), scope=ALL[name])
    step = jax.jit(tx.update)
    out, state = step(PARAMS, tx.init(PARAMS))
    for leaf in jax.tree.leaves(out):
        np.testing.assert_allclose(leaf, np.full(leaf.shape, 0.5), rtol=1e-6)
    out, state = step(jax.tree.map(lambda x: 3 * x, PARAMS), state)
    for leaf in jax.tree.leaves(out):  # mean 2, so the limit is 1 of 3
        np.testing.assert_allclose(leaf, np.full(leaf.shape, 1.0), rtol=1e-6)


@pytest.mark.parametrize("stack", [-1, True, 1.5, "one"])
def test_invalid_stack_axes_raise_errors(stack):
    with pytest.raises(ValueError, match="`stack_axes` must be an int"):
        clipped(scopes.layer(stack))


def test_leaf_with_too_few_axes_is_named():
    with pytest.raises(ValueError, match=r"`head/b` of shape \(2,\) it is 2"):
        clipped(scopes.layer(2))


@pytest.mark.parametrize(
    ("axis", "message"),
    [(3, "has no axis 3"), (-2, "has no axis -2"), ((0, "x"), "has no axis 'x'")],
)
def test_out_of_range_axes_raise_errors(axis, message):
    with pytest.raises(ValueError, match=message):
        clipped(scopes.unit(axis), {"b": jnp.ones(2)})


def test_leaf_of_rank_six_has_no_default_units():
    with pytest.raises(ValueError, match="`axis` must be given for `x`"):
        clipped(scopes.unit(), {"x": jnp.ones((1,) * 6)})


@pytest.mark.parametrize("make", [scopes.layer, scopes.unit])
def test_patterns_must_be_strings(make):
    with pytest.raises(TypeError, match="must map regular expressions"):
        clipped(make({0: 1}))


def test_mismatched_labels_raise_errors():
    with pytest.raises(ValueError, match="`labels` must be a function of the path"):
        clipped(scopes.label({"blocks": "x"}))


def test_invalid_scope_raises_an_error():
    with pytest.raises(TypeError, match="`scope` must be a Scope made by"):
        optclip.clip_by_rule(1.0, scope="leaf")
