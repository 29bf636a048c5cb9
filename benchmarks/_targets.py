"""GPUs and TPUs to compile for without having one, and what a compiled program costs.

XLA can compile for a device that it only has a description of. From the compiled
program we count the bytes that a step moves, its kernels, conditions, collectives and
temporaries, and we measure the time to compile. The speed of a step can't be known
without the device.
"""

import collections
import os
from typing import NamedTuple

os.environ.update(
    JAX_PLATFORMS="cpu",
    JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1",
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import _hlo
import jax
from jax.experimental import topologies


class Gpu(NamedTuple):
    """The published specifications of a GPU that XLA asks for."""

    name: str
    major: int
    shared_per_core: int
    cores: int
    bandwidth: int
    l2_cache: int
    clock_ghz: float
    memory: int

    def __str__(self):
        """Returns the specifications in the format that XLA reads."""
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: {self.shared_per_core}
  shared_memory_per_block_optin: {self.shared_per_core - 1024}
  threads_per_core_limit: 2048 core_count: {self.cores}
  fpus_per_core: {128 if self.major == 9 else 64}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {self.bandwidth} l2_cache_size: {self.l2_cache}
  clock_rate_ghz: {self.clock_ghz} device_memory_size: {self.memory}
  cuda_compute_capability {{ major: {self.major} }}
  device_vendor: "NVIDIA Corporation" name: "{self.name}"
  driver_version: "12.8.0" runtime_version: "12.8.0"
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "sm_{self.major}0 {self.name}"
"""


GPUS = {
    "H100": Gpu(
        "NVIDIA H100 80GB HBM3", 9, 233472, 132, 3352320000000, 52428800, 1.98,
        84942979072,
    ),
    "A100": Gpu(
        "NVIDIA A100-SXM4-80GB", 8, 167936, 108, 2039000000000, 41943040, 1.41,
        85094825984,
    ),
}  # fmt: skip
TPUS = {"TPU v5e": "v5e", "TPU v6e": "v6e"}
TARGETS = (*GPUS, *TPUS)


def devices(target, count):
    """Returns ``count`` devices of a target, which need not exist here."""
    if target in GPUS:
        made = topologies.get_topology_desc(
            platform="cuda",
            topology_name=target.lower(),
            topology=f"1x1x{count}",
            target_config=str(GPUS[target]),
        )
    else:
        grid = [2, 4, 1] if count == 8 else [2, 2, 1]
        made = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{TPUS[target]}:{grid[0]}x{grid[1]}",
            chips_per_host_bounds=grid,
        )
    return made.devices[:count]


class Program(NamedTuple):
    """The costs counted from a compiled program.

    Attributes:
        bytes: Bytes that its kernels read from and write to main memory.
        accessed: The same as counted by XLA, which includes fast memory; on a TPU only,
            else None.
        kernels: How many kernels are launched, not counting those inside conditions.
        conditions: How many times the host may have to wait to learn what to launch.
        collectives: How many collectives there are, by kind.
        temporaries: Bytes of memory in addition to arguments and results.
        seconds: CPU seconds of tracing and compiling, including child processes.
    """

    bytes: float
    accessed: float | None
    kernels: int
    conditions: int
    collectives: dict
    temporaries: int
    seconds: float


def compiled(function, target, *arguments, donate=(), options=None):
    """Returns what ``function`` costs for arguments whose sharding names devices.

    ``options`` are XLA's, by name.
    """
    jax.clear_caches()
    start = sum(os.times()[:4])
    made = jax.jit(function, donate_argnums=donate).lower(*arguments)
    made = made.compile(compiler_options=options)
    seconds = sum(os.times()[:4]) - start
    program = _hlo.computations(made.as_text())
    kernels, moved = _hlo.kernels(program)
    entry = program["ENTRY"]
    accessed = None
    if target in TPUS:
        accessed = made.cost_analysis()["bytes accessed"]
    return Program(
        bytes=moved,
        accessed=accessed,
        kernels=kernels,
        conditions=sum(op == "conditional" for _, _, op, _ in entry),
        collectives=collections.Counter(kind for kind, _ in _hlo.collectives(entry)),
        temporaries=made.memory_analysis().temp_size_in_bytes,
        seconds=seconds,
    )
