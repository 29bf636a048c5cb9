"""Costs of a step compiled for a GPU or TPU: bytes, kernels, collectives.

`make test-accelerators` runs these. They need JAX's plugins but no device.
"""

import functools
import pathlib
import sys

import jax
import numpy as np
import optax
import pytest
from jax.sharding import SingleDeviceSharding

import optclip

pytest.importorskip("jax_cuda12_plugin")
pytest.importorskip("libtpu")

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

compiled = pytest.importorskip("compiled", reason="benchmarks/ is not here")
gpt = pytest.importorskip("_gpt", reason="benchmarks/ is not here")

TREE = "29M parameters in 81 leaves"
SIZE = 4 * sum(compiled.np.prod(shape) for shape in compiled.TREES[TREE])


@functools.cache
def cost(name, target="H100", count=1):
    return compiled.measure(compiled.clips("float32")[name], TREE, target, count)


def added(name, target="H100"):
    """Returns (passes over the gradients, kernels) added to AdamW, and the program."""
    ours, bare = cost(name, target), cost("AdamW alone", target)
    return (ours.bytes - bare.bytes) / SIZE, ours.kernels - bare.kernels, ours


@pytest.mark.parametrize(
    ("name", "kernels"),
    [("clip_by_global_norm", 40), ("zclip", 40), ("quantile_clip", 40),
     ("clip_by_leaf_norm", 50)],
)  # fmt: skip
def test_clip_adds_one_pass_over_the_gradients_on_gpu(name, kernels):
    passes, launched, program = added(f"optclip.{name}")
    assert passes <= 1.02
    assert launched <= kernels
    assert program.conditions == 0


def test_clip_by_value_costs_nothing_on_gpu():
    passes, launched, program = added("optclip.clip_by_value")
    assert passes <= 0.001
    assert launched <= 2
    assert program.conditions == 0


def test_skip_steps_launches_no_more_kernels_than_optax_on_gpu():
    passes, launched, program = added("optclip.skip_steps")
    assert passes <= 1.02
    assert launched <= added("optax.apply_if_finite")[1]
    assert program.conditions == 0


def test_unit_clip_moves_few_more_bytes_than_optax_on_gpu():
    ours, optax = (added(f"{package}.adaptive_grad_clip")[0] for package in
                   ("optclip", "optax"))  # fmt: skip
    assert ours <= optax + 0.05


MODEL = gpt.Size(4, 128, 256, 4, 4, 1000)


@functools.cache
def training_cost(name):
    with jax.numpy_rank_promotion("allow"):
        return compiled.measure_training(compiled.clips("float32")[name], MODEL, "H100")


@pytest.mark.parametrize(
    "name", ["clip_by_global_norm", "clip_by_leaf_norm", "zclip", "skip_steps"]
)
def test_clip_does_not_write_out_gradients_that_the_backward_pass_converts(name):
    ours, optax = map(training_cost, (f"optclip.{name}", "optax.clip_by_global_norm"))
    size = sum(x.nbytes for x in jax.tree.leaves(gpt.initial(MODEL)))
    assert ours.bytes - optax.bytes <= 0.1 * size
    assert ours.conditions == 0


SCANNED = {
    "clip_by_global_norm": optclip.clip_by_global_norm(1.0),
    "adaptive_grad_clip": optclip.adaptive_grad_clip(0.1),
    "clip_by_value": optclip.clip_by_value(0.1, record=True),
    "autoclip": optclip.autoclip(),
    "adagc": optclip.adagc(),
    "skip_steps": optclip.skip_steps(optax.adam(1e-2)),
    "skip_steps of zclip": optclip.skip_steps(
        optax.chain(optclip.zclip(), optax.adam(1e-2)), when=50.0
    ),
    "stabilize": optclip.stabilize(optax.adam(1e-2)),
}


@pytest.mark.parametrize("name", SCANNED)
def test_scan_over_constant_gradients_compiles_for_gpu(name):
    # XLA evaluates computations that depend only on constants and the step number, and
    # fails if they contain a barrier.
    tx = SCANNED[name]
    params = {"kernel": np.ones((4, 3), np.float32), "bias": np.ones(3, np.float32)}
    grads = {k: np.stack([x, 2 * x, 3 * x]) for k, x in params.items()}
    place = SingleDeviceSharding(compiled.devices("H100", 1)[0])
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        jax.eval_shape(tx.init, params),
    )

    def run(state):
        step = lambda state, g: tx.update(g, state, params)[::-1]  # noqa: E731
        return jax.lax.scan(step, state, grads)

    jax.jit(run).lower(state).compile()


@pytest.mark.parametrize("name", ["clip_by_global_norm", "clip_by_leaf_norm"])
def test_clip_moves_no_more_bytes_than_optax_on_tpu(name):
    ours = cost(f"optclip.{name}", "TPU v5e")
    optax = cost("optax.clip_by_global_norm", "TPU v5e")
    assert ours.bytes <= 1.01 * optax.bytes
    assert ours.conditions == 0


@pytest.mark.parametrize("target", ["H100", "TPU v5e"])
@pytest.mark.parametrize("name", ["clip_by_global_norm", "clip_by_leaf_norm"])
def test_clip_on_eight_devices_exchanges_one_array(name, target):
    program = cost(f"optclip.{name}", target, 8)
    assert program.collectives == {"all-reduce": 1}


@pytest.mark.parametrize("target", ["H100", "TPU v5e"])
def test_unit_clip_on_eight_devices_exchanges_six_arrays(target):
    # The six are: sums of gradients and parameters; flags for accurate sums (GPU) and
    # for non-finite entries; norms of all units; number of clipped units; the smallest
    # scale; the threshold that belongs to it.
    program = cost("optclip.adaptive_grad_clip", target, 8)
    assert set(program.collectives) == {"all-reduce"}
    assert program.collectives["all-reduce"] <= 6
