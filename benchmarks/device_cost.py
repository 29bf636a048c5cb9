"""What clipping costs on the local GPU or TPU: seconds per step.

Usage:

    python benchmarks/device_cost.py [--part NAME] [--quick] [--output FOLDER]

One part is a donated AdamW step on given gradients, as in ``compiled.py``. The other is
a whole training step of a GPT-2 small: forward pass, backward pass, clipping, AdamW.
Rows alternate in one process. Programs are compiled in parallel, so that a borrowed
device does not wait; ``compiled.py`` measures compile times.
"""

import concurrent.futures
import functools
import glob
import os
import tempfile
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _gpt import FIXED, SMALL, Size, initial, loss_of
from _results import machine, parser, write
from step_cost import TREES, block

import optclip

GPT2 = "GPT-2 small, 124M parameters in 148 leaves"
WIDTH = SMALL.width
TREES = {
    **TREES,
    GPT2: [
        *(s for _ in range(SMALL.layers) for s in block(WIDTH)[:-1]),
        (SMALL.vocabulary, WIDTH), (SMALL.context, WIDTH), (WIDTH,), (WIDTH,),
    ],
}  # fmt: skip
FIRST, MANY, _ = TREES
CORE = (
    "optax.clip_by_global_norm",
    "optclip.clip_by_global_norm",
    "optclip.clip_by_leaf_norm",
)
# Each round runs every row for about this long.
SECONDS = 0.04


def skipping(optimizer):
    return optax.apply_if_finite(optimizer, max_consecutive_errors=10)


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
        "optax.adaptive_grad_clip": optax.adaptive_grad_clip(0.01),
        "optclip.adaptive_grad_clip": optclip.adaptive_grad_clip(0.01, **wide),
        "optclip.clip_by_unit_norm": optclip.clip_by_unit_norm(0.01, **wide),
        "optax.clip": optax.clip(0.01),
        "optclip.clip_by_value": optclip.clip_by_value(0.01, **wide),
        # Needs gradients of the same dtype as the parameters.
        **({} if wide else {"optax.apply_if_finite": skipping}),
        "optclip.skip_steps": optclip.skip_steps,
        "optclip.stabilize": optclip.stabilize,
    }


class Row(NamedTuple):
    """One compiled step, its state, and the bytes that it allocates for itself."""

    run: object
    state: list
    temporaries: int


def optimizer(clip):
    """Returns AdamW after a clip, or inside a wrapper."""
    inner = optax.adamw(1e-4)
    if clip is None:
        return inner
    return clip(inner) if callable(clip) else optax.chain(clip, inner)


