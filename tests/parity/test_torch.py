"""`torch.nn.utils.clip_grad_norm_` and `clip_grad_value_`, and their optclip names."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optclip

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.parity

ORDERS = [1.0, 2.0, 3.0, float("inf")]


def draw(seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    shapes = [(4, 3), (3,), (2, 3, 2), ()]
    return [np.asarray(rng.normal(size=s) * scale, np.float32) for s in shapes]


def by_torch(arrays, clip, *args, **options):
    """Returns the gradients clipped by torch, and the return value of its function."""
    params = []
    for x in arrays:
        param = torch.nn.Parameter(torch.zeros(x.shape))
        param.grad = torch.tensor(x)
        params.append(param)
    returned = clip(params, *args, **options)
    return [p.grad.numpy() for p in params], returned


def torch_norm_clip(arrays, max_norm, order, **options):
    clip = torch.nn.utils.clip_grad_norm_
    return by_torch(arrays, clip, max_norm, norm_type=order, **options)


@functools.partial(jax.jit, static_argnames="order")
def jitted_clip(grads, max_norm, order):
    return optclip.clip_grad_norm(grads, max_norm, norm_type=order)


def assert_same(ours, theirs):
    for mine, peer in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(np.asarray(mine), peer, rtol=1e-6, atol=0)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("max_norm", [0.0, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_clip_grad_norm_matches_torch(order, max_norm, scale):
    grads = draw(scale=scale)
    peer, peer_norm = torch_norm_clip(grads, max_norm, order)
    ours, norm = jitted_clip(grads, max_norm, order)
    np.testing.assert_allclose(norm, peer_norm.numpy(), rtol=1e-6)
    assert_same(ours, peer)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("max_norm", [1e-6, 1.0, 1e6])
def test_clip_by_global_norm_with_eps_matches_torch(order, max_norm):
    grads = draw(scale=0.01)
    peer, _ = torch_norm_clip(grads, max_norm, order)
    tx = optclip.clip_by_global_norm(max_norm, ord=order, eps=1e-6)
    assert_same(tx.update(grads, tx.init(grads))[0], peer)


def test_norms_near_the_threshold_are_clipped_as_in_torch():
    # Torch scales norms above max_norm - eps: a norm of 1 becomes 0.999999.
    for size in (1 - 2e-6, 1 - 5e-7, 1.0, 1 + 5e-7):
        grads = [np.array([0.6, 0.8], np.float32) * np.float32(size)]
        peer, _ = torch_norm_clip(grads, 1.0, 2.0)
        assert_same(optclip.clip_grad_norm(grads, 1.0)[0], peer)


@pytest.mark.parametrize("order", ORDERS)
def test_zero_gradients_stay_zero_as_in_torch(order):
    grads = [np.zeros(3, np.float32), np.zeros((2, 2), np.float32)]
    for max_norm in (0.0, 1.0):
        peer, peer_norm = torch_norm_clip(grads, max_norm, order)
        ours, norm = optclip.clip_grad_norm(grads, max_norm, norm_type=order)
        assert float(norm) == float(peer_norm) == 0.0
        assert_same(ours, peer)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_nonfinite_gradients_match_torch(order, bad, max_norm):
    grads = draw()
    grads[0][1, 1] = bad
    peer, peer_norm = torch_norm_clip(grads, max_norm, order)
    ours, norm = optclip.clip_grad_norm(grads, max_norm, norm_type=order)
    np.testing.assert_array_equal(norm, peer_norm.numpy())
    assert_same(ours, peer)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_error_if_nonfinite_raises_as_in_torch(order, bad):
    grads = draw()
    torch_norm_clip(grads, 1.0, order, error_if_nonfinite=True)
    optclip.clip_grad_norm(grads, 1.0, order, error_if_nonfinite=True)
    grads[0][1, 1] = bad
    with pytest.raises(RuntimeError, match="non-finite"):
        torch_norm_clip(grads, 1.0, order, error_if_nonfinite=True)
    with pytest.raises(Exception, match="can't be clipped") as caught:
        optclip.clip_grad_norm(grads, 1.0, order, error_if_nonfinite=True)
    assert "JaxRuntimeError" in type(caught.value).__name__


def test_error_if_nonfinite_works_with_checkify_under_jit():
    from jax.experimental import checkify

    def clip(grads):
        return optclip.clip_grad_norm(grads, 1.0, error_if_nonfinite=True)

    checked = jax.jit(checkify.checkify(clip))
    error, (clipped, _) = checked(draw())
    error.throw()
    assert_same(clipped, torch_norm_clip(draw(), 1.0, 2.0)[0])
    grads = draw()
    grads[1][0] = np.inf
    error, _ = checked(grads)
    with pytest.raises(Exception, match="can't be clipped"):
        error.throw()


def test_arguments_have_the_same_positions_as_in_torch():
    grads = draw(scale=10.0)
    peer, _ = by_torch(grads, torch.nn.utils.clip_grad_norm_, 1.0, 1.0, True)
    assert_same(optclip.clip_grad_norm(grads, 1.0, 1.0, True)[0], peer)


@pytest.mark.parametrize("clip_value", [0.0, 1e-3, 0.5, 1e3])
def test_clip_grad_value_matches_torch(clip_value):
    grads = draw()
    grads[0][0, :] = [np.inf, -np.inf, 0.0]
    peer, _ = by_torch(grads, torch.nn.utils.clip_grad_value_, clip_value)
    assert_same(optclip.clip_grad_value(grads, clip_value), peer)
    grads[1][0] = np.nan
    peer, _ = by_torch(grads, torch.nn.utils.clip_grad_value_, clip_value)
    assert_same(optclip.clip_grad_value(grads, clip_value), peer)


def test_half_precision_is_preserved_as_in_torch():
    grads = [jnp.asarray(x, jnp.bfloat16) for x in draw(scale=10.0)]
    clipped, norm = optclip.clip_grad_norm(grads, 1.0)
    chex.assert_trees_all_equal_dtypes(clipped, grads)
    as_float32 = [np.asarray(x.astype(jnp.float32)) for x in grads]
    peer, peer_norm = torch_norm_clip(as_float32, 1.0, 2.0)
    np.testing.assert_allclose(norm, peer_norm.numpy(), rtol=1e-6)
    for mine, theirs in zip(clipped, peer, strict=True):
        np.testing.assert_allclose(mine.astype(jnp.float32), theirs, rtol=2.0**-8)
