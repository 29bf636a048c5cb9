"""What a step costs on a GPU or TPU, by compiling for it: bytes, kernels, collectives.

`make test-accelerators` runs these. They need JAX's plugins, and no device.
"""

import functools
import pathlib
import sys

import pytest

pytest.importorskip("jax_cuda12_plugin")
pytest.importorskip("libtpu")

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

compiled = pytest.importorskip("compiled", reason="benchmarks/ is not here")

TREE = "29M parameters in 81 leaves"
SIZE = 4 * sum(compiled.np.prod(shape) for shape in compiled.TREES[TREE])


@functools.cache
def cost(name, target="H100", count=1):
    return compiled.measure(compiled.clips("float32")[name], TREE, target, count)


def added(name, target="H100"):
    """Returns (passes over the gradients, kernels) beside AdamW's, and the program."""
    ours, bare = cost(name, target), cost("AdamW alone", target)
    return (ours.bytes - bare.bytes) / SIZE, ours.kernels - bare.kernels, ours


@pytest.mark.parametrize(
    ("name", "kernels"),
    [("clip_by_global_norm", 40), ("zclip", 40), ("quantile_clip", 40),
     ("clip_by_leaf_norm", 50)],
)  # fmt: skip
def test_a_clip_reads_the_gradients_once_more_on_a_gpu(name, kernels):
    passes, launched, program = added(f"optclip.{name}")
    assert passes <= 1.02
    assert launched <= kernels
    assert program.conditions == 0


def test_a_clip_by_value_costs_nothing_on_a_gpu():
    passes, launched, program = added("optclip.clip_by_value")
    assert passes <= 0.001
    assert launched <= 2
    assert program.conditions == 0


def test_skipping_launches_no_more_than_optax_on_a_gpu():
    passes, launched, program = added("optclip.skip_steps")
    assert passes <= 1.02
    assert launched <= added("optax.apply_if_finite")[1]
    assert program.conditions == 0


def test_units_move_little_more_than_with_optax_on_a_gpu():
    ours, optax = (added(f"{package}.adaptive_grad_clip")[0] for package in
                   ("optclip", "optax"))  # fmt: skip
    assert ours <= optax + 0.05


@pytest.mark.parametrize("name", ["clip_by_global_norm", "clip_by_leaf_norm"])
def test_a_clip_moves_no_more_than_optax_on_a_tpu(name):
    ours = cost(f"optclip.{name}", "TPU v5e")
    optax = cost("optax.clip_by_global_norm", "TPU v5e")
    assert ours.bytes <= 1.01 * optax.bytes
    assert ours.conditions == 0


@pytest.mark.parametrize("target", ["H100", "TPU v5e"])
@pytest.mark.parametrize("name", ["clip_by_global_norm", "clip_by_leaf_norm"])
def test_eight_devices_exchange_one_array(name, target):
    program = cost(f"optclip.{name}", target, 8)
    assert program.collectives == {"all-reduce": 1}


@pytest.mark.parametrize("target", ["H100", "TPU v5e"])
def test_units_on_eight_devices_exchange_six_arrays(target):
    # The sums of gradients and parameters; whether they can be trusted (a GPU) and
    # which entries are non-finite; the norms of all units; how many were clipped; the
    # smallest scale, and the threshold that belongs to it.
    program = cost("optclip.adaptive_grad_clip", target, 8)
    assert set(program.collectives) == {"all-reduce"}
    assert program.collectives["all-reduce"] <= 6