def compile_all(make, names):
    """Returns the rows by name; ``make`` compiles one of them."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(names, pool.map(make, names), strict=True))


def copied(tree):
    """Copies the arrays of a tree: each donated step needs separate buffers."""
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


def run(row, data, steps):
    """Runs a row for ``steps`` steps without waiting between them."""
    state = row.state
    for _ in range(steps):
        state[:] = row.run(*state, data)[: len(state)]
    return jax.block_until_ready(state)


def steps_of(row, data):
    """Returns how many steps take about `SECONDS`."""
    run(row, data, 3)
    start = time.perf_counter()
    run(row, data, 5)
    return max(1, round(SECONDS / ((time.perf_counter() - start) / 5)))


def busy(row, data, steps=5):
    """Returns seconds in kernels and number of kernels per step; NaN if unknown."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with jax.profiler.trace(folder):
                run(row, data, steps)
            (file,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
            profile = jax.profiler.ProfileData.from_file(file)
            spent, kernels = 0.0, 0
            for plane in profile.planes:
                if not plane.name.startswith("/device:"):
                    continue
                for line in plane.lines:
                    if not line.name.startswith("Stream"):
                        continue
                    for event in line.events:
                        spent += event.duration_ns * 1e-9
                        kernels += 1
        except Exception as error:  # the profiler needs rights that a guest may lack
            print(f"no profile: {error!r}", flush=True)
            return float("nan"), float("nan")
    if not kernels:
        return float("nan"), float("nan")
    return spent / steps, kernels / steps


def table(title, rows, data, rounds):
    """Measures the rows alternately; returns the lines of a table."""
    steps = {name: steps_of(row, data) for name, row in rows.items()}
    times = {name: [] for name in rows}
    for _ in range(rounds):
        for name, row in rows.items():
            start = time.perf_counter()
            run(row, data, steps[name])
            times[name].append((time.perf_counter() - start) / steps[name])
    bare = np.asarray(times["AdamW alone"])
    kernel_time = {name: busy(row, data) for name, row in rows.items()}
    bare_busy = kernel_time["AdamW alone"][0]
    lines = [
        "",
        f"## {title}",
        "",
        "| | time ratio | spread | time in kernels, ratio | kernels run "
        "| temporaries, MB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        ratios = np.asarray(times[name]) / bare
        low, high = np.percentile(ratios, [25, 75])
        spent, kernels = kernel_time[name]
        lines.append(
            f"| {name} | {np.median(ratios):.3f} | {low:.3f}\N{EN DASH}{high:.3f} "
            f"| {spent / bare_busy:.3f} | {kernels:.0f} "
            f"| {row.temporaries / 1e6:.1f} |"
        )
    lines += [
        "",
        f"AdamW alone: {np.median(bare) * 1e3:.3f} ms a step, of which "
        f"{bare_busy * 1e3:.3f} ms are spent in kernels.",
    ]
    print("\n".join(lines), flush=True)
    return lines


def random_tree(shapes, dtype, seed):
    rng = np.random.default_rng(seed)
    draw = lambda s: rng.standard_normal(s, np.float32) * 0.01  # noqa: E731
    return {f"leaf{i:04d}": jnp.asarray(draw(s), dtype) for i, s in enumerate(shapes)}


def optimizer_table(tree, dtype, chosen, rounds):
    """Measures an AdamW step on given gradients."""
    params = random_tree(TREES[tree], jnp.float32, 0)
    grads = random_tree(TREES[tree], jnp.dtype(dtype), 1)

    def make(name):
        tx = optimizer(clips(dtype)[name])

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = [copied(params), tx.init(params)]
        made = step.lower(*state, grads).compile()
        return Row(made, copied(state), made.memory_analysis().temp_size_in_bytes)

    names = [
        name
        for name in clips(dtype)
        if chosen is None or name == "AdamW alone" or name in chosen
    ]
    start = time.perf_counter()
    rows = compile_all(make, names)
    print(f"{tree}: compiled in {time.perf_counter() - start:.0f} s", flush=True)
    size = sum(x.nbytes for x in grads.values())
    title = f"AdamW step: {tree}, {dtype} gradients ({size / 1e6:.0f} MB)"
    return table(title, rows, grads, rounds)


TRAINING = (
    "AdamW alone", "optax.clip_by_global_norm", "optclip.clip_by_global_norm",
    "optclip.zclip", "optclip.clip_by_leaf_norm", "optax.adaptive_grad_clip",
    "optclip.adaptive_grad_clip", "optax.apply_if_finite", "optclip.skip_steps",
    "optclip.stabilize",
)  # fmt: skip


def training_table(size, rounds):
    """Measures a whole training step."""
    params = initial(size)
    draw = np.random.default_rng(1).integers
    tokens = draw(0, size.vocabulary, (size.batch, size.context + 1))
    tokens = jnp.asarray(tokens, jnp.int32)

    def make(name):
        tx = optimizer(clips("float32")[name])

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, tokens):
            loss, grads = jax.value_and_grad(loss_of)(params, tokens, size.heads)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, loss

        state = [copied(params), tx.init(params)]
        made = step.lower(*state, tokens).compile(compiler_options=FIXED)
        return Row(made, copied(state), made.memory_analysis().temp_size_in_bytes)

    start = time.perf_counter()
    rows = compile_all(make, TRAINING)
    print(f"Training: compiled in {time.perf_counter() - start:.0f} s", flush=True)
    count = sum(x.size for x in jax.tree.leaves(params))
    title = (
        f"Training step: GPT of {count / 1e6:.0f}M parameters in "
        f"{len(jax.tree.leaves(params))} leaves, {size.batch} x {size.context} tokens"
    )
    return table(title, rows, tokens, rounds)


NOTE = """Times are ratios to AdamW alone, medians over rounds in which all rows take
turns; the spread is the interquartile range. A step is started before the one before it
has ended, as in a training loop that does not read its loss. *Time in kernels* is what
the profiler saw the device work on; the rest is the host that starts the program, and
gaps between kernels. Parameters are float32; where gradients are bfloat16, optclip
returns its updates in float32 (`update_dtype`)."""


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--part", choices=("optimizer", "training", "all"))
    arguments.add_argument("--quick", action="store_true", help="a small model")
    options = arguments.parse_args()
    part, quick = options.part or "all", options.quick
    lines = ["# What a clip costs on a device", "", f"Measured on {machine()}."]
    lines += ["", *NOTE.splitlines()]
    if part in ("training", "all"):
        size = Size(2, 32, 64, 2, 2, 100) if quick else SMALL
        lines += training_table(size, 2 if quick else 20)
        write(options.output, "device_cost.md", lines)
    if part in ("optimizer", "all"):
        rounds = 2 if quick else 20
        plan = [
            (GPT2, "float32", None), (FIRST, "float32", None),
            (FIRST, "bfloat16", None), (MANY, "float32", CORE),
        ]  # fmt: skip
        for tree, dtype, chosen in plan[3:] if quick else plan:
            lines += optimizer_table(tree, dtype, chosen, rounds)
            write(options.output, "device_cost.md", lines)


if __name__ == "__main__":
    main()
