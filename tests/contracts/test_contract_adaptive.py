"""The contracts of structure, state and failures over every adaptive transformation."""

import inspect

import adaptive
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import registry

import optclip

NAMES = list(adaptive.ADAPTIVE)
POLICED = [n for n in NAMES if adaptive.ADAPTIVE[n].policies]
PARAMS = adaptive.params()
MIXED = {
    "blocks": jnp.float32, "kernel": jnp.bfloat16, "bias": jnp.float16,
    "scale": jnp.float32,
}  # fmt: skip


def kinds(tree):
    return {x.dtype.name for x in jax.tree.leaves(tree)}


def close(got, wanted):
    chex.assert_trees_all_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "scope"), adaptive.PAIRS)
@pytest.mark.parametrize(
    "dtype",
    ["mixed", *(pytest.param(d, marks=pytest.mark.slow)
                for d in ("float32", "bfloat16", "float16"))],
)  # fmt: skip
def test_shapes_and_dtypes_of_updates_and_state_never_change(name, scope, dtype):
    if dtype == "mixed":
        params = {k: v.astype(MIXED[k]) for k, v in PARAMS.items()}
    else:
        params = adaptive.params(dtype)
    tx = adaptive.build(name, scope)
    state = tx.init(params)
    out, after = jax.eval_shape(tx.update, params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(out, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    own = state.optimizer_state if name == "stabilize" else ()
    assert kinds(state) <= {"float32", "int32"} | kinds(own)
    places = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state) if x.size]
    assert len(places) == len(set(places)), "two fields share a buffer"


# Each of these stores its memory differently; the others share the code of a rule.
QUICK = ("autoclip", "autoclip-all", "quantile_clip", "spam_clip", "stabilize",
         "u_clip", "zclip")  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in NAMES],
)
def test_scan_and_vmap_agree_with_a_loop(name):
    tx = adaptive.build(name)
    grads = [adaptive.gradients(i, size=10.0 ** (i % 3)) for i in range(6)]
    step = jax.jit(chex.assert_max_traces(tx.update, n=1))
    chex.clear_trace_counter()
    state, outs = tx.init(PARAMS), []
    for g in grads:
        out, state = step(g, state, PARAMS)
        outs.append(out)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *grads)
    wanted = jax.tree.map(lambda *x: jnp.stack(x), *outs)
    after, looped = jax.jit(
        lambda s, gs: jax.lax.scan(lambda s, g: tx.update(g, s, PARAMS)[::-1], s, gs)
    )(tx.init(PARAMS), stacked)
    close(looped, wanted)
    close(after, state)

    many = jax.tree.map(lambda x: jnp.stack([x] * 6), tx.init(PARAMS))
    batched, _ = jax.jit(jax.vmap(lambda g, s: tx.update(g, s, PARAMS)))(stacked, many)
    close(jax.tree.map(lambda x: x[0], batched), outs[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "scope"), [pair for pair in adaptive.PAIRS if pair[1] != "own"]
)
def test_every_scope_supports_scan_vmap_and_donation_and_survives_nan(name, scope):
    tx = adaptive.build(name, scope)
    grads = [adaptive.gradients(i, size=10.0 ** (i % 3)) for i in range(5)]
    grads.insert(3, poisoned(np.nan))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *grads)

    def run(state, grads):
        return jax.lax.scan(lambda s, g: tx.update(g, s, PARAMS)[::-1], state, grads)

    state, outs = jax.jit(run, donate_argnums=(0,))(tx.init(PARAMS), stacked)
    if name != "stabilize":
        chex.assert_tree_all_finite(memory(state))
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), (tx.init(PARAMS), stacked))
    states, both = jax.jit(jax.vmap(run))(*twice)
    close(jax.tree.map(lambda x: x[1], both), outs)
    close(jax.tree.map(lambda x: x[1], states), state)


