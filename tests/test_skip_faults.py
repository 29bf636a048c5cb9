"""Cases in which the step skipping of other libraries fails and `skip_steps` does not.

Their rules are reimplemented in NumPy.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip

PARAMS = {"w": jnp.ones(2)}


def ours(norms, **options):
    """Returns which steps `skip_steps` skips."""
    tx = optclip.skip_steps(optax.sgd(1.0), **options)
    grads = jnp.asarray(norms, jnp.float32)[:, None] * jnp.array([[0.6, 0.8]])

    def step(state, g):
        _, state = tx.update({"w": g}, state, PARAMS)
        return state, state.skipped_run > 0

    return np.asarray(jax.lax.scan(step, tx.init(PARAMS), grads)[1])


def maxtext(norms, window=128, sigmas=6.0):
    """Takes norms below mean plus deviations of the last ones, including bad ones."""
    ring, skipped = np.ones(window), []
    for count, norm in enumerate(norms):
        known = ring[: max(min(count, window), 2)]
        with np.errstate(invalid="ignore"):
            below = norm <= known.mean() + sigmas * known.std(ddof=1)
        warm = count + 1 < max(2, window // 2)
        skipped.append(not (warm and np.isfinite(norm)) and not below)
        ring[count % window] = norm
    return np.array(skipped)


def axlearn(norms, decay=0.99, thresholds=(20.0,), deviations=None):
    """Drops steps above a multiple of a running mean, which then does not change."""
    mean, square, skipped = np.float32(1.0), np.float32(1.0), []
    for norm in np.asarray(norms, np.float32):
        if deviations is None:
            bound = thresholds[0] * mean
        else:
            with np.errstate(invalid="ignore"):
                bound = mean + deviations * np.sqrt(square - mean * mean)
        drop = not norm < bound
        skipped.append(drop)
        if not drop:
            mean = np.float32(decay * mean + (1 - decay) * norm)
            square = np.float32(decay * square + (1 - decay) * norm * norm)
    return np.array(skipped)


def typical_norms(steps=400, seed=0):
    return np.exp(0.2 * np.random.default_rng(seed).normal(size=steps))


def test_one_nan_skips_one_step_rather_than_a_window():
    norms = typical_norms()
    norms[200] = np.nan
    assert maxtext(norms).sum() >= 128
    assert np.flatnonzero(ours(norms)).tolist() == [200]


def test_updates_of_a_bad_step_are_zeros_rather_than_nan():
    grads = {"w": jnp.array([jnp.nan, 1.0])}
    levanter = jax.tree.map(lambda g: g * 0.0, grads)
    assert np.isnan(levanter["w"]).any()
    tx = optclip.skip_steps(optax.sgd(1.0))
    out, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(out["w"], [0, 0])


def test_first_norm_far_from_one_does_not_lock_the_run():
    norms = 50 * typical_norms()
    assert axlearn(norms).all()
    assert ours(norms).sum() <= 5


def test_lasting_increase_does_not_lock_the_run():
    norms = typical_norms()
    norms[200:] *= 141
    assert axlearn(norms)[200:].all()
    skipped = ours(norms)
    assert skipped[200:210].all()
    assert skipped[210:].sum() <= 2


def test_constant_norms_do_not_lock_the_run():
    norms = np.r_[np.full(3000, 3.3), np.full(100, 3.3)]
    locked = axlearn(norms, decay=0.9, deviations=6.0)
    assert locked[-100:].all()
    assert not ours(norms).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_s5_nonfinite_steps_are_never_applied(bad):
    """Optax's apply_if_finite applies a bad update after enough consecutive ones."""
    grads = {"w": jnp.array([bad, 1.0])}

    def after(tx):
        state, params = tx.init(PARAMS), PARAMS
        for _ in range(8):
            updates, state = jax.jit(tx.update)(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params["w"]

    theirs = after(optax.apply_if_finite(optax.sgd(1.0, momentum=0.9), 3))
    assert not np.isfinite(theirs).all()
    mine = after(optclip.skip_steps(optax.sgd(1.0, momentum=0.9), max_consecutive=3))
    np.testing.assert_array_equal(mine, PARAMS["w"])


@pytest.mark.parametrize("wrap", ["apply_if_finite", "skip_steps"])
def test_s8_nan_on_one_shard_skips_the_step_on_all_devices(wrap):
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    spec = jax.sharding.PartitionSpec("x")
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    make = {
        "apply_if_finite": lambda: optax.apply_if_finite(optax.sgd(1.0), 3),
        "skip_steps": lambda: optclip.skip_steps(optax.sgd(1.0), axis_name="x"),
    }[wrap]
    grads = jnp.ones(16).at[5].set(jnp.nan)

    def step(g):
        tx = make()
        return tx.update(g, tx.init(g), g)[0]

    run = jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    moved = np.asarray(jax.jit(run)(grads)) != 0
    assert moved.any() == (wrap == "apply_if_finite")


def test_s7_clip_in_shard_map_uses_the_norm_of_the_full_tree():
    """Optax's clip uses a different norm, and so a different scale, on each device."""
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    cut, whole = jax.sharding.PartitionSpec("x"), jax.sharding.PartitionSpec()
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"w": cut, "b": whole}
    grads = {"w": jnp.arange(16.0), "b": jnp.ones(3)}

    def run(tx):
        step = lambda g: (tx.update(g, tx.init(g))[0], tx.update(g, tx.init(g))[0]["b"])  # noqa: E731
        mapped = jax.shard_map(
            step, mesh=mesh, in_specs=(specs,), out_specs=(specs, cut), check_vma=False
        )
        out, copies = jax.jit(mapped)(grads)
        return float(optax.tree.norm(out)), np.asarray(copies).reshape(8, 3)

    norm, copies = run(optax.clip_by_global_norm(1.0))
    assert norm > 1.5
    assert np.ptp(copies, axis=0).max() > 0.1
    norm, copies = run(optclip.clip_by_global_norm(1.0, axis_name=specs))
    np.testing.assert_allclose(norm, 1.0, rtol=1e-6)
    assert np.ptp(copies, axis=0).max() == 0
