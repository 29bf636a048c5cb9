"""What clipping costs on a GPU or TPU: one AdamW step, compiled for it but not run.

Usage:

    python benchmarks/compiled.py [--target H100] [--devices 1] [--tree NAME]
                                  [--dtype bfloat16] [--only TEXT]
    python benchmarks/compiled.py --training
    python benchmarks/compiled.py --all --output benchmarks/results

It needs JAX's plugins (the dependency groups `gpu` and `tpu`) but no device. Each row
is a donated step with clipping, compared with AdamW alone. With 8 devices, matrices are
sharded over both axes of a 4 x 2 mesh.
"""

import functools
import itertools

# This import must come first: it sets environment variables that JAX reads.
from _targets import TARGETS, compiled, devices

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _gpt import FIXED, SMALL, initial, loss_of
from _results import machine, parser, write
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from step_cost import TREES, block

import optclip

LAYERS, WIDTH = 12, 512
TREES = {
    **TREES,
    "policy network of 8 leaves": [
        (64, 256), (256,), (256, 256), (256,), (256, 8), (8,), (256, 1), (1,),
    ],
    "transformer of 12 scanned layers": [
        *((LAYERS, *s) for s in block(WIDTH)), (8192, WIDTH), (WIDTH,), (WIDTH,),
    ],
}  # fmt: skip
SKIPPING = functools.partial(optax.apply_if_finite, max_consecutive_errors=10)


def clips(dtype):
    """Returns what to compare, by name: transformations, wrappers, None for AdamW."""
    wide = {} if dtype == "float32" else {"update_dtype": jnp.float32}
    return {
        "AdamW alone": None,
        "optax.clip_by_global_norm": optax.clip_by_global_norm(1.0),
        "optclip.clip_by_global_norm": optclip.clip_by_global_norm(1.0, **wide),
        "optclip.zclip": optclip.zclip(**wide),
        "optclip.quantile_clip": optclip.quantile_clip(**wide),
        "optclip.autoclip": optclip.autoclip(**wide),
        "optax.clip_by_block_rms": optax.clip_by_block_rms(0.1),
        "optclip.clip_by_leaf_norm": optclip.clip_by_leaf_norm(0.1, **wide),
        "optclip.adagc": optclip.adagc(**wide),
        "optclip.clip_per_layer": optclip.clip_per_layer(0.1, {".*": 1}, **wide),
        "optax.adaptive_grad_clip": optax.adaptive_grad_clip(0.01),
        "optclip.adaptive_grad_clip": optclip.adaptive_grad_clip(0.01, **wide),
        "optclip.clip_by_unit_norm": optclip.clip_by_unit_norm(0.01, **wide),
        "optax.clip": optax.clip(0.01),
        "optclip.clip_by_value": optclip.clip_by_value(0.01, **wide),
        "optclip.clip_by_value, record": optclip.clip_by_value(
            0.01, record=True, **wide
        ),
        "optax.apply_if_finite": SKIPPING,
        "optclip.skip_steps": optclip.skip_steps,
        "optclip.stabilize": optclip.stabilize,
    }


CORE = (
    "optax.clip_by_global_norm",
    "optclip.clip_by_global_norm",
    "optclip.clip_by_leaf_norm",
)
UNITS = ("optax.adaptive_grad_clip", "optclip.adaptive_grad_clip")
WRAPPERS = ("optax.apply_if_finite", "optclip.skip_steps")
FIRST, MANY, POLICY, SCANNED = TREES
# `optax.apply_if_finite` needs gradients of the same dtype as the parameters.
HALF = tuple(name for name in clips("bfloat16") if name != "optax.apply_if_finite")
# What `--all` writes: tree, dtype of the gradients, target, devices, rows (all if ()).
ALL = [
    (FIRST, "float32", "H100", 1, ()),
    (FIRST, "bfloat16", "H100", 1, HALF),
    (FIRST, "float32", "H100", 8, (*CORE, *UNITS)),
    (MANY, "float32", "H100", 1, CORE),
    (POLICY, "float32", "H100", 1, (*CORE, *WRAPPERS)),
    (SCANNED, "float32", "H100", 1, (*CORE, "optclip.clip_per_layer")),
    (FIRST, "float32", "A100", 1, CORE),
    (FIRST, "float32", "TPU v5e", 1, ()),
    (FIRST, "bfloat16", "TPU v5e", 1, CORE),
    (FIRST, "float32", "TPU v5e", 8, (*CORE, *UNITS)),
    (MANY, "float32", "TPU v5e", 1, CORE),
    (POLICY, "float32", "TPU v5e", 1, (*CORE, *WRAPPERS)),
    (SCANNED, "float32", "TPU v5e", 1, (*CORE, "optclip.clip_per_layer")),
    (FIRST, "float32", "TPU v6e", 1, CORE),
]
# The training step is compiled for a GPU only: for a TPU, XLA takes minutes per row.
TRAINING = (*CORE, "optclip.zclip", *UNITS, *WRAPPERS, "optclip.stabilize")


def shapes_of(tree, target, count):
    """Returns the parameters of a tree as shapes on devices, and their sharding."""
    found = devices(target, count)
    if count == 1:
        place = lambda shape: SingleDeviceSharding(found[0])  # noqa: E731
    else:
        mesh = Mesh(np.array(found).reshape(4, 2), ("data", "model"))
        place = lambda shape: NamedSharding(  # noqa: E731
            mesh, P("data", "model") if len(shape) == 2 else P()
        )
    params = {
        f"leaf{i:04d}": jax.ShapeDtypeStruct(s, jnp.float32, sharding=place(s))
        for i, s in enumerate(TREES[tree])
    }
    return params, place


