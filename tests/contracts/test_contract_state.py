"""The state has fixed shapes and separate buffers, and works in every wrapper."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import registry

import optclip

PARAMS = {"blocks": np.ones((2, 3, 2), np.float32), "w": np.ones(3, np.float32)}
NUMERIC = {
    "clip": (optclip.clip_by_rule, "rule"),
    "clip_by_value": (optclip.clip_by_value, "max_value"),
    "clip_by_global_norm": (optclip.clip_by_global_norm, "max_norm"),
    "clip_by_leaf_norm": (optclip.clip_by_leaf_norm, "max_norm"),
    "clip_per_layer": (optclip.clip_per_layer, "max_norm"),
    "clip_by_unit_norm": (optclip.clip_by_unit_norm, "max_norm"),
    "clip_by_block_rms": (optclip.clip_by_block_rms, "threshold"),
    "adaptive_grad_clip": (optclip.adaptive_grad_clip, "clipping"),
    "normalize_by_norm": (optclip.normalize_by_norm, "target"),
    "soft_clip": (optclip.soft_clip, "max_norm"),
}


@pytest.fixture(autouse=True)
def fresh_trace_counter():
    """Resets Chex's trace counts, which are keyed by function name over all tests."""
    chex.clear_trace_counter()


def gradients(seed, size=3.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: (size * rng.normal(size=p.shape)).astype(p.dtype), PARAMS
    )


def stacked(trees):
    return jax.tree.map(lambda *xs: np.stack(xs), *trees)


def close(a, b):
    chex.assert_trees_all_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f8_e5m2", "mixed"])
@pytest.mark.parametrize("name", registry.CORE)
def test_shapes_and_dtypes_match_init(name, dtype):
    updates = registry.normal_tree(dtype)
    tx = registry.CASES[name].make(1.0)
    state = tx.init(updates)
    assert {x.dtype.name for x in jax.tree.leaves(state)} <= {"float32", "int32"}
    assert not any(x.weak_type for x in jax.tree.leaves(state))
    out, after = jax.eval_shape(tx.update, updates, state, updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(out, updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    assert not any(x.weak_type for x in jax.tree.leaves(after))


@pytest.mark.parametrize("name", registry.CORE)
def test_init_works_on_shapes_alone(name):
    tx = registry.CASES[name].make(1.0)
    shapes = jax.eval_shape(tx.init, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, tx.init(PARAMS))


@pytest.mark.parametrize("name", registry.DISTINCT)
def test_donated_step_is_traced_once_and_agrees_under_every_transform(name):
    tx = registry.CASES[name].make(1.0)
    grads = [gradients(seed, size) for seed, size in enumerate((3.0, 1e-3, 1e25))]

    @chex.assert_max_traces(n=1)
    def step(updates, state):
        return tx.update(updates, state, PARAMS)

    donated = jax.jit(step, donate_argnums=1)
    state, outs = tx.init(PARAMS), []
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state) if x.size]
    assert len(set(pointers)) == len(pointers)
    for updates in grads:
        out, state = donated(updates, state)
        pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state) if x.size]
        assert len(set(pointers)) == len(pointers)
        outs.append(out)

    @jax.jit
    def scanned(state, trees):
        def body(state, updates):
            out, state = jax.lax.cond(
                updates["w"][0] == updates["w"][0],
                lambda: tx.update(updates, state, PARAMS),
                lambda: (jax.tree.map(jnp.asarray, updates), state),
            )
            return state, out

        return jax.lax.scan(body, state, trees)

    after, looped = scanned(tx.init(PARAMS), stacked(grads))
    close(after, state)
    close(looped, stacked(outs))

    many = jax.tree.map(lambda x: jnp.stack([x] * 3), tx.init(PARAMS))
    batched, _ = jax.jit(jax.vmap(lambda u, s: tx.update(u, s, PARAMS)))(
        stacked(grads), many
    )
    close(batched, stacked(outs))


