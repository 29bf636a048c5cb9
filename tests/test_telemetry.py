"""Metrics compared with hand-computed examples, nested states, several clips."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip
from optclip import NonfiniteLeaf, scopes

PARAMS = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
GRADS = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.0, 12.0])}  # norms 5, 12; 13
KEYS = {
    "norm_before", "norm_after", "threshold", "scale", "clipped", "steps",
    "clipped_steps", "clipped_fraction", "nonfinite_steps",
}  # fmt: skip


def stepped(tx, *updates, params=PARAMS):
    state = tx.init(params)
    step = jax.jit(tx.update)
    for u in updates or (GRADS,):
        _, state = step(u, state, params)
    return state


def float_metrics(state, **options):
    return {k: float(v) for k, v in optclip.metrics(state, **options).items()}


def test_metrics_of_a_global_clip_match_a_hand_computed_example():
    small = jax.tree.map(lambda x: x / 130, GRADS)
    nan = {"a": GRADS["a"] * jnp.nan, "b": GRADS["b"]}
    got = float_metrics(
        stepped(optclip.clip_by_global_norm(6.5), nan, small, small, GRADS)
    )
    wanted = {
        "norm_before": 13.0, "norm_after": 6.5, "threshold": 6.5, "scale": 0.5,
        "clipped": 1.0, "steps": 4.0, "clipped_steps": 1.0, "clipped_fraction": 0.25,
        "nonfinite_steps": 1.0,
    }  # fmt: skip
    chex.assert_trees_all_close(
        got, {f"clip/{k}": v for k, v in wanted.items()}, rtol=1e-6
    )


def test_empty_prefix_raises_an_error():
    with pytest.raises(ValueError, match="`prefix` must be a non-empty string, got ''"):
        optclip.metrics((), prefix="")


def test_metrics_of_a_fresh_state_match_the_docstring():
    got = float_metrics(optclip.clip_by_rule(1.0).init(PARAMS))
    assert got.pop("clip/scale") == 1
    assert set(got.values()) == {0}


def test_metrics_of_a_leaf_clip_report_the_most_strongly_clipped_group():
    got = float_metrics(stepped(optclip.clip_by_leaf_norm(jnp.array([4.0, 6.0]))))
    assert got["clip/worst_threshold"] == 6
    assert got["clip/worst_scale"] == 0.5
    assert not {"clip/threshold", "clip/scale"} & set(got)
    assert got["clip/clipped"] == 1
    np.testing.assert_allclose(got["clip/norm_after"], np.hypot(4, 6), rtol=1e-6)
    got = float_metrics(stepped(optclip.clip_by_leaf_norm(10.0)))
    assert got["clip/clipped"] == 0.5


def test_ties_in_scale_report_the_smallest_threshold():
    tx = optclip.clip_by_rule({"a": 1.0, "b": 0.1}, scope=scopes.leaf())
    update = jax.jit(tx.update)
    for size in range(2, 40):
        # 1 / size and 0.1 / (0.1 * size) differ by rounding, in either direction.
        grads = {"a": jnp.array([float(size)]), "b": jnp.array([size * 0.1])}
        _, state = update(grads, tx.init(grads))
        np.testing.assert_allclose(state.threshold, 0.1, rtol=1e-6, err_msg=f"{size}")


def test_scale_is_the_smallest_factor_even_if_all_groups_are_scaled_up():
    tx = optclip.normalize_by_norm(60.0, scope=scopes.leaf())
    np.testing.assert_allclose(
        float_metrics(stepped(tx))["clip/worst_scale"], 5.0, rtol=1e-6
    )


def test_norm_metrics_of_a_value_clip_are_largest_magnitudes():
    got = float_metrics(stepped(optclip.clip_by_value(3.0, record=True)))
    assert got["clip/norm_before"] == 12
    assert got["clip/norm_after"] == 3
    assert got["clip/worst_scale"] == 0.25
    assert got["clip/clipped"] == 1


def test_norm_before_is_nan_or_inf_like_the_updates():
    for value in (np.nan, np.inf):
        bad = {"a": jnp.array([value, 1.0]), "b": GRADS["b"]}
        got = float_metrics(stepped(optclip.clip_by_rule(1.0), bad))
        np.testing.assert_equal(got["clip/norm_before"], value)


def with_inject():
    return optax.inject_hyperparams(
        lambda rate: optax.chain(optclip.clip_by_rule(6.5), optax.sgd(rate))
    )(rate=0.1)


NESTED = {
    "chain": lambda: optax.chain(optclip.clip_by_rule(6.5), optax.adam(1e-3)),
    "nested chain": lambda: optax.chain(
        optax.chain(optclip.clip_by_rule(6.5)), optax.sgd(1.0)
    ),
    "MultiSteps": lambda: optax.MultiSteps(optclip.clip_by_rule(6.5), 1),
    "inject_hyperparams": with_inject,
    "apply_if_finite": lambda: optax.apply_if_finite(optclip.clip_by_rule(6.5), 3),
    "masked": lambda: optax.masked(optclip.clip_by_rule(6.5), {"a": True, "b": True}),
}


@pytest.mark.parametrize("nesting", NESTED)
def test_metrics_are_found_at_any_depth(nesting):
    got = float_metrics(stepped(NESTED[nesting]()))
    assert set(got) == {f"clip/{k}" for k in KEYS}
    assert got["clip/norm_before"] == 13
    assert got["clip/norm_after"] == 6.5


def test_metrics_are_found_in_an_nnx_optimizer():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    tx = optax.chain(
        optclip.clip_by_leaf_norm(1.0), optclip.record_norms(), optax.sgd(0.1)
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 2))) ** 2))(model)
        optimizer.update(model, grads)
        return optclip.metrics(optimizer.opt_state)

    inside = step(model, optimizer)
    outside = optclip.metrics(optimizer.opt_state)
    chex.assert_trees_all_close(inside, outside)
    assert float(outside["clip/steps"]) == 1
    assert float(outside["clip/norm_before"]) > 0
    params = nnx.state(model, nnx.Param)
    rows = optclip.leaf_metrics(optimizer.opt_state, params)
    assert {"bias/norm_before", "kernel/scale", "kernel/norm"} <= set(rows)


def test_several_clips_are_numbered_in_chain_order():
    tx = optax.chain(
        optclip.record_norms(), optclip.clip_by_rule(6.5), optclip.clip_by_rule(1.3)
    )
    got = float_metrics(stepped(tx), prefix="grad")
    assert got["grad/norms/global_norm"] == 13
    assert got["grad/norms/steps"] == 1
    assert got["grad/norm_before"] == 13
    np.testing.assert_allclose(got["grad_2/norm_before"], 6.5, rtol=1e-6)
    np.testing.assert_allclose(got["grad_2/norm_after"], 1.3, rtol=1e-6)
    assert len(got) == 2 * len(KEYS) + 3


def test_metrics_inside_and_outside_jit_match():
    tx = optclip.clip_by_rule(6.5)

    @jax.jit
    def step(updates, state):
        _, state = tx.update(updates, state)
        return state, optclip.metrics(state)

    state, inside = step(GRADS, tx.init(PARAMS))
    chex.assert_trees_all_equal(inside, optclip.metrics(state))
    chex.assert_rank(jax.tree.leaves(inside), 0)


def rows(tx, params=PARAMS, grads=GRADS):
    found = optclip.leaf_metrics(stepped(tx, grads, params=params), params)
    return {k: round(float(v), 5) for k, v in found.items()}


def test_leaf_metrics_of_a_leaf_clip():
    assert rows(optclip.clip_by_leaf_norm(6.0)) == {
        "a/norm_before": 5, "a/threshold": 6, "a/scale": 1,
        "b/norm_before": 12, "b/threshold": 6, "b/scale": 0.5,
    }  # fmt: skip


def test_leaf_metrics_of_a_label_clip_are_those_of_its_group():
    tx = optclip.clip_by_rule(6.5, scope=scopes.label(lambda path: "both"))
    got = rows(tx)
    assert got["a/norm_before"] == got["b/norm_before"] == 13
    assert got["a/scale"] == got["b/scale"] == 0.5


def test_leaf_metrics_of_a_layer_clip_number_the_layers():
    params = {"blocks": jnp.zeros((2, 2)), "w": jnp.zeros(2)}
    grads = {"blocks": jnp.array([[3.0, 4.0], [0.0, 12.0]]), "w": jnp.array([0.0, 1.0])}
    assert rows(optclip.clip_per_layer(6.0, {"blocks": 1}), params, grads) == {
        "blocks/0/norm_before": 5, "blocks/0/threshold": 6, "blocks/0/scale": 1,
        "blocks/1/norm_before": 12, "blocks/1/threshold": 6, "blocks/1/scale": 0.5,
        "w/norm_before": 1, "w/threshold": 6, "w/scale": 1,
    }  # fmt: skip


def test_leaf_metrics_of_several_clips_and_monitors_are_distinguished():
    tx = optax.chain(
        optclip.record_norms(), optclip.clip_by_leaf_norm(6.0),
        optclip.clip_by_leaf_norm(1.0), optclip.record_norms(),
    )  # fmt: skip
    got = rows(tx)
    assert got["b/norm"] == 12
    assert got["b/norm_2"] == 1
    assert got["b/norm_before_2"] == 6


@pytest.mark.parametrize("wrap", ["masked", "partition"])
def test_leaf_metrics_and_nonfinite_leaves_name_the_right_leaf_of_partial_updates(wrap):
    inner = optclip.clip_by_leaf_norm(6.0)
    tx = {
        "masked": lambda: optax.masked(inner, {"a": False, "b": True}),
        "partition": lambda: optax.partition(
            {"x": optax.identity(), "y": inner}, {"a": "x", "b": "y"}
        ),
    }[wrap]()
    assert set(rows(tx)) == {"b/norm_before", "b/threshold", "b/scale"}
    bad = {"a": GRADS["a"], "b": jnp.array([np.nan, np.inf])}
    assert optclip.nonfinite_leaves(stepped(tx, bad), PARAMS) == [
        NonfiniteLeaf("b", 0, True, True, False)
    ]


@pytest.mark.parametrize(
    "make",
    [
        lambda: optclip.clip_by_rule(1.0),
        lambda: optclip.clip_by_unit_norm(1.0),
        lambda: optclip.clip_by_value(1.0, record=True),
        lambda: optclip.clip_by_rule(1.0, ord=3, nonfinite="drop"),
        optclip.record_norms,
    ],
    ids=["tree", "unit", "element", "ord3-drop", "record_norms"],
)
def test_nonfinite_leaves_lists_the_kinds_per_leaf_in_tree_order(make):
    bad = {"a": jnp.array([-np.inf, 1.0]), "b": jnp.array([np.nan, np.inf])}
    state = stepped(make(), GRADS, bad, GRADS)
    assert optclip.nonfinite_leaves(state, PARAMS) == [
        NonfiniteLeaf("a", 1, False, False, True),
        NonfiniteLeaf("b", 1, True, True, False),
    ]


def test_parameters_that_differ_from_init_raise_an_error():
    state = stepped(
        optclip.clip_by_leaf_norm(1.0), {k: v * jnp.nan for k, v in GRADS.items()}
    )
    with pytest.raises(ValueError, match="that the optimizer was initialized with"):
        optclip.leaf_metrics(state, {"c": jnp.zeros(2)})
    with pytest.raises(ValueError, match="that the optimizer was initialized with"):
        optclip.nonfinite_leaves(state, {"c": jnp.zeros(2)})


def test_batch_of_states_raises_an_actionable_error():
    state = jax.tree.map(
        lambda x: jnp.stack([x, x]), optclip.clip_by_rule(1.0).init(PARAMS)
    )
    with pytest.raises(ValueError, match="take one of them"):
        optclip.nonfinite_leaves(state, PARAMS)
    assert optclip.metrics(state)["clip/scale"].shape == (2,)


def test_record_norms_leaves_updates_bitwise_unchanged():
    updates = {"a": jnp.array([np.nan, 1e-42, -0.0]), "b": jnp.array([np.inf, 3e38])}
    tx = optclip.record_norms(ord=1)
    out, _ = jax.jit(tx.update)(updates, tx.init(updates))
    for key, value in updates.items():
        a, b = np.asarray(out[key]), np.asarray(value)
        np.testing.assert_array_equal(a.view(np.int32), b.view(np.int32))


@pytest.mark.parametrize("maker", [
    lambda tx: optax.chain(tx, optax.adam(1e-3)),
    lambda tx: optax.MultiSteps(optax.chain(tx, optax.lion(1e-3)), 1),
    lambda tx: optax.chain(optax.trace(0.9), optax.flatten(optax.identity()), tx),
    lambda tx: optclip.skip_steps(optax.chain(tx, optax.adam(1e-3))),
    lambda tx: optax.partition(
        {"own": optax.chain(tx, optax.adam(1e-3)), "rest": optax.sgd(1e-3)},
        {"a": {"w": "own", "b": "rest"}, "c": [{"w": "own"}]},
    ),
])  # fmt: skip
def test_leaf_names_are_inferred_from_optimizer_moments(maker):
    params = {"a": {"w": jnp.ones(2), "b": jnp.ones(3)}, "c": [{"w": jnp.ones(4)}]}
    bad = {"a": {"w": jnp.ones(2), "b": jnp.ones(3)}, "c": [{"w": jnp.full(4, np.nan)}]}
    tx = maker(optax.chain(optclip.record_norms(), optclip.clip_by_leaf_norm(1.0)))
    state = tx.init(params)
    _, state = tx.update(params, state, params)
    _, state = tx.update(bad, state, params)
    (leaf,), (same,) = (optclip.nonfinite_leaves(state, p) for p in (None, params))
    assert leaf[:5] == same[:5] == ("c/0/w", 1, True, False, False)
    got, wanted = optclip.leaf_metrics(state), optclip.leaf_metrics(state, params)
    assert got.keys() == wanted.keys()
    assert {"a/w/scale", "c/0/w/norm"} <= got.keys()


def test_naming_leaves_requires_parameters_if_there_are_no_moments():
    tx = optax.chain(optclip.clip_by_leaf_norm(1.0), optax.sgd(1e-3))
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    assert optclip.nonfinite_leaves(state) == []  # there are no leaves to name
    with pytest.raises(ValueError, match="`params` is needed to name leaves"):
        optclip.leaf_metrics(state)
    bad = jax.tree.map(lambda x: x * np.nan, GRADS)
    _, state = tx.update(bad, tx.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="`params` is needed to name leaves"):
        optclip.nonfinite_leaves(state)


@pytest.mark.parametrize("optimizer", [optax.adam(1e-3), optax.sgd(1e-3)])
def test_bare_array_has_the_empty_path(optimizer):
    params = jnp.ones(3)
    tx = optax.chain(optclip.record_norms(), optclip.clip_by_leaf_norm(1.0), optimizer)
    _, state = tx.update(params * np.nan, tx.init(params), params)
    for given in (None, params):
        (leaf,) = optclip.nonfinite_leaves(state, given)
        assert leaf.path == ""
        names = {"norm", "norm_before", "threshold", "scale"}
        assert optclip.leaf_metrics(state, given).keys() == names
