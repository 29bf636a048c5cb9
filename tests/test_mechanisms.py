"""Spectral clips, error feedback, stable Adam, caps, `stabilize`: checks with NumPy."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip


def matrix(shape, sigmas, seed=0):
    """Returns a matrix (or a batch) with these singular values."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.normal(size=(*shape[:-1], len(sigmas))))[0]
    right = np.linalg.qr(rng.normal(size=(*shape[:-2], shape[-1], len(sigmas))))[0]
    return (left * np.asarray(sigmas)) @ np.swapaxes(right, -1, -2)


def mapped(x, f):
    left, values, right = np.linalg.svd(x, full_matrices=False)
    return (left * f(values)[..., None, :]) @ right


@functools.cache
def spectral_step(**options):
    """Returns a jitted (cap, updates, state) -> (updates, state)."""
    return jax.jit(
        lambda cap, *args: optclip.spectral_clip(cap, **options).update(*args)
    )


def spectral(x, cap=1.0, **options):
    state = optclip.spectral_clip(cap, **options).init(x)
    return spectral_step(**options)(jnp.float32(cap), x, state)


SIGMAS = [50.0, 7.0, 1.2, 0.9, 0.05, 1e-4]
CURVES = {
    "svd": (lambda s: np.minimum(s, 1.0), 2e-5),
    "hardcap": (lambda s: np.minimum(s, 1.0), 0.15),
    "soft": (lambda s: s / np.sqrt(1 + s * s), 1e-3),
}


@pytest.mark.parametrize("shape", [(6, 8), (8, 6), (3, 8, 6)])
@pytest.mark.parametrize("method", CURVES)
def test_spectral_clip_maps_singular_values(method, shape):
    curve, error = CURVES[method]
    x = matrix(shape, SIGMAS).astype(np.float32)
    out, state = spectral(x, method=method)
    off = np.linalg.norm(np.asarray(out) - mapped(x.astype(float), curve), 2, (-2, -1))
    assert np.max(off) < error, off
    assert float(state.norm_after) < float(state.norm_before)
    assert float(optclip.metrics(state)["clip/clipped"]) == 1


def test_spectral_clip_leaves_small_matrices_bitwise_unchanged_and_zeros_zero():
    x = {"a": matrix((6, 8), [0.9, 0.1]).astype(np.float32), "b": np.float32([0.3])}
    out, state = spectral(x)
    chex.assert_trees_all_equal(out, x)
    assert float(state.clipped) == 0
    zeros = jax.tree.map(np.zeros_like, x)
    for method in CURVES:
        chex.assert_trees_all_equal(spectral(zeros, method=method)[0], zeros)
    for method in CURVES:
        chex.assert_trees_all_equal(spectral(x, 0.0, method=method)[0], zeros)


@pytest.mark.parametrize("method", CURVES)
def test_spectral_clip_works_at_every_size_and_on_vectors(method):
    for size in (1e-30, 1e30):
        x = (size * matrix((6, 8), [10.0, 3.0, 0.5])).astype(np.float32)
        out, _ = spectral(x, np.float32(size), method=method)
        wanted = size * mapped(x.astype(float) / size, CURVES[method][0])
        assert np.linalg.norm(np.asarray(out) / size - wanted / size, 2) < 0.15
    out, _ = spectral(np.float32([3.0, 4.0]), method=method)
    np.testing.assert_allclose(out, np.float32([0.6, 0.8]), rtol=0.03)


def test_spectral_clip_accepts_schedules_and_rejects_complex_leaves():
    tx = optclip.spectral_clip(optax.linear_schedule(1.0, 0.0, 2))
    x = np.eye(3, dtype=np.float32) * 2
    _, state = tx.update(x, tx.init(x))
    out, _ = tx.update(x, state)
    np.testing.assert_allclose(out, np.eye(3) * 0.5, atol=1e-6)
    with pytest.raises(ValueError, match="`spectral_clip` needs real updates"):
        tx.update(x * 1j, tx.init(x))


