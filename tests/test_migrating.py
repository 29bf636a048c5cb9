"""Each line of `docs/migrating.md` gives the numbers of the one that it stands for.

Optax is called. The others' rules are written down anew in NumPy, in float64.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip

PARAMS = {"w": jnp.full((3, 4), 0.5), "b": jnp.full(4, 0.1)}
GRADS = {"w": jnp.linspace(-2.0, 3.0, 12).reshape(3, 4), "b": jnp.arange(4.0)}


def out(tx, grads=GRADS):
    return tx.update(grads, tx.init(PARAMS), PARAMS)[0]


def scaled(factor):
    return jax.tree.map(lambda g: np.asarray(g, np.float64) * factor, GRADS)


def norm(tree):
    return np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in tree.values()))


@pytest.mark.parametrize("max_norm", [0.5, 1.0, 100.0])
def test_torch_lightning_and_hugging_face_by_norm(max_norm):
    expected = scaled(min(1.0, max_norm / (norm(GRADS) + 1e-6)))
    ours = out(optclip.clip_by_global_norm(max_norm, eps=1e-6))
    chex.assert_trees_all_close(ours, expected, rtol=1e-6)
    clipped, before = optclip.clip_grad_norm(GRADS, max_norm)
    chex.assert_trees_all_close(clipped, expected, rtol=1e-6)
    np.testing.assert_allclose(before, norm(GRADS), rtol=1e-6)


def test_torch_and_lightning_by_value():
    expected = jax.tree.map(lambda g: np.clip(np.asarray(g), -0.5, 0.5), GRADS)
    chex.assert_trees_all_equal(out(optclip.clip_by_value(0.5)), expected)
    chex.assert_trees_all_equal(optclip.clip_grad_value(GRADS, 0.5), expected)


OPTAX = {
    "clip_by_global_norm": (
        optax.clip_by_global_norm(1.0),
        optclip.clip_by_global_norm(1.0),
    ),
    "clip": (optax.clip(0.5), optclip.clip_by_value(0.5)),
    "clip_by_block_rms": (optax.clip_by_block_rms(1.0), optclip.clip_by_block_rms(1.0)),
    "adaptive_grad_clip": (
        optax.adaptive_grad_clip(0.01),
        optclip.adaptive_grad_clip(0.01),
    ),
    "normalize_by_update_norm": (
        optax.normalize_by_update_norm(),
        optclip.normalize_by_norm(),
    ),
    "apply_if_finite": (
        optax.apply_if_finite(optax.sgd(1.0), 5),
        optclip.skip_steps(optax.sgd(1.0), when=jnp.inf),
    ),
}


@pytest.mark.parametrize("name", OPTAX)
def test_optax(name):
    theirs, ours = OPTAX[name]
    chex.assert_trees_all_close(out(ours), out(theirs), rtol=1e-5, atol=1e-6)


def test_optax_zero_nans_before_a_clip():
    grads = {**GRADS, "b": GRADS["b"].at[1].set(jnp.nan)}
    theirs = optax.chain(optax.zero_nans(), optax.clip_by_global_norm(1.0))
    ours = optclip.clip_by_global_norm(1.0, nonfinite="drop")
    chex.assert_trees_all_close(out(ours, grads), out(theirs, grads), rtol=1e-5)


def test_optax_per_example_clip():
    x = jnp.array([[1.0, 2.0], [30.0, 40.0], [0.0, 0.1]])

    def loss_fn(params, x):
        return params @ x

    params = jnp.zeros(2)
    each = jax.vmap(jax.grad(loss_fn), (None, 0))(params, x)
    (sums,), _ = optax.per_example_global_norm_clip([each], 1.0)
    ours, _ = optclip.per_example_clip(loss_fn, 1.0)(params, x)
    chex.assert_trees_all_close(3 * ours, sums, rtol=1e-6)


def left_out(tx, norms):
    """Returns which of the steps with these norms are left out."""
    state, found = tx.init({"w": jnp.zeros(1)}), []
    update = jax.jit(tx.update)
    for size in norms:
        _, state = update({"w": jnp.array([size], jnp.float32)}, state)
        found.append(bool(state.skipped_run > 0))
    return np.array(found)


def window_bound(history, sigmas, window=128):
    known = np.asarray(history[-window:], np.float64)
    return known.mean() + sigmas * known.std(ddof=1)


def test_maxtext_leaves_out_what_lies_six_deviations_above():
    norms = np.exp(0.2 * np.random.default_rng(0).normal(size=300))
    norms[[150, 200, 250]] *= [10, 100, 1.5]
    expected, history = [], []
    for size in norms:
        bad = len(history) >= 64 and size > window_bound(history, 6)
        expected.append(bad)
        if not bad:
            history.append(size)
    assert 2 <= sum(expected) <= 3
    rule = optclip.rules.window_sigma(6.0, window=128, unbiased=True)
    for when in (None, rule):
        ours = left_out(optclip.skip_steps(optax.sgd(1.0), when=when), norms)
        np.testing.assert_array_equal(ours, expected)


def test_levanter_bounds_the_update_three_deviations_above():
    tx = optclip.rolling_sigma_clip(3.0, window=128)
    state, update = tx.init({"w": jnp.zeros(1)}), jax.jit(tx.update)
    norms = np.exp(0.2 * np.random.default_rng(1).normal(size=200))
    for size in norms:
        _, state = update({"w": jnp.array([size], jnp.float32)}, state)
    clipped, _ = update({"w": jnp.array([1e3])}, state)
    known = norms[-128:]
    bound = known.mean() + 3 * known.std()
    np.testing.assert_allclose(float(clipped["w"][0]), bound, rtol=1e-5)


@pytest.mark.parametrize(("size", "dropped"), [(0.5, False), (50, False), (150, True)])
def test_axlearn_drops_above_a_bound_and_clips_below(size, dropped):
    grads = jax.tree.map(lambda g: g * (size / norm(GRADS)), GRADS)
    tx = optclip.skip_steps(
        optax.chain(optclip.clip_by_global_norm(1.0, eps=1e-8), optax.sgd(1.0)),
        when=100.0,
    )
    factor = 0.0 if dropped else -min(1.0, 1 / (size + 1e-8))
    expected = scaled(factor * size / norm(GRADS))
    chex.assert_trees_all_close(out(tx, grads), expected, rtol=1e-5, atol=1e-7)


def test_axlearn_drops_above_a_multiple_of_the_running_mean():
    norms = np.r_[np.full(30, 2.0), 30.0, np.full(5, 2.0), 50.0, 2.0]
    rule = optclip.rules.ema_ratio(20.0, decay=0.99)
    tx = optclip.skip_steps(optax.sgd(1.0), when=rule, max_consecutive=50)
    assert np.flatnonzero(left_out(tx, norms)).tolist() == [36]


def test_zclip_brings_a_spike_back_as_the_package_does():
    alpha, z, norms = 0.97, 2.5, np.exp(0.2 * np.random.default_rng(2).normal(size=60))
    norms[50] *= 20
    tx = optclip.zclip(z, alpha=alpha, max_grad_norm=None, original=True)
    state, update = tx.init({"w": jnp.zeros(1)}), jax.jit(tx.update)
    mean, variance = norms[:25].mean(), norms[:25].var()
    for step, size in enumerate(norms):
        updates, state = update({"w": jnp.array([size], jnp.float32)}, state)
        if step < 25:
            continue
        deviation, kept = np.sqrt(variance), size
        score = (size - mean) / (deviation + 1e-6)
        if score > z:
            kept = mean + z / score * z * deviation
        mean = alpha * mean + (1 - alpha) * kept
        variance = alpha * variance + (1 - alpha) * (kept - mean) ** 2
        np.testing.assert_allclose(float(updates["w"][0]), kept, rtol=1e-4)
