"""jax-privacy: the same clipped gradients, and optclip after its noise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip

jax_privacy = pytest.importorskip("jax_privacy")

pytestmark = [
    pytest.mark.parity,
    # The package uses Optax's older name of this function.
    pytest.mark.filterwarnings("ignore:optax.global_norm:DeprecationWarning"),
]

BOUND = 0.5
WEIGHTS = {"w": (6, 3), "b": (3,)}


def loss_fn(params, x, y):
    """The loss of one example."""
    return jnp.mean((x @ params["w"] + params["b"] - y) ** 2)


def drawn(dtype=jnp.float32, seed=0, examples=16):
    rng = np.random.default_rng(seed)
    params = {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in WEIGHTS.items()}
    x, y = rng.normal(size=(examples, 6)), rng.normal(size=(examples, 3))
    x *= np.geomspace(1e-2, 10, examples)[:, None]  # some are clipped, some are not
    return params, jnp.asarray(x, dtype), jnp.asarray(y, dtype)


def their_gradients(examples, **options):
    return jax.jit(
        jax_privacy.clipped_grad(
            loss_fn, l2_clip_norm=BOUND, normalize_by=examples, batch_argnums=(1, 2),
            keep_batch_dim=False, **options,
        )
    )  # fmt: skip


def norm_of(tree):
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
    return np.sqrt(sum(np.sum(x**2) for x in leaves))


@pytest.mark.parametrize("microbatch_size", [None, 4])
def test_gradients_and_norms_match_jax_privacy_in_float32(microbatch_size):
    batch = drawn()
    ours, stats = jax.jit(
        optclip.clipped_grad(loss_fn, BOUND, microbatch_size=microbatch_size)
    )(*batch)
    theirs, aux = their_gradients(
        16, microbatch_size=microbatch_size, return_grad_norms=True
    )(*batch)
    assert 0 < stats.clipped_share < 1
    np.testing.assert_allclose(stats.example_norms, aux.grad_norms, rtol=1e-6)
    for mine, peer in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(mine, peer, rtol=1e-5, atol=1e-7)


def test_jax_privacy_sum_is_optclip_mean_times_batch_size():
    batch = drawn()
    ours, _ = jax.jit(optclip.clipped_grad(loss_fn, BOUND))(*batch)
    theirs = jax.jit(
        jax_privacy.clipped_grad(
            loss_fn, l2_clip_norm=BOUND, batch_argnums=(1, 2), keep_batch_dim=False
        )
    )(*batch)
    for mine, peer in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(16 * mine, peer, rtol=1e-5, atol=1e-6)


def test_bfloat16_gradients_stay_within_the_bound_unlike_jax_privacy():
    theirs, ours = [], []
    peer_fn = their_gradients(1)
    grad_fn = jax.jit(optclip.clipped_grad(loss_fn, BOUND))
    for seed in range(20):
        params, x, y = drawn(jnp.bfloat16, seed)
        batch = params, x[-1:], y[-1:]  # one example, which is clipped
        theirs.append(norm_of(peer_fn(*batch)))
        ours.append(norm_of(grad_fn(*batch)[0]))
    assert max(theirs) > BOUND * (1 + 1e-3)
    assert max(ours) <= BOUND
    assert min(ours) > BOUND * (1 - 2.0**-6)


@pytest.fixture(scope="module")
def clipped():
    """Parameters, and clipped gradients of a batch with a NaN, which counts as zero."""
    params, x, y = drawn()
    grads = their_gradients(16)(params, x.at[3, 0].set(jnp.nan), y)
    assert np.isfinite(norm_of(grads))
    return params, grads


def privatizer(stddev=0.01):
    return jax_privacy.noise_addition.gaussian_privatizer(
        stddev=stddev, prng_key=jax.random.key(1)
    )


BEHIND = {
    "clip": lambda: optax.chain(optclip.clip_by_global_norm(0.05), optax.adam(1e-2)),
    "zclip": lambda: optax.chain(optclip.zclip(), optax.adam(1e-2)),
    "stabilize": lambda: optclip.stabilize(optax.adam(1e-2)),
    "skip_steps": lambda: optclip.skip_steps(optax.adam(1e-2)),
}


@pytest.mark.parametrize("name", BEHIND)
def test_transformations_after_the_noise_only_see_the_noisy_gradient(name, clipped):
    noise, optimizer = privatizer(), BEHIND[name]()
    tx = optax.chain(noise, optimizer)
    params, grads = clipped
    step, add = jax.jit(tx.update), jax.jit(noise.update)
    then = jax.jit(optimizer.update)
    state, noise_state = tx.init(params), noise.init(params)
    inner = optimizer.init(params)
    for _ in range(3):
        updates, state = step(grads, state, params)
        noisy, noise_state = add(grads, noise_state)
        wanted, inner = then(noisy, inner, params)
        for leaf in WEIGHTS:
            np.testing.assert_allclose(updates[leaf], wanted[leaf], rtol=1e-5)
    metrics = optclip.metrics(state)
    seen = metrics["skip/norm" if name == "skip_steps" else "clip/norm_before"]
    np.testing.assert_allclose(seen, norm_of(noisy), rtol=1e-5)
    assert abs(norm_of(noisy) / norm_of(grads) - 1) > 1e-3


def key_data(state):
    kinds = [(x, jnp.issubdtype(x.dtype, jax.dtypes.prng_key))
             for x in jax.tree.leaves(state)]  # fmt: skip
    (key,) = [x for x, is_key in kinds if is_key]
    return jax.random.key_data(key)


def test_skipping_a_step_after_the_noise_does_not_reuse_its_noise(clipped):
    params, grads = clipped
    behind = optclip.skip_steps(optax.sgd(1.0), when=1e-3)
    around = optclip.skip_steps(optax.chain(privatizer(1.0), optax.sgd(1.0)), when=1e-3)
    tx = optax.chain(privatizer(1.0), behind)
    step = jax.jit(tx.update)
    state, norms = tx.init(params), []
    for _ in range(3):
        updates, state = step(grads, state, params)
        assert norm_of(updates) == 0
        norms.append(float(optclip.metrics(state)["skip/norm"]))
    assert int(optclip.metrics(state)["skip/skipped_steps"]) == 3
    assert len(set(norms)) == 3
    # A wrapper around the noise does reuse it, as documented.
    before = around.init(params)
    _, after = jax.jit(around.update)(grads, before, params)
    np.testing.assert_array_equal(key_data(before), key_data(after))
    noise = [s[0] for s in (tx.init(params), state)]
    assert not np.array_equal(*map(key_data, noise))