def chained(clip):
    """Returns AdamW after a clip, or inside a wrapper."""
    inner = optax.adamw(1e-3)
    if clip is None:
        return inner
    return clip(inner) if callable(clip) else optax.chain(clip, inner)


def measure(clip, tree, target, count, dtype="float32"):
    """Returns the costs of a step with clipping; ``dtype`` is that of the gradients."""
    params, place = shapes_of(tree, target, count)
    tx = chained(clip)
    shapes = {x.shape for x in jax.tree.leaves(params)}
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=place(x.shape if x.shape in shapes else ())
        ),
        jax.eval_shape(tx.init, params),
    )

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    grads = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=x.sharding),
        params,
    )
    return compiled(step, target, params, state, grads, donate=(0, 1))


def measure_training(clip, size, target):
    """Returns the costs of a whole training step of a GPT of this size."""
    place = SingleDeviceSharding(devices(target, 1)[0])
    tx = chained(clip)

    def step(params, state, tokens):
        grads = jax.grad(loss_of)(params, tokens, size.heads)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.eval_shape(lambda: initial(size))
    tokens = jax.ShapeDtypeStruct((size.batch, size.context + 1), jnp.int32)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        (params, jax.eval_shape(tx.init, params), tokens),
    )
    return compiled(step, target, *shapes, donate=(0, 1), options=FIXED)


def training_table(target):
    """Yields the lines of the table of a whole training step."""
    leaves = jax.tree.leaves(jax.eval_shape(lambda: initial(SMALL)))
    yield from ("", f"## Training step of a GPT-2 small, 1 {target}", "")
    run = functools.partial(measure_training, size=SMALL, target=target)
    yield from _rows("float32", TRAINING, run, 4 * sum(x.size for x in leaves))


def table(tree, dtype, target, count, rows):
    """Yields the lines of one table while it is measured."""
    size = jnp.dtype(dtype).itemsize * sum(int(np.prod(s)) for s in TREES[tree])
    plural = "s" if count > 1 else ""
    yield from ("", f"## {tree}, {dtype} gradients, {count} {target}{plural}", "")
    measure(None, "policy network of 8 leaves", target, 1)  # costs that are paid once
    run = functools.partial(measure, tree=tree, target=target, count=count, dtype=dtype)
    yield from _rows(dtype, rows, run, size)


def _rows(dtype, rows, run, size):
    """Yields the head and the rows of a table; ``run`` measures one of them."""
    yield (
        "| before AdamW | passes over the gradients | accessed, MB | kernels | "
        "conditions | collectives | temporaries, MB | CPU s to compile |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    bare = None
    for name, clip in clips(dtype).items():
        if bare is not None and rows and name not in rows:
            continue
        cost = run(clip)
        sent = ", ".join(f"{n} {k}" for k, n in sorted(cost.collectives.items()))
        if bare is None:
            bare = cost
            columns = (
                f"{cost.bytes / size:.2f}", f"{cost.kernels}", f"{cost.seconds:.1f}"
            )  # fmt: skip
        else:
            columns = (
                f"{(cost.bytes - bare.bytes) / size:+.2f}",
                f"{cost.kernels - bare.kernels:+d}",
                f"{cost.seconds - bare.seconds:+.1f}",
            )
        accessed = "" if cost.accessed is None else f"{cost.accessed / 1e6:.0f}"
        yield (
            f"| {name} | {columns[0]} | {accessed} | {columns[1]} | "
            f"{cost.conditions} | "
            f"{sent or 'none'} | {cost.temporaries / 1e6:.1f} | {columns[2]} |"
        )


def main():
    """Measures what the command line asks for."""
    options = parser(__doc__)
    options.add_argument("--all", action="store_true", help="all tables of the docs")
    options.add_argument("--training", action="store_true", help="the training step")
    options.add_argument("--target", choices=TARGETS, default="H100")
    options.add_argument("--devices", type=int, choices=(1, 8), default=1)
    options.add_argument("--tree", choices=TREES, default=FIRST)
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options.add_argument("--only", help="rows whose name contains this", default="")
    chosen = options.parse_args()
    lines = [
        "# What a clip costs on accelerators",
        "",
        "These programs were compiled but not run, so the tables do not say how long "
        "a step takes. Rows are compared with the first, AdamW alone: bytes that "
        "kernels move from and to main memory, in passes over the gradients, kernels, "
        "and CPU seconds of tracing and compiling. A condition makes the host wait. "
        "*Accessed* is XLA's own count on a TPU, which counts accesses to fast memory "
        "too. Parameters are float32; where gradients are bfloat16, optclip returns "
        "its updates in float32 (`update_dtype`). The training step computes its "
        "gradients in bfloat16, and XLA can fuse their conversion to float32 into what "
        "reads them.",
        "",
        f"Compiled on {machine()}.",
    ]
    print("\n".join(lines))
    rows = tuple(name for name in clips("float32") if chosen.only in name)
    one = (chosen.tree, chosen.dtype, chosen.target, chosen.devices, rows)
    tables = [table(*part) for part in (ALL if chosen.all else [one])]
    if chosen.all or chosen.training:
        tables = [training_table("H100"), *(tables if chosen.all else [])]
    for line in itertools.chain.from_iterable(tables):
        print(line, flush=True)
        lines.append(line)
    write(chosen.output, "compiled.md", lines)


if __name__ == "__main__":
    main()
