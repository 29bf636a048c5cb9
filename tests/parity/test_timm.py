"""timm's AGC, whose weights are output-first: torch's OIHW where Flax has HWIO.

timm reduces over all axes but the first, so it agrees with optclip's defaults on
transposed leaves, and with `axis=` on timm's layout. Importing the package requires
torchvision, but its AGC module does not, so the test loads that module from its file.
"""

import importlib.util
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

import optclip

torch = pytest.importorskip("torch")
SPEC = importlib.util.find_spec("timm")
if SPEC is None:
    pytest.skip("timm is not installed", allow_module_level=True)


def load_agc():
    file = pathlib.Path(SPEC.origin).parent / "utils" / "agc.py"
    spec = importlib.util.spec_from_file_location("timm_utils_agc", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.adaptive_clip_grad


pytestmark = pytest.mark.parity

# Output axis first, as in torch; no axis has length one.
SHAPES = {"conv": (5, 3, 2, 4), "dense": (6, 4), "bias": (6,)}


def draw(seed, size):
    rng = np.random.default_rng(seed)
    return {
        name: np.asarray(rng.normal(size=shape) * size, np.float32)
        for name, shape in SHAPES.items()
    }


def by_timm(grads, weights, **options):
    params = []
    for name in SHAPES:
        param = torch.nn.Parameter(torch.tensor(weights[name]))
        param.grad = torch.tensor(grads[name])
        params.append(param)
    load_agc()(params, **options)
    return {n: p.grad.numpy() for n, p in zip(SHAPES, params, strict=True)}


def output_last(tree):
    """OIHW to HWIO, and [out, in] to [in, out]."""
    conv = np.transpose(tree["conv"], (2, 3, 1, 0))
    return {"conv": conv, "dense": tree["dense"].T, "bias": tree["bias"]}


def apply(tx, grads, params):
    grads = {name: jnp.asarray(x) for name, x in grads.items()}
    return tx.update(grads, tx.init(params), params)[0]


each_clip = pytest.mark.parametrize("clipping", [1e-3, 0.01, 0.3, 1e3])
each_order = pytest.mark.parametrize("order", [1.0, 2.0, 3.0])


@each_clip
@each_order
def test_agc_on_transposed_leaves_matches_timm(clipping, order):
    grads, weights = draw(0, 0.1), draw(1, 0.5)
    peer = output_last(by_timm(grads, weights, clip_factor=clipping, norm_type=order))
    tx = optclip.adaptive_grad_clip(clipping, ord=order)
    ours = apply(tx, output_last(grads), output_last(weights))
    for name, expected in peer.items():
        np.testing.assert_allclose(ours[name], expected, rtol=2e-6)


@each_clip
def test_agc_with_axis_matches_timm_on_output_first_leaves(clipping):
    grads, weights = draw(0, 0.1), draw(1, 0.5)
    peer = by_timm(grads, weights, clip_factor=clipping)
    tx = optclip.adaptive_grad_clip(clipping, axis={"conv": (1, 2, 3), "dense": 1})
    ours = apply(tx, grads, weights)
    for name, expected in peer.items():
        np.testing.assert_allclose(ours[name], expected, rtol=2e-6)


@pytest.mark.parametrize("eps", [1e-3, 0.1])
def test_zero_weights_use_the_floor_of_timm(eps):
    grads, weights = draw(0, 0.1), draw(1, 0.0)
    peer = by_timm(grads, weights, clip_factor=0.01, eps=eps)
    tx = optclip.adaptive_grad_clip(0.01, eps=eps, axis={"conv": (1, 2, 3), "dense": 1})
    ours = apply(tx, grads, weights)
    for name, expected in peer.items():
        np.testing.assert_allclose(ours[name], expected, rtol=2e-6)