WRAPPERS = {
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "masked": lambda tx: optax.masked(tx, {k: k != "bias" for k in PARAMS}),
    "partition": lambda tx: optax.partition(
        {"a": tx, "b": optax.identity()},
        {k: "b" if k == "bias" else "a" for k in PARAMS},
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", NAMES)
def test_optax_wrappers_preserve_state_structure(name, wrapper):
    tx = WRAPPERS[wrapper](adaptive.build(name))
    state = tx.init(PARAMS)
    out, after = jax.eval_shape(tx.update, PARAMS, state, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(out, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


PLAIN = [
    n for n in optclip.__all__
    if n in {k.split("-")[0] for k in NAMES} - {"u_clip", "stabilize", "skip_steps"}
]  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_inject_hyperparams_works_without_static_args(name):
    needed = {"spectral_clip": {"max_sigma": 1.0}}.get(name, {})
    tx = optax.inject_hyperparams(getattr(optclip, name))(**needed)
    state = tx.init(PARAMS)
    _, after = jax.eval_shape(tx.update, PARAMS, state, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


def poisoned(value):
    bad = adaptive.gradients(3)
    bad["kernel"] = bad["kernel"].at[0, 0].set(value)
    return bad


def memory(state):
    """Returns the memory of a transformation without its statistics."""
    return getattr(state, "rule_state", state)


@pytest.mark.parametrize(
    "policy",
    [
        "propagate",
        "skip",
        *(pytest.param(p, marks=pytest.mark.slow) for p in ("zero", "drop")),
    ],
)
@pytest.mark.parametrize("name", POLICED)
def test_nonfinite_gradients_do_not_affect_memory(name, policy):
    tx = adaptive.build(name, nonfinite=policy)
    step = jax.jit(tx.update)
    _, before = step(adaptive.gradients(1), tx.init(PARAMS), PARAMS)
    for value in (np.nan, np.inf, -np.inf):
        out, after = step(poisoned(value), before, PARAMS)
        chex.assert_tree_all_finite(memory(after))
        if policy == "skip":
            chex.assert_trees_all_equal(memory(after), memory(before))
            chex.assert_trees_all_equal(out, jax.tree.map(jnp.zeros_like, out))
        if policy in ("zero", "drop"):
            chex.assert_tree_all_finite(out)
        assert int(after.nonfinite.nonfinite_steps) == 1
        assert optclip.nonfinite_leaves(after, PARAMS)[0].path == "kernel"


@pytest.mark.parametrize("name", ["u_clip", "scale_by_stable_adam", "stabilize"])
def test_memory_of_wrappers_stays_finite(name):
    tx = adaptive.build(name)
    step = jax.jit(tx.update)
    _, state = step(adaptive.gradients(1), tx.init(PARAMS), PARAMS)
    for value in (np.nan, np.inf, 1e30):
        _, state = step(poisoned(value), state, PARAMS)
        kept = state.carry if name == "u_clip" else state
        if name == "stabilize":
            kept = (state.optimizer_state, memory(state.gradient_clip))
        chex.assert_tree_all_finite(kept)


def test_stabilize_skips_a_bad_step():
    tx = adaptive.build("stabilize")
    step = jax.jit(tx.update)
    _, before = step(adaptive.gradients(1), tx.init(PARAMS), PARAMS)
    out, after = step(poisoned(np.nan), before, PARAMS)
    chex.assert_trees_all_equal(out, jax.tree.map(jnp.zeros_like, out))
    chex.assert_trees_all_equal(after.optimizer_state, before.optimizer_state)
    assert int(optclip.metrics(after)["clip/nonfinite_steps"]) == 1


def test_stabilize_passes_integer_leaves_through():
    tx = adaptive.build("stabilize")
    mixed = {"weight": jnp.ones(3), "count": jnp.arange(2)}
    out, _ = jax.jit(tx.update)(mixed, tx.init(mixed), mixed)
    chex.assert_trees_all_equal(out["count"], mixed["count"])
    assert out["count"].dtype == mixed["count"].dtype


@pytest.mark.parametrize(
    "name", ["cap_update", "trust_ratio_clip", "stabilize", "scale_by_stable_adam"]
)
def test_missing_params_raise_an_error_naming_the_transformation(name):
    tx = adaptive.build(name)
    with pytest.raises(ValueError, match=f"`{name}`"):
        tx.update(PARAMS, tx.init(PARAMS))


def test_zero_parameters_can_move_away_from_zero():
    for tx in (optclip.cap_update(), optclip.stabilize(optax.sgd(0.1))):
        zeros = jax.tree.map(jnp.zeros_like, PARAMS)
        out, _ = tx.update(adaptive.gradients(0), tx.init(zeros), zeros)
        assert float(optclip.norms.global_norm(out)) > 0


def test_every_adaptive_transformation_is_covered():
    functions = {n for n in optclip.__all__ if inspect.isfunction(getattr(optclip, n))}
    fixed = {case.public for case in registry.CASES.values()}
    here = {n.split("-")[0] for n in NAMES}
    assert here == functions - fixed - registry.OTHERS