WRAPPERS = {
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "masked": lambda tx: optax.masked(tx, {"blocks": True, "w": False}),
    "partition": lambda tx: optax.partition(
        {"a": tx, "b": optax.identity()}, {"blocks": "a", "w": "b"}
    ),
    "chain": lambda tx: optax.chain(tx, optax.identity()),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", registry.CORE)
def test_wrappers_preserve_state_structure(name, wrapper):
    tx = WRAPPERS[wrapper](registry.CASES[name].make(1.0))
    state = tx.init(PARAMS)
    out, after = jax.eval_shape(tx.update, PARAMS, state, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(out, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", ["clip-leaf", "clip_by_value", "adaptive_grad_clip"])
def test_wrappers_give_the_same_updates(name, wrapper):
    make = registry.CASES[name].make
    updates = gradients(0)
    plain, _ = jax.jit(make(1.0).update)(updates, make(1.0).init(PARAMS), PARAMS)
    tx = WRAPPERS[wrapper](make(1.0))
    out, _ = jax.jit(tx.update)(updates, tx.init(PARAMS), PARAMS)
    if wrapper in ("masked", "partition"):
        plain["w"] = updates["w"]
    close(out, plain)


def _settings(name):
    stacked = {"stack_axes": registry.STACKED}
    return {"clip_per_layer": stacked, "clip_by_value": {"record": True}}.get(name, {})


@pytest.mark.parametrize("name", NUMERIC)
def test_inject_hyperparams_changes_the_threshold_without_retracing(name):
    factory, argument = NUMERIC[name]
    static = ("ord", "action")  # not schedules, although they look like it
    static = [a for a in static if a in inspect.signature(factory).parameters]
    static += list(_settings(name))
    tx = optax.inject_hyperparams(factory, static_args=static)(
        **{argument: 0.5}, **_settings(name)
    )
    state, updates = tx.init(PARAMS), gradients(0)
    step = jax.jit(chex.assert_max_traces(tx.update, n=1))
    for threshold in (0.5, 0.25):
        state.hyperparams[argument] = jnp.float32(threshold)
        out, state = step(updates, state, PARAMS)
        case = registry.CASES[name]
        wanted = case.expect(updates, PARAMS, threshold).leaves
        for got, exact in zip(jax.tree.leaves(out), wanted, strict=True):
            np.testing.assert_allclose(got, exact.astype(np.float32), rtol=3e-6)
    assert float(optclip.metrics(state)["clip/norm_before"]) > 0


@pytest.mark.parametrize("name", NUMERIC)
def test_inject_hyperparams_works_with_minimal_static_args(name):
    factory, argument = NUMERIC[name]
    # `clip_by_rule` takes a function as its action; Optax would treat it as a schedule.
    static = ("action",) if name == "clip" else ()
    tx = optax.inject_hyperparams(factory, static_args=static)(
        **{argument: 0.5}, **_settings(name)
    )
    state = tx.init(PARAMS)
    _, after = jax.eval_shape(tx.update, PARAMS, state, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


def test_array_valued_ord_raises_an_error_that_suggests_static_args():
    with pytest.raises(ValueError, match=r"static_args=\(\"ord\",\)"):
        optclip.clip_by_global_norm(1.0, ord=jnp.float32(2))


@pytest.mark.parametrize("name", [n for n in NUMERIC if n != "adaptive_grad_clip"])
def test_schedules_are_evaluated_each_step_without_retracing(name):
    factory, argument = NUMERIC[name]
    schedule = optax.linear_schedule(1.0, 0.0, 4)
    tx = factory(**{argument: schedule}, **_settings(name))
    step = jax.jit(chex.assert_max_traces(tx.update, n=1))
    state, updates = tx.init(PARAMS), gradients(0)
    thresholds = []
    for _ in range(3):
        _, state = step(updates, state, PARAMS)
        thresholds.append(float(state.threshold))
    np.testing.assert_allclose(thresholds, [1.0, 0.75, 0.5], rtol=1e-6)


def test_optax_tree_get_finds_state_fields():
    state = optax.chain(optclip.clip_by_rule(1.0), optax.adam(1e-3)).init(PARAMS)
    for field in ("norm_before", "norm_after", "clipped_steps", "nonfinite_steps"):
        assert optax.tree_utils.tree_get(state, field) is not None


def test_updates_with_a_different_structure_than_init_raise_an_error():
    tx = optclip.clip_by_rule(1.0)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="`init` saw 2"):
        tx.update({"blocks": PARAMS["blocks"]}, state)