@pytest.mark.parametrize(
    "inner", [optclip.clip_by_value(0.5), optclip.clip_by_rule(1.0)]
)
def test_u_clip_conserves_the_sum_of_updates(inner):
    tx = optclip.u_clip(inner)
    grads = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    state, outs = jax.jit(
        lambda s, g: jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], s, g)
    )(tx.init(jnp.zeros(4)), grads)
    np.testing.assert_allclose(
        np.sum(outs, axis=0) + state.carry, grads.sum(axis=0), atol=1e-5
    )


def test_u_clip_bounds_the_carry_and_keeps_it_when_a_step_is_nan():
    tx = optclip.u_clip(optclip.clip_by_rule(1.0, nonfinite="zero"), max_carry=2.0)
    _, state = tx.update(jnp.array([3e6, 4e6]), tx.init(jnp.zeros(2)))
    np.testing.assert_allclose(state.carry, [1.2, 1.6], rtol=1e-6)
    _, after = tx.update(jnp.array([np.nan, 0.0]), state)
    chex.assert_trees_all_equal(after.carry, state.carry)


INNER = {
    "value": optclip.clip_by_value(1e3), "tree": optclip.clip_by_rule(1e3),
    "leaf": optclip.clip_by_leaf_norm(1e3), "off": optclip.clip_by_rule(np.inf),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e5m2"])
@pytest.mark.parametrize("inner", INNER)
def test_u_clip_leaves_unclipped_entries_bitwise_unchanged(inner, dtype):
    least = jnp.finfo(dtype).smallest_subnormal
    grads = np.array([-0.0, 0.0, least, -3 * least, 0.5, -7.0]).astype(dtype)
    tx = optclip.u_clip(INNER[inner])
    step = jax.jit(tx.update)
    state = tx.init(grads)
    for _ in range(2):
        out, state = step(grads, state)
        assert np.asarray(out).tobytes() == grads.tobytes()
    # The carry is added to its entry; the others do not change.
    state = state._replace(carry=jnp.array([0, 0, 0, 0, 0, 1.0], jnp.float32))
    out, _ = step(grads, state)
    assert np.asarray(out)[:5].tobytes() == grads[:5].tobytes()
    assert float(out[5]) == -6


def stable_adam(grads, w, lr, b1, b2, eps, decay):
    """StableAdamW in NumPy, as optimi writes it."""
    m = v = np.zeros_like(w)
    for t, g in enumerate(grads, 1):
        d1, d2 = ((b**t - b) / (b**t - 1) for b in (b1, b2))
        m, v = d1 * m + (1 - d1) * g, d2 * v + (1 - d2) * g * g
        rms = np.sqrt(np.mean(g * g / np.maximum(v, eps**2)))
        rate = lr / max(1.0, rms)
        w = (1 - rate * decay) * w - rate * m / (np.sqrt(v) + eps)
    return w


def test_stable_adam_follows_its_formula():
    rng = np.random.default_rng(3)
    grads = rng.normal(size=(60, 5)) * np.exp(rng.normal(size=(60, 1)))
    adam = optclip.scale_by_stable_adam(0.9, 0.99, weight_decay=0.1)
    tx = optax.chain(adam, optax.scale_by_learning_rate(0.05))
    start = rng.normal(size=5)

    def step(carry, g):
        w, state = carry
        updates, state = tx.update(g, state, w)
        return (w + updates, state), None

    first = jnp.asarray(start, jnp.float32)
    (w, state), _ = jax.jit(lambda w, gs: jax.lax.scan(step, (w, tx.init(w)), gs))(
        first, jnp.asarray(grads, jnp.float32)
    )
    wanted = stable_adam(grads, start, 0.05, 0.9, 0.99, 1e-6, 0.1)
    np.testing.assert_allclose(w, wanted, rtol=2e-5)
    assert float(state[0].largest_rms) > 0


def test_state_of_stable_adam_is_float32_even_with_x64(x64):
    del x64
    grads = {"w": jnp.ones(3, jnp.float32), "d": jnp.ones(2, jnp.float64)}
    for b1, b2 in ((0.9, 0.99), (np.float64(0.9), jnp.float64(0.99))):
        tx = optclip.scale_by_stable_adam(b1, b2)
        state = tx.init(grads)
        after, out = jax.jit(
            lambda s, tx=tx: jax.lax.scan(
                lambda s, _: tx.update(grads, s)[::-1], s, None, 3
            )
        )(state)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
        assert {x.dtype.name for x in jax.tree.leaves(state)} == {"float32", "int32"}
        chex.assert_trees_all_equal_dtypes(jax.tree.map(lambda x: x[0], out), grads)


def test_stable_adam_decays_only_masked_leaves():
    params = {"w": jnp.ones(2), "b": jnp.ones(2)}
    tx = optclip.scale_by_stable_adam(weight_decay=0.5, mask={"w": True, "b": False})
    out, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(out["w"], [0.5, 0.5])
    np.testing.assert_array_equal(out["b"], [0.0, 0.0])


def test_trust_ratio_clip_never_scales_up_and_passes_updates_of_zero_parameters():
    params = {"a": jnp.array([0.3, 0.4]), "b": jnp.array([30.0]), "c": jnp.zeros(1)}
    updates = {"a": jnp.array([0.0, 2.0]), "b": jnp.array([1.0]), "c": jnp.ones(1)}
    tx = optclip.trust_ratio_clip()
    out, _ = tx.update(updates, tx.init(params), params)
    np.testing.assert_allclose(out["a"], [0.0, 0.5], rtol=1e-6)
    assert out["b"] == 1
    assert out["c"] == 1


def descend(tx, scale=1.0, spike=None, steps=200):
    """Minimizes an ill-conditioned quadratic; returns the loss at each step."""
    curvature = jnp.array([1.0, 10.0, 100.0]) * scale
    start = jnp.array([1.0, -1.0, 1.0])

    def step(carry, t):
        w, state = carry
        grads = curvature * w
        if spike is not None:
            grads = jnp.where(t == 50, spike, grads)
        updates, state = tx.update(grads, state, w)
        w = optax.apply_updates(w, updates)
        return (w, state), jnp.sum(curvature * w * w) / scale

    first = (start, tx.init(start))
    return np.asarray(jax.jit(
        lambda c: jax.lax.scan(step, c, jnp.arange(steps))[1])(first))  # fmt: skip


def test_stabilize_survives_a_learning_rate_that_is_too_high():
    assert not descend(optax.sgd(0.05))[-1] < 1e3
    losses = descend(optclip.stabilize(optax.sgd(0.05)))
    assert np.all(np.isfinite(losses))
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("spike", [np.nan, np.inf, 1e30])
def test_stabilize_survives_a_bad_batch(spike):
    losses = descend(optclip.stabilize(optax.adam(0.01)), spike=spike, steps=400)
    assert losses[-1] < 2e-3 * losses[0]
    unguarded = descend(optax.adam(0.01), spike=spike, steps=400)
    assert not unguarded[-1] < 2e-3 * unguarded[0]


def test_stabilize_does_not_depend_on_the_scale_of_the_loss():
    one = descend(optclip.stabilize(optax.sgd(0.01)))
    many = descend(optclip.stabilize(optax.sgd(0.01 / 1024)), scale=1024.0)
    np.testing.assert_allclose(many, one, rtol=1e-3)


def test_stabilize_at_leaf_scope_has_a_threshold_per_leaf():
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    tx = optclip.stabilize(optax.sgd(0.1), scope=optclip.scopes.leaf())
    state = tx.init(params)
    assert state.gradient_clip.rule_state[0].log_quantile.shape == (2,)
    _, state = tx.update(params, state, params)
    assert "a/norm_before" in optclip.leaf_metrics(state, params)


def sigma_max(x):
    return float(np.linalg.norm(np.asarray(x, np.float64), 2))


@pytest.mark.parametrize("size", [10.0, 1e3, 1e5, 1e8, 1e30, 2e38])
@pytest.mark.parametrize("method", CURVES)
def test_exploding_matrices_and_vectors_are_clipped_to_the_cap(method, size):
    x = (size * np.random.default_rng(0).uniform(-1, 1, (32, 16))).astype(np.float32)
    out, _ = spectral(x, method=method)
    assert sigma_max(out) < {"svd": 1.0001, "hardcap": 1.2, "soft": 1.01}[method]
    out, _ = spectral(x[0], method=method)
    np.testing.assert_allclose(np.linalg.norm(out), 1.0, rtol=0.06)


@pytest.mark.parametrize("size", [0.1, 1.0, 5.0, 100.0])
def test_svd_is_accurate_to_1e_5_of_the_cap_on_a_large_matrix(size):
    x = (size * np.random.default_rng(0).normal(size=(64, 128))).astype(np.float32)
    out, _ = spectral(x)
    wanted = mapped(x.astype(float), lambda s: np.minimum(s, 1.0))
    assert sigma_max(np.asarray(out, float) - wanted) < 1e-5


@pytest.mark.parametrize("method", ["hardcap", "soft"])
def test_small_singular_values_also_shrink_far_above_the_cap(method):
    x = matrix((6, 8), [1e5, 0.5]).astype(np.float32)
    values = np.linalg.svd(np.asarray(spectral(x, method=method)[0], float))[1]
    np.testing.assert_allclose(values[0], 1.0, atol=0.15)
    assert values[1] < 0.15  # 0.5 / 100 plus the error of the iteration


@pytest.mark.parametrize("size", [1e-8, 1e-30])
@pytest.mark.parametrize("cap", [1.0, 1e30, np.inf])
def test_every_method_leaves_small_matrices_unchanged(size, cap):
    x = (size * np.random.default_rng(0).normal(size=(6, 4))).astype(np.float32)
    for method in CURVES:
        out, _ = spectral(x, np.float32(cap), method=method)
        np.testing.assert_allclose(out, x, rtol=1e-5)


def test_mechanisms_accept_every_kind_of_leaf():
    params = {
        "w": jnp.ones((3, 2)), "f8": jnp.ones((2, 2), jnp.float8_e4m3fn),
        "empty": jnp.ones((0, 3)), "n": jnp.arange(3), "flag": jnp.array(True),
    }  # fmt: skip
    grads = dict(params)
    for tx in (
        optclip.scale_by_stable_adam(weight_decay=0.1),
        optclip.u_clip(optclip.clip_by_rule(1.0)),
        *(optclip.spectral_clip(1.0, method=m) for m in CURVES),
    ):
        state = tx.init(params)
        step = jax.jit(tx.update, donate_argnums=(1,))
        out, after = step(grads, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(out, params)
        chex.assert_trees_all_equal(out["n"], params["n"])
        step(grads, after, params)


def test_first_gradient_that_overflows_squares_does_not_stop_stabilize():
    tx, params = optclip.stabilize(optax.adam(0.1), ramp_steps=0), jnp.ones(3)
    state = tx.init(params)
    _, state = tx.update(jnp.full(3, 1e20), state, params)
    for _ in range(3):
        out, state = tx.update(jnp.full(3, 1.0), state, params)
    assert float(jnp.max(jnp.abs(out))) > 1e-3
    chex.assert_tree_all_finite(state.optimizer_state)


def dots(jaxpr):
    """Yields the parameters of all matrix products in a jaxpr."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn.params
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from dots(inner)


@pytest.mark.parametrize("method", ["svd", "hardcap", "soft"])
def test_matrix_products_of_spectral_clip_have_full_precision(method):
    # A CPU computes them in full precision in any case.
    tx = optclip.spectral_clip(1.0, method=method)
    x = jnp.eye(4)

    def norm(x):
        return jnp.sum(tx.update(x, tx.init(x))[0] ** 2)

    for function in (norm, jax.grad(norm)):
        found = [p["precision"] for p in dots(jax.make_jaxpr(function)(x).jaxpr)]
        highest = jax.lax.Precision.HIGHEST
        assert found
        assert set(found) == {(highest, highest)}


@functools.cache
def spectral_slope(method):
    """Returns a jitted (x, cap, weights, move) -> value, gradients, derivative."""

    def value(x, cap, weights):
        tx = optclip.spectral_clip(cap, method=method)
        return jnp.vdot(weights, tx.update(x, optclip.spectral_clip(1.0).init(x))[0])

    def both(x, cap, weights, move):
        at, slopes = jax.value_and_grad(value, (0, 1))(x, cap, weights)
        _, along = jax.jvp(lambda x: value(x, cap, weights), (x,), (move,))
        return at, slopes, along

    return jax.jit(both)


def waves(shape):
    size = int(np.prod(shape))
    return np.sin(1.0 + np.arange(size)).reshape(shape), np.cos(
        3.0 * np.arange(size)
    ).reshape(shape)


# Singular values that are equal, zero, or both, below and above the cap of 1.
SPECTRA = {
    "distinct": [50.0, 7.0, 0.5], "equal": [3.0, 3.0, 3.0], "low": [0.4, 0.4, 0.4],
    "mixed": [2.0, 2.0, 0.3], "singular": [5.0, 0.0, 0.0],
}  # fmt: skip


@pytest.mark.parametrize("method", CURVES)
def test_derivatives_of_spectral_clips_equal_finite_differences(method, x64):
    del x64
    slope, step = spectral_slope(method), 1e-6
    points = [matrix((3, 5), s) for s in SPECTRA.values()]
    points += [matrix((5, 3), SPECTRA["mixed"]), np.diag([4.0, 0.2, 0.2])]
    points += [np.array([3.0, -4.0, 0.1]), np.array([0.1, 0.2, 0.0]), np.array(5.0)]
    # The iteration of "hardcap" multiplies tiny singular values by 1.5**30.
    points += [] if method == "hardcap" else [np.zeros((3, 5))]
    for x in points:
        weights, move = waves(x.shape)
        if method == "hardcap" and np.linalg.matrix_rank(np.atleast_2d(x)) < min(
            np.atleast_2d(x).shape
        ):
            continue
        _, (by_x, by_cap), along = slope(x, 1.0, weights, move)
        ends = [slope(x + s * step * move, 1.0, weights, move)[0] for s in (1, -1)]
        wanted = float(ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(np.vdot(by_x, move), wanted, rtol=2e-5, atol=1e-7)
        np.testing.assert_allclose(along, wanted, rtol=2e-5, atol=1e-7)
        ends = [slope(x, 1.0 + s * step, weights, move)[0] for s in (1, -1)]
        wanted = float(ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(by_cap, wanted, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("method", CURVES)
def test_derivatives_of_spectral_clips_are_finite_at_every_size(method):
    slope = spectral_slope(method)
    normal = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    points = [0 * normal, np.eye(3, 5, dtype=np.float32), normal]
    points += [np.float32(size) * normal for size in (1e-38, 1e-30, 1e30, 1e38)]
    points += [np.full((3, 5), 3e38, np.float32)]
    points += [x[0] for x in points] + [x[0, 0] for x in points]
    for x in points:
        weights, move = (w.astype(np.float32) for w in waves(x.shape))
        for cap in (0.0, 1e-30, 1.0, 1e30, np.inf):
            _, (by_x, by_cap), along = slope(x, np.float32(cap), weights, move)
            for got in (by_x, by_cap, along):
                assert np.all(np.isfinite(got)), (x, cap)
            if cap > 1e6 * float(np.max(np.abs(x))):
                np.testing.assert_allclose(by_x, weights, rtol=1e-5, atol=1e-6)
    # The derivative does not depend on the unit of length.
    weights, move = (w.astype(np.float32) for w in waves(normal.shape))
    _, (wanted, _), _ = slope(2 * normal, np.float32(1.0), weights, move)
    for size in (2.0**-80, 2.0**80, 2.0**120):
        at = (np.float32(2 * size) * normal, np.float32(size))
        _, (got, _), _ = slope(*at, weights, move)
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-4)
