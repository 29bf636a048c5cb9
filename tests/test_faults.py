"""Faults of Optax (and one of its users' habits) that optclip must not have.

Each test is named after the fault's number in the survey of peers. Its first half shows
what Optax does, its second what optclip does. Optax 0.2.5 to 0.2.8 behave alike in all
of them; `NEW` guards APIs that older versions of Optax lack.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip

NEW = hasattr(optax, "monitor")  # since Optax 0.2.7


def exact_norm(tree):
    """The global norm, computed by NumPy in float64."""
    leaves = [np.asarray(x) for x in jax.tree.leaves(tree)]
    wide = [x if np.iscomplexobj(x) else x.astype(np.float64) for x in leaves]
    return np.sqrt(sum(np.sum(np.abs(x).astype(np.float64) ** 2) for x in wide))


def apply(tx, grads, params=None):
    """Returns one update from a fresh state."""
    params = grads if params is None else params
    return tx.update(grads, tx.init(params), params)[0]


def optax_clip(grads, max_norm=1.0):
    return apply(optax.clip_by_global_norm(max_norm), grads)


def our_clip(grads, max_norm=1.0, **options):
    return apply(optclip.clip_by_global_norm(max_norm, **options), grads)


def all_zero(tree):
    return all(not np.any(np.asarray(x)) for x in jax.tree.leaves(tree))


# Norms of finite gradients.


def test_n1_bfloat16_norm_of_many_leaves_does_not_stagnate():
    grads = [jnp.ones(2**15, jnp.bfloat16)] + [jnp.ones(100, jnp.bfloat16)] * 60
    assert float(optax.tree.norm(grads)) == 181.0  # stays at 2**15, whose ulp is 256
    norm = float(optclip.norms.global_norm(grads))
    assert norm == pytest.approx(exact_norm(grads), rel=1e-6)
    assert norm > 196


def test_n1b_clipped_bfloat16_trees_have_the_requested_norm():
    rng = np.random.default_rng(0)
    sizes = [2**15] + [100] * 60
    grads = [jnp.asarray(rng.normal(size=n), jnp.bfloat16) for n in sizes]
    assert exact_norm(optax_clip(grads)) > 1.05
    assert exact_norm(our_clip(grads)) == pytest.approx(1, abs=1e-3)


def test_n2_float16_norm_above_256_does_not_zero_the_update():
    grads = jnp.full(4, 300.0, jnp.float16)
    assert all_zero(optax_clip(grads))
    chex.assert_trees_all_equal(our_clip(grads), jnp.full(4, 0.5, jnp.float16))


def test_n3_small_float16_entries_contribute_to_the_norm():
    grads = jnp.full(1_000_000, 1e-4, jnp.float16)
    chex.assert_trees_all_equal(optax_clip(grads, 0.01), grads)  # norm 0: not clipped
    assert exact_norm(our_clip(grads, 0.01)) == pytest.approx(
        0.01, rel=0.06
    )  # subnormals
    norm = float(optclip.norms.global_norm(grads))
    assert norm == pytest.approx(exact_norm(grads), rel=1e-6)


def test_n4_squares_above_float32_do_not_zero_the_update():
    grads = jnp.full(4, 2e19)
    assert all_zero(optax_clip(grads))
    np.testing.assert_allclose(our_clip(grads), 0.5, rtol=1e-6)


def test_n5_squares_below_float32_contribute_to_the_norm():
    grads = jnp.full(4, 1e-30)
    chex.assert_trees_all_equal(optax_clip(grads, 1e-31), grads)  # norm 0: not clipped
    np.testing.assert_allclose(our_clip(grads, 1e-31), 5e-32, rtol=1e-6)


def test_n6_half_precision_leaves_survive_a_large_float32_norm():
    grads = {"a": jnp.full(4, 1e6), "b": jnp.ones(2, jnp.float16)}
    assert all_zero(optax_clip(grads)["b"])  # the norm, as float16, is inf
    ours = our_clip(grads)
    np.testing.assert_allclose(ours["a"], 0.5, rtol=1e-6)
    np.testing.assert_allclose(ours["b"].astype(jnp.float32), 5e-7, rtol=0.1)


# Non-finite gradients, and extreme thresholds.

NAN = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([jnp.nan, 1.0])}
INF = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([jnp.inf, 0.0])}


def test_n7_one_nan_affects_only_what_the_policy_specifies():
    assert all(np.isnan(x).all() for x in jax.tree.leaves(optax_clip(NAN)))
    chex.assert_trees_all_equal(our_clip(NAN), NAN)
    assert all_zero(our_clip(NAN, nonfinite="zero"))
    assert all_zero(our_clip(NAN, nonfinite="skip"))
    dropped = our_clip(NAN, nonfinite="drop")
    assert float(dropped["b"][0]) == 0
    assert exact_norm(dropped) == pytest.approx(1, rel=1e-6)
    tx = optclip.clip_by_leaf_norm(1.0, nonfinite="zero")
    by_leaf = apply(tx, NAN)
    assert all_zero(by_leaf["b"])
    np.testing.assert_allclose(by_leaf["a"], [0.6, 0.8], rtol=1e-6)


def test_n8_one_inf_affects_only_what_the_policy_specifies():
    peer = optax_clip(INF)
    assert all_zero(peer["a"])
    np.testing.assert_array_equal(peer["b"], [np.nan, 0.0])
    chex.assert_trees_all_equal(our_clip(INF), INF)
    dropped = our_clip(INF, nonfinite="drop")
    np.testing.assert_allclose(dropped["a"], [0.6, 0.8], rtol=1e-6)
    assert all_zero(dropped["b"])
    assert all_zero(our_clip(INF, nonfinite="zero"))
    assert all_zero(our_clip(INF, nonfinite="skip"))


def test_n9_threshold_zero_and_zero_gradients_give_zeros():
    zeros = {"a": jnp.zeros(2), "b": jnp.zeros([])}
    assert np.isnan(optax_clip(zeros, 0.0)["a"]).all()
    chex.assert_trees_all_equal(our_clip(zeros, 0.0), zeros)


@pytest.mark.parametrize("max_norm", [-1.0, float("nan")])
def test_n10_negative_and_nan_thresholds_are_errors(max_norm):
    peer = optax_clip(jnp.ones(3), max_norm)
    assert not (np.asarray(peer) >= 0).any()  # sign flipped, or NaN
    with pytest.raises(ValueError, match=f"`max_norm` must be >= 0, got {max_norm}"):
        optclip.clip_by_global_norm(max_norm)


@pytest.mark.parametrize("grads", [INF, {"a": INF["a"], "b": -INF["b"]}])
def test_n11_infinite_threshold_changes_nothing(grads):
    assert all(np.isnan(x).any() for x in jax.tree.leaves(optax_clip(grads, jnp.inf)))
    chex.assert_trees_all_equal(our_clip(grads, jnp.inf), grads)


@pytest.mark.parametrize("kind", [np.float32, np.float64, jnp.float32])
def test_n12_thresholds_of_any_float_type_clip_bfloat16(kind):
    grads = jnp.ones(4, jnp.bfloat16)
    with pytest.raises(TypeError, match="same dtypes"):
        optax_clip(grads, kind(1.0))
    chex.assert_trees_all_equal(our_clip(grads, kind(1.0)), grads / 2)


MIXED = {"a": jnp.ones(3), "b": jnp.ones(1, jnp.bfloat16)}
HALF = {"a": jnp.full(3, 0.5), "b": jnp.full(1, 0.5, jnp.bfloat16)}


def test_n13_injected_thresholds_clip_mixed_dtypes():
    with pytest.raises(TypeError, match="same dtypes"):
        apply(optax.inject_hyperparams(optax.clip_by_global_norm)(1.0), MIXED)
    build = optax.inject_hyperparams(optclip.clip_by_global_norm, static_args="ord")
    tx = build(1.0)
    updates, _ = jax.jit(tx.update)(MIXED, tx.init(jax.tree.map(jnp.float32, MIXED)))
    chex.assert_trees_all_close(updates, HALF, rtol=1e-6)


def test_n13_injected_thresholds_need_no_static_args():
    # `optax.inject_hyperparams(optax.clip_by_global_norm)(1.0)` needs none either.
    tx = optax.inject_hyperparams(optclip.clip_by_global_norm)(1.0)
    updates, _ = jax.jit(tx.update)(MIXED, tx.init(MIXED))
    chex.assert_trees_all_close(updates, HALF, rtol=1e-6)


@pytest.mark.parametrize(
    "odd",
    [
        pytest.param(lambda: jnp.arange(2), id="int"),
        pytest.param(lambda: jnp.array([True, False]), id="bool"),
        pytest.param(lambda: np.zeros(2, jax.dtypes.float0), id="float0"),
        pytest.param(lambda: jax.random.key(0), id="key"),
    ],
)
def test_n14_non_gradient_leaves_pass_through(odd):
    odd = odd()
    grads = {"odd": odd, "w": jnp.array([3.0, 4.0])}
    with pytest.raises((TypeError, NotImplementedError)):
        optax_clip(grads)
    ours = our_clip(grads)
    assert ours["odd"] is odd
    np.testing.assert_allclose(ours["w"], [0.6, 0.8], rtol=1e-6)


@pytest.mark.parametrize("clip", [optax_clip, our_clip])
def test_n15_empty_trees_none_and_size_0_leaves_are_preserved(clip):
    # No fault: Optax is right here.
    assert clip({}) == {}
    grads = {"a": None, "b": jnp.zeros((0, 3)), "c": jnp.array([3.0, 4.0])}
    out = clip(grads)
    assert out["a"] is None
    assert out["b"].shape == (0, 3)
    np.testing.assert_allclose(out["c"], [0.6, 0.8], rtol=1e-6)


def test_n16_complex_entries_are_clipped_by_magnitude():
    grads = jnp.array([3 + 4j, 0.1j])
    with pytest.raises(ValueError, match="complex"):
        apply(optax.clip(1.0), grads)
    expected = np.array([0.6 + 0.8j, 0.1j])
    ours = apply(optclip.clip_by_value(1.0), grads)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    # With a NaN in one part only, Optax replaces the whole entry by zero.
    half_nan = jnp.array([complex(np.nan, 1.0), 3 + 4j])
    assert complex(apply(optax.zero_nans(), half_nan)[0]) == 0
    ours = our_clip(half_nan, nonfinite="drop")
    np.testing.assert_allclose(ours, [0, 0.6 + 0.8j], rtol=1e-6)
    tx = optclip.clip_by_global_norm(1.0)
    _, state = tx.update(half_nan, tx.init(half_nan))
    assert optclip.nonfinite_leaves(state, half_nan)[0].nan == 1


@pytest.mark.parametrize(
    ("dtype", "bound", "optax_keeps_it"),
    [
        # Half an ulp for one rounding; in float32, a few ulp for norm and scale.
        (jnp.float32, 4 * 2.0**-23, True),
        (jnp.bfloat16, 2.0**-8, False),
        (jnp.float16, 2.0**-11, False),
    ],
)
def test_n17_clipped_norm_is_above_the_threshold_by_rounding_only(
    dtype, bound, optax_keeps_it
):
    draws = np.random.default_rng(0).normal(size=(400, 50))
    grads = jnp.asarray(draws, dtype)

    def worst(clip):
        return max(exact_norm(x) for x in jax.jit(jax.vmap(clip))(grads)) - 1

    assert worst(our_clip) <= bound
    assert (worst(optax_clip) <= bound) == optax_keeps_it


def test_n18_derivative_at_zero_gradients_is_one():
    zeros = jnp.zeros(2)
    assert np.isnan(jax.jacobian(optax_clip)(zeros)).all()
    np.testing.assert_array_equal(jax.jacobian(our_clip)(zeros), np.eye(2))


def test_n19_block_rms_threshold_zero_and_zero_gradients_give_zeros():
    zeros = jnp.zeros(3)
    assert np.isnan(apply(optax.clip_by_block_rms(0.0), zeros)).all()
    assert all_zero(apply(optclip.clip_by_block_rms(0.0), zeros))


def test_n20_block_rms_and_agc_do_not_zero_float16():
    grads, params = jnp.full(4, 300.0, jnp.float16), jnp.ones(4, jnp.float16)
    assert all_zero(apply(optax.clip_by_block_rms(1.0), grads))
    assert all_zero(apply(optax.adaptive_grad_clip(1.0), grads, params))
    chex.assert_trees_all_equal(apply(optclip.clip_by_block_rms(1.0), grads), params)
    ours = apply(optclip.adaptive_grad_clip(1.0), grads, params)
    chex.assert_trees_all_equal(ours, params)


def test_n21_agc_keeps_the_dtype_of_the_gradients():
    grads, params = jnp.ones((2, 2), jnp.bfloat16), jnp.ones((2, 2))
    assert apply(optax.adaptive_grad_clip(0.5), grads, params).dtype == jnp.float32
    ours = apply(optclip.adaptive_grad_clip(0.5), grads, params)
    assert ours.dtype == jnp.bfloat16
    chex.assert_trees_all_equal(ours, grads / 2)


def test_n22_agc_units_of_one_row_or_column_depend_on_rank_only():
    row, ones = jnp.array([[100.0, 0.1]]), jnp.ones((1, 2))
    # Optax squeezes, so the row is one unit and its small entry is scaled down too.
    peer = apply(optax.adaptive_grad_clip(1.0), row, ones)
    np.testing.assert_allclose(peer, row * 2**0.5 / exact_norm(row), rtol=1e-5)
    tx = optclip.adaptive_grad_clip(1.0)
    np.testing.assert_allclose(apply(tx, row, ones), [[1.0, 0.1]], rtol=1e-6)
    column = apply(tx, row.T, ones.T)  # one output, two inputs: one unit
    np.testing.assert_allclose(column, peer.T, rtol=1e-5)


def test_n23_agc_of_stacked_layers_can_be_per_layer_and_output():
    params = jnp.ones((2, 4, 3))  # [layer, in, out]
    grads = params.at[0, :, 0].set(100.0)
    peer = apply(optax.adaptive_grad_clip(1.0), {"blocks": grads}, {"blocks": params})
    assert not np.allclose(peer["blocks"][1], 1.0)  # layer 0 scales down layer 1
    tx = optclip.adaptive_grad_clip(1.0, axis={"blocks": 1})
    ours = apply(tx, {"blocks": grads}, {"blocks": params})
    np.testing.assert_allclose(ours["blocks"], params, rtol=1e-6)


# Per-example clipping, with `jax.vmap` of a clip over examples.


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_n24_one_nonfinite_example_does_not_affect_the_rest_of_the_batch(bad):
    batch = jnp.array([[3.0, 4.0], [bad, 1.0], [0.3, 0.4]])
    (peer,), _ = optax.per_example_global_norm_clip([batch], 1.0)
    assert np.isnan(peer).any()
    clip = jax.vmap(lambda g: our_clip(g, nonfinite="zero"))
    np.testing.assert_allclose(clip(batch).sum(0), [0.9, 1.2], rtol=1e-6)


def test_n25_tree_without_leaves_is_not_an_error():
    with pytest.raises(IndexError):
        optax.per_example_global_norm_clip([], 1.0)
    assert our_clip([]) == []
    assert float(optclip.norms.global_norm([])) == 0.0


# State and structure.

STEPS = {"w": jnp.array([[3.0, 4.0], [6.0, 8.0], [0.0, 1.0]])}
FIRST = jax.tree.map(lambda x: x[0], STEPS)


def scanned(tx, steps=STEPS, params=FIRST):
    def step(state, grads):
        updates, state = tx.update(grads, state, params)
        return state, updates

    return jax.lax.scan(step, tx.init(params), steps)


def wrappers():
    def switched(inner):
        def update(grads, state, params=None):
            return jax.lax.cond(
                jnp.sum(grads["w"]) > 0,
                lambda: inner.update(grads, state, params),
                lambda: (grads, state),
            )

        return optax.GradientTransformation(inner.init, update)

    def sometimes(inner):
        return optax.conditionally_transform(inner, lambda step: step != 1)

    return {
        "scan": lambda inner: inner,
        "cond": switched,
        "apply_if_finite": lambda inner: optax.apply_if_finite(inner, 3),
        "conditionally_transform": sometimes,
        "MultiSteps": lambda inner: optax.MultiSteps(inner, 2),
    }


@pytest.mark.parametrize("name", wrappers())
def test_s1_monitor_has_one_structure_for_scan_cond_and_wrappers(name):
    wrap = wrappers()[name]
    if NEW:
        with pytest.raises((TypeError, ValueError)):
            scanned(wrap(optax.monitor({"norm": optax.tree.norm})))
    state, _ = scanned(wrap(optclip.record_norms()))
    steps = {"conditionally_transform": 2, "MultiSteps": 1}.get(name, 3)
    metrics = optclip.metrics(state)
    assert int(metrics["norms/steps"]) == steps
    # MultiSteps passes the mean of two steps to its inner transformation.
    norm = 7.5 if name == "MultiSteps" else 1.0
    assert float(metrics["norms/global_norm"]) == pytest.approx(norm)


def test_s1_monitor_is_traced_once():
    def traces(tx):
        seen = []

        @jax.jit
        def step(grads, state):
            seen.append(None)
            return tx.update(grads, state)[1]

        state = tx.init(FIRST)
        for _ in range(3):
            state = step(FIRST, state)
        return len(seen)

    if NEW:
        assert traces(optax.monitor({"norm": optax.tree.norm})) == 2
    assert traces(optclip.record_norms()) == 1


def test_s2_monitor_is_float32_and_defined_before_the_first_step():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), STEPS)
    if NEW:
        peer = optax.snapshot("norm", optax.tree.norm)
        # Before the first step, it is the norm of the parameters.
        assert float(optax.tree.get(peer.init(FIRST), "norm")) == 5.0
        with pytest.raises(TypeError, match="carry"):
            scanned(peer, half)
    tx = optclip.record_norms()
    assert float(optclip.metrics(tx.init(FIRST))["norms/global_norm"]) == 0.0
    state, _ = scanned(tx, half)
    assert state.recorded_norm.dtype == jnp.float32
    assert float(state.recorded_norm) == 1.0


def test_s3_two_monitors_are_distinguished():
    if NEW:
        twice = [optax.snapshot("norm", optax.tree.norm)] * 2
        with pytest.raises(KeyError):
            optax.tree.get(optax.chain(*twice).init(FIRST), "norm")
    clip = optclip.clip_by_global_norm(1.0)
    tx = optax.chain(optclip.record_norms(), clip, optclip.record_norms(), clip)
    _, state = tx.update(FIRST, tx.init(FIRST))
    metrics = optclip.metrics(state)
    assert float(metrics["norms/global_norm"]) == 5.0
    assert float(metrics["norms_2/global_norm"]) == pytest.approx(1.0)
    assert float(metrics["clip/norm_before"]) == 5.0
    assert float(metrics["clip_2/norm_before"]) == pytest.approx(1.0)


def test_s4_nonfinite_microbatch_does_not_stay_in_the_accumulator():
    steps = {"w": jnp.array([[jnp.inf, 1.0], [1.0, 1.0], [3.0, 4.0], [3.0, 4.0]])}
    inner = optax.MultiSteps(optax.identity(), 2).gradient_transformation()
    # Optax has no transformation that guards against inf: `zero_nans` passes it
    # through.
    state, updates = scanned(optax.chain(optax.zero_nans(), inner), steps)
    assert np.isnan(updates["w"][3]).any()  # two steps later, and permanently
    guard = optclip.clip_by_global_norm(jnp.inf, nonfinite="skip")
    state, updates = scanned(optax.chain(guard, inner), steps)
    np.testing.assert_array_equal(updates["w"], [[0, 0], [0.5, 0.5], [0, 0], [3, 4]])
    (leaf,) = optclip.nonfinite_leaves(state, FIRST)
    assert leaf[:5] == ("w", 0, 0, 1, 0)


def test_s6_overflowing_squares_are_clipped_and_not_counted_as_nonfinite():
    grads = jnp.full(4, 2e19)
    peer = optax.apply_if_finite(optax.clip_by_global_norm(1.0), 3)
    updates, state = peer.update(grads, peer.init(grads), grads)
    assert all_zero(updates)
    assert int(state.total_notfinite) == 0  # nothing reports it
    tx = optax.apply_if_finite(optclip.clip_by_global_norm(1.0), 3)
    updates, state = tx.update(grads, tx.init(grads), grads)
    np.testing.assert_allclose(updates, 0.5, rtol=1e-6)
    metrics = optclip.metrics(state)
    assert float(metrics["clip/norm_before"]) == pytest.approx(4e19, rel=1e-6)
    # Even a norm that overflows float32 does not count as a non-finite gradient.
    largest = jnp.full(4, 3e38)
    tx = optclip.clip_by_global_norm(1.0)
    updates, state = tx.update(largest, tx.init(largest))
    np.testing.assert_allclose(updates, 0.5, rtol=1e-6)
    assert np.isfinite(state.norm_before)
    assert int(optclip.metrics(state)["clip/nonfinite_steps"]) == 0


def sharded(x, *, explicit):
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    spec = jax.sharding.PartitionSpec("data")
    return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))


@pytest.mark.skipif(
    not NEW or jax.device_count() < 4, reason="needs jax.set_mesh and 4 devices"
)
def test_s9_agc_keeps_explicit_shardings():
    x = jnp.arange(32.0).reshape(8, 4) - 7
    placed = sharded(x, explicit=True)
    with pytest.raises(Exception, match="shard") as caught:
        jax.jit(lambda g: apply(optax.adaptive_grad_clip(0.1), g, g))(placed)
    assert "Sharding" in type(caught.value).__name__
    tx = optclip.adaptive_grad_clip(0.1)
    ours = jax.jit(lambda g: apply(tx, g, g))(placed)
    assert ours.sharding.is_equivalent_to(placed.sharding, 2)
    np.testing.assert_allclose(ours, apply(tx, x, x), rtol=1e-6)
    with pytest.raises(Exception, match="shard"):
        jax.jit(lambda g: optax.per_example_global_norm_clip([g], 1.0))(placed)


@pytest.mark.skipif(
    not NEW or jax.device_count() < 4, reason="needs jax.set_mesh and 4 devices"
)
def test_s9_vmap_over_examples_keeps_explicit_shardings():
    x = jnp.arange(32.0).reshape(8, 4)
    clip = jax.jit(jax.vmap(our_clip))
    placed = sharded(x, explicit=True)
    with jax.set_mesh(placed.sharding.mesh):  # otherwise JAX can't place constants
        ours = clip(placed)
    np.testing.assert_allclose(ours, clip(x), rtol=1e-6)


@pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices")
@pytest.mark.parametrize("clip", [optax_clip, our_clip])
def test_s10_auto_sharded_jit_clips_by_the_norm_of_all_shards(clip):
    # No fault: Optax is right here.
    x = jnp.arange(32.0).reshape(8, 4)
    out = jax.jit(clip)(sharded(x, explicit=False))
    np.testing.assert_allclose(out, x / exact_norm(x), rtol=1e-6)


def test_s11_separately_clipped_groups_are_explicit():
    grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([6.0, 8.0])}
    labels = {"a": "a", "b": "b"}
    clips = {name: optax.clip_by_global_norm(1.0) for name in labels}
    peer = apply(optax.multi_transform(clips, labels), grads)
    assert exact_norm(peer) == pytest.approx(2**0.5)  # for max_norm=1.0
    # One threshold for all groups: the clip comes before the partition.
    parted = optax.multi_transform(dict.fromkeys(labels, optax.identity()), labels)
    tx = optax.chain(optclip.clip_by_global_norm(1.0), parted)
    assert exact_norm(apply(tx, grads)) == pytest.approx(1)
    # One threshold per group: the scope states it, and the metrics show it.
    tx = optclip.clip_by_rule(1.0, scope=optclip.scopes.label(labels))
    updates, state = tx.update(grads, tx.init(grads))
    assert exact_norm(updates) == pytest.approx(2**0.5)
    assert float(optclip.metrics(state)["clip/norm_after"]) == pytest.approx(2**0.5)
    assert float(optclip.leaf_metrics(state, grads)["b/norm_before"]) == 10.0


def test_s11_unclipped_leaves_can_still_be_measured():
    grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([60.0, 80.0])}
    mask = {"a": True, "b": False}
    peer = apply(optax.masked(optax.clip_by_global_norm(1.0), mask), grads)
    assert exact_norm(peer) > 100  # `b` is neither measured nor clipped
    # The same, but explicit: a separate threshold for each group.
    scope = optclip.scopes.label({"a": 0, "b": 1})
    tx = optclip.clip_by_rule({0: 1.0, 1: jnp.inf}, scope=scope)
    updates, state = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(updates["a"], [0.6, 0.8], rtol=1e-6)
    chex.assert_trees_all_equal(updates["b"], grads["b"])
    assert float(optclip.metrics(state)["clip/norm_after"]) > 100  # and it is visible


def test_s12_record_norms_next_to_a_clip_shares_its_norm():
    # In Optax, a snapshot of the norm is shared with the clip. Likewise, `record_norms`
    # and a clip read each leaf once: `test_speed.py` counts the reads in the compiled
    # step, and here the results agree bitwise.
    tx = optax.chain(optclip.record_norms(), optclip.clip_by_global_norm(1.0))
    state, _ = jax.jit(lambda: scanned(tx))()
    metrics = optclip.metrics(state)
    chex.assert_trees_all_equal(
        metrics["norms/global_norm"], metrics["clip/norm_before"]
    )
