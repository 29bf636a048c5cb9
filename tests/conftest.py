"""Settings of the suite: eight devices, fast compilation, no implicit broadcasting."""

import importlib.metadata
import os
import pathlib
import sys
import tempfile

# The suite spends its time compiling, so LLVM's optimizations are off. XLA decides on
# fusions and allocations before LLVM runs, so the tests still see them.
FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
]
# The older emitters take half the time. JAX 0.12 removed them and is tested with its
# defaults. `test_speed` requests the default ones.
version = importlib.metadata.version("jaxlib").split(".")
if (int(version[0]), int(version[1])) < (0, 11):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
given = os.environ.get("XLA_FLAGS", "")
missing = [flag for flag in FLAGS if flag.split("=")[0] not in given]
os.environ["XLA_FLAGS"] = " ".join([given, *missing])

# Many tests compile the same small programs, so workers share a compilation cache. The
# parent process creates and removes the folder; workers inherit its environment.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    cache = tempfile.TemporaryDirectory(prefix="optclip-tests-")
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": cache.name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

# Some tests read the benchmarks, which are not installed. The package itself comes from
# where it is installed, so this folder is last.
sys.path.append(str(pathlib.Path(__file__).parents[1]))

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# `make test-x64` runs the suite with float64 enabled.
X64 = os.environ.get("OPTCLIP_TEST_X64", "") not in ("", "0")
jax.config.update("jax_enable_x64", X64)


def pytest_collection_modifyitems(config, items):
    """Sends tests that share a compiled program to one worker (--dist loadgroup)."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        params = (getattr(item, "callspec", None) and item.callspec.params) or {}
        if "name" in params:
            wide = "x64" in item.fixturenames
            group = (item.path.stem, params["name"], params.get("dtype"), wide)
            item.add_marker(pytest.mark.xdist_group("-".join(map(str, group))))


@pytest.fixture
def x64():
    """Enables float64 for one test."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", X64)
