"""Per-example clipping: bounded gradients, dropped non-finite examples, memory."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optclip

PARAMS = {"w": jnp.float32([0.5, -1.0, 2.0]), "b": jnp.float32(0.1)}


def loss_fn(params, x, y, scale=1.0):
    return scale * jnp.mean((params["w"] @ x + params["b"] - y) ** 2)


def batch(size=10, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(size, 3)).astype(np.float32)
    x[1] *= 50
    return x, rng.normal(size=size).astype(np.float32)


def oracle(x, y, max_norm):
    """The mean of clipped gradients in float64, and the expected statistics."""
    w, b = np.asarray(PARAMS["w"], float), float(PARAMS["b"])
    error = x.astype(float) @ w + b - y
    each = 2 * error[:, None] * np.concatenate([x, np.ones((len(x), 1))], axis=1)
    norms = np.sqrt(np.sum(each**2, axis=1))
    fine = np.isfinite(norms)
    scale = np.minimum(1, max_norm / norms[fine])
    mean = np.mean(each[fine] * scale[:, None], axis=0)
    return {"w": mean[:3], "b": mean[3]}, norms, error[fine] ** 2


@pytest.mark.parametrize("microbatch_size", [None, 1, 3, 5, 64])
def test_mean_matches_gradients_clipped_one_by_one(microbatch_size):
    x, y = batch()
    wanted, norms, losses = oracle(x, y, 1.0)
    f = optclip.clipped_grad(loss_fn, 1.0, microbatch_size=microbatch_size)
    grads, stats = jax.jit(f)(PARAMS, x, y)
    chex.assert_trees_all_close(grads, wanted, rtol=2e-5)
    np.testing.assert_allclose(stats.example_norms, norms, rtol=2e-5)
    np.testing.assert_allclose(stats.loss, losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(stats.clipped_share, np.mean(norms > 1), rtol=1e-6)
    assert int(stats.dropped_examples) == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_nonfinite_example_is_dropped_and_counted(value):
    x, y = batch()
    x[[2, 7]] = value
    kept = np.delete(x, [2, 7], axis=0), np.delete(y, [2, 7])
    f = jax.jit(optclip.clipped_grad(loss_fn, 1.0, microbatch_size=4))
    wanted, _, _ = oracle(*kept, 1.0)
    grads, stats = f(PARAMS, x, y)
    chex.assert_trees_all_close(grads, wanted, rtol=2e-5)
    assert int(stats.dropped_examples) == 2
    assert np.isfinite(stats.loss)
    grads, stats = f(PARAMS, np.full_like(x, np.nan), y)
    chex.assert_trees_all_equal(grads, jax.tree.map(jnp.zeros_like, PARAMS))
    assert float(stats.loss) == 0
    assert int(stats.dropped_examples) == 10


@pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn]
)
def test_norm_never_exceeds_the_bound_in_any_dtype(dtype):
    bits = jnp.finfo(dtype).bits
    leaves = 60 if bits >= 16 else 2  # otherwise entries underflow in float8
    params = {f"w{i}": jnp.ones(100, dtype) for i in range(leaves)}

    def loss(params, x):
        wide = jnp.promote_types(dtype, jnp.bfloat16) if bits >= 16 else jnp.float32
        return sum(jnp.vdot(x.astype(wide), p.astype(wide)) for p in params.values())

    f = jax.jit(optclip.clipped_grad(loss, 1.0))
    for seed in range(5):
        x = np.random.default_rng(seed).uniform(0.5, 1.5, (4, 100)).astype(np.float32)
        x[:] = x[0]  # all equal, so their mean has the same norm
        grads, _ = f(params, x)
        assert all(g.dtype == dtype for g in grads.values())
        flat = np.concatenate([np.asarray(g, np.float64) for g in grads.values()])
        norm = np.linalg.norm(flat)
        assert norm <= 1
        assert norm > 1 - 1.5 * max(float(jnp.finfo(dtype).eps), 1e-6)


def test_shared_arguments_and_aux_are_passed_through():
    def with_aux(params, x, y, scale):
        loss = loss_fn(params, x, y, scale)
        return loss, {"sum": jnp.sum(x)}

    x, y = batch(7)
    f = optclip.clipped_grad(with_aux, 1e9, microbatch_size=2, has_aux=True)
    grads, stats = f(PARAMS, x, y, scale=2.0)
    np.testing.assert_allclose(stats.aux["sum"], x.sum(axis=1), rtol=1e-5)
    mean = jax.grad(lambda p: jnp.mean(jax.vmap(loss_fn, (None, 0, 0))(p, x, y)))
    chex.assert_trees_all_close(
        grads, jax.tree.map(lambda g: 2 * g, mean(PARAMS)), rtol=1e-4
    )


def test_memory_is_bounded_by_the_microbatch_size():
    params, x = jnp.ones((64, 64)), jnp.ones((128, 64))

    def loss(params, x):
        return jnp.sum(jnp.tanh(params @ x))

    def temporaries(microbatch_size):
        f = optclip.clipped_grad(loss, 1.0, microbatch_size=microbatch_size)
        compiled = jax.jit(f).lower(params, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    one = params.size * 4
    assert temporaries(2) < 16 * one
    assert temporaries(None) > 100 * one


def test_eight_devices_match_one_device():
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    x, y = batch(32)
    wanted = jax.jit(optclip.clipped_grad(loss_fn, 1.0))(PARAMS, x, y)
    mesh = Mesh(np.array(jax.devices()), ("x",))
    auto = jax.jit(optclip.clipped_grad(loss_fn, 1.0, microbatch_size=8))
    sharded = jax.device_put((x, y), NamedSharding(mesh, P("x")))
    chex.assert_trees_all_close(auto(PARAMS, *sharded), wanted, rtol=1e-5, atol=1e-6)
    manual = optclip.clipped_grad(loss_fn, 1.0, microbatch_size=2, axis_name="x")
    out = (
        P(),
        wanted[1]._replace(
            loss=P(), example_norms=P("x"), clipped_share=P(), dropped_examples=P()
        ),
    )
    for check in (True, False):
        mapped = jax.shard_map(
            manual, mesh=mesh, in_specs=(P(), P("x"), P("x")), out_specs=out,
            check_vma=check,
        )  # fmt: skip
        got = jax.jit(mapped)(PARAMS, x, y)
        chex.assert_trees_all_close(got, wanted, rtol=1e-5, atol=1e-6)


def gathered(mesh, loss, before, check):
    """Checks clipped gradients of parameters that are sharded over eight devices."""
    f = optclip.clipped_grad(loss, 1.0, axis_name="x")
    mapped = jax.shard_map(
        lambda w, x: f(before(w), x)[0], mesh=mesh, in_specs=P("x"),
        out_specs=P(), check_vma=check,
    )  # fmt: skip
    x = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    wanted, _ = optclip.clipped_grad(lambda w, x: (w @ x) ** 2, 1.0)(
        np.ones(8, np.float32), x
    )
    np.testing.assert_allclose(jax.jit(mapped)(np.ones(8), x), wanted, rtol=1e-5)


@pytest.mark.parametrize("check", [True, False])
def test_sharded_parameters_must_be_gathered_before_the_loss_and_not_within_it(check):
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def gather(w):
        return jax.lax.all_gather(w, "x", tiled=True)

    gathered(mesh, lambda w, x: (w @ x) ** 2, gather, check)
    for hide in (lambda f: f, jax.jit, jax.checkpoint):
        within = hide(lambda w, x: (gather(w) @ x) ** 2)
        with pytest.raises(ValueError, match=r"must not use all_gather along \('x',\)"):
            gathered(mesh, within, lambda w: w, check)


def test_flax_model_is_split_into_trained_and_other_variables():
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(3, 1, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

    model = Model(nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, x, rest):
        model = nnx.merge(graph, params, jax.tree.map(lambda x: x, rest))
        return jnp.sum(model.linear(model.dropout(x)) ** 2)

    f = jax.jit(optclip.clipped_grad(loss, 0.5))
    grads, _ = f(params, batch()[0], rest=rest)
    norm = optclip.norms.global_norm(grads)
    assert 0.1 < float(norm) <= 0.5
    with pytest.raises(TypeError, match=r"got uint32 at `dropout/rngs/count`"):
        optclip.clipped_grad(loss, 0.5)(nnx.state(model), batch()[0], rest=rest)


def test_trains_with_an_optimizer_applied_afterwards():
    x, _ = batch(64)
    x[1] /= 50
    target = np.array([1.0, 2.0, -1.0], np.float32)
    y = x @ target
    y[::16] = 1e4  # wrong labels, which would dominate a mean of squares
    f = optclip.clipped_grad(loss_fn, 1.0, microbatch_size=16)
    tx = optax.adam(0.05)
    params, state = PARAMS, tx.init(PARAMS)

    @jax.jit
    def step(params, state):
        grads, stats = f(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, stats

    for _ in range(300):
        params, state, _ = step(params, state)
    np.testing.assert_allclose(params["w"], target, atol=0.2)


def test_error_messages_are_actionable():
    x, y = batch()
    f = optclip.clipped_grad(loss_fn, 1.0)
    with pytest.raises(ValueError, match=r"`max_norm` must be >= 0, got -1\.0"):
        optclip.clipped_grad(loss_fn, -1.0)
    with pytest.raises(ValueError, match="`microbatch_size` must be an int >= 1"):
        optclip.clipped_grad(loss_fn, 1.0, microbatch_size=0)
    with pytest.raises(TypeError, match="`loss_fn` must be a function"):
        optclip.clipped_grad(3.0, 1.0)
    with pytest.raises(ValueError, match="along the first axis of every array"):
        f(PARAMS, x, y[:3])
    with pytest.raises(ValueError, match="along the first axis of every array"):
        f(PARAMS, x, 1.0)
    with pytest.raises(TypeError, match="`loss_fn` must return the loss of one"):
        optclip.clipped_grad(lambda p, x, y: (p["b"], x), 1.0)(PARAMS, x, y)
    with pytest.raises(TypeError, match="`loss_fn` must return the loss of one"):
        optclip.clipped_grad(lambda p, x, y: p["w"], 1.0)(PARAMS, x, y)
    with pytest.raises(ValueError, match="`batch` has no arrays"):
        f(PARAMS)
    with pytest.raises(ValueError, match="`batch` has no examples"):
        f(PARAMS, x[:0], y[:0])
    for empty in ({}, None):
        with pytest.raises(ValueError, match="`params` must hold arrays, got"):
            optclip.clipped_grad(lambda p, x: jnp.sum(x), 1.0)(empty, x)
    with pytest.raises(TypeError, match=r"got int(32|64) at `b`"):
        f({**PARAMS, "b": 1}, x, y)
    for bound in (optax.constant_schedule(1.0), optclip.rules.constant(1.0)):
        with pytest.raises(TypeError, match="call `clipped_grad` within the step"):
            optclip.clipped_grad(loss_fn, bound)
    for name in ("auto", 3, P(("a", "b"))):
        with pytest.raises(ValueError, match="`axis_name` must name the mesh axes"):
            optclip.clipped_grad(loss_fn, 1.0, axis_name=name)
