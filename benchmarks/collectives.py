"""What clipping sends between devices: the collectives in the compiled program.

Eight CPU devices; the 81 leaves of a transformer are either sharded over their first
axis (FSDP) or replicated on each device. XLA's partitioner inserts the collectives;
counts and bytes are read from the compiled program, separately for the rare branch that
handles sums that overflow.

Usage: python benchmarks/collectives.py [--output benchmarks/results]
"""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import _hlo
import jax
import jax.numpy as jnp
import optax
from _results import machine, parser, write
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from step_cost import TREES

import optclip

SHAPES = TREES["29M parameters in 81 leaves"]
CLIPS = {
    "optax.clip_by_global_norm": optax.clip_by_global_norm(1.0),
    "clip_by_global_norm (tree)": optclip.clip_by_global_norm(1.0),
    "zclip (tree)": optclip.zclip(),
    "clip_by_leaf_norm (leaf)": optclip.clip_by_leaf_norm(1.0),
    "clip_by_unit_norm (unit)": optclip.clip_by_unit_norm(1.0),
    "adaptive_grad_clip (unit)": optclip.adaptive_grad_clip(0.01),
    "clip_by_value (element)": optclip.clip_by_value(1.0),
}


def collectives(text):
    """Returns (how many, bytes) in the entry computation, and how many in branches."""
    found = {
        name: _hlo.collectives(own) for name, own in _hlo.computations(text).items()
    }
    entry = found.pop("ENTRY")
    size = sum(_hlo.bytes_of(shape) for _, shape in entry)
    return len(entry), size, sum(map(len, found.values()))


def main():
    options = parser(__doc__).parse_args()
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((8,), ("x",), axis_types=auto)
    lines = [
        "| clip (scope) | layout | collectives | bytes | in the rare branch |",
        "| --- | --- | --- | --- | --- |",
    ]
    for layout in ("FSDP", "replicated"):
        specs = [P("x") if layout == "FSDP" else P() for _ in SHAPES]
        tree = {
            f"leaf{i:02d}": jax.ShapeDtypeStruct(
                s, jnp.float32, sharding=NamedSharding(mesh, spec)
            )
            for i, (s, spec) in enumerate(zip(SHAPES, specs, strict=True))
        }
        for name, tx in CLIPS.items():
            state = jax.eval_shape(tx.init, tree)
            text = jax.jit(tx.update).lower(tree, state, tree).compile().as_text()
            count, size, rare = collectives(text)
            lines.append(f"| {name} | {layout} | {count} | {size:,} | {rare} |")
            print(lines[-1], flush=True)
    lines += ["", f"Counted by `benchmarks/collectives.py` on {machine()}."]
    write(options.output, "collectives.md", lines)


if __name__ == "__main__":
    main()
