"""What clipping costs: one jitted, donated AdamW step with it and one without.

All variants alternate in one process, so that their ratios are comparable even on a
machine whose speed drifts. Usage:

    python benchmarks/step_cost.py [--quick] [--output benchmarks/results]

It prints a Markdown table for each setting and writes them to ``step_cost.md``, with
the name of the machine. Times are medians over rounds; the spread is the interquartile
range.
"""

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _results import machine, parser, write

import optclip

WIDTH = 640


def block(width):
    """Returns the shapes of the leaves of one transformer block."""
    wide = 4 * width
    return [
        (width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,),
        (width, wide), (wide,), (wide, width), (width,), (width,), (width,), (width,),
    ]  # fmt: skip


TREES = {
    "29M parameters in 81 leaves": [
        *(s for _ in range(6) for s in block(WIDTH)), (400, WIDTH), (WIDTH,), (WIDTH,),
    ],
    "4M parameters in 1,000 leaves": [(64, 64)] * 1000,
}  # fmt: skip


def variants(dtype):
    """Returns the transformations to compare by name; None is the bare optimizer."""
    wide = {"update_dtype": jnp.float32} if dtype != jnp.float32 else {}
    stacked = {"stack_axes": 0, **wide}
    return {
        "AdamW alone": None,
        "optax.clip": optax.clip(0.01),
        "optax.clip_by_global_norm": optax.clip_by_global_norm(1.0),
        "optax.clip_by_block_rms": optax.clip_by_block_rms(0.01),
        "optax.adaptive_grad_clip": optax.adaptive_grad_clip(0.01),
        "optax.normalize_by_update_norm": optax.normalize_by_update_norm(),
        "optclip.clip_by_value": optclip.clip_by_value(0.01, **wide),
        "optclip.clip_by_value, record": optclip.clip_by_value(
            0.01, record=True, **wide
        ),
        "optclip.clip_by_global_norm": optclip.clip_by_global_norm(1.0, **wide),
        "optclip.clip_by_leaf_norm": optclip.clip_by_leaf_norm(0.1, **wide),
        "optclip.clip_per_layer": optclip.clip_per_layer(0.1, **stacked),
        "optclip.clip_by_unit_norm": optclip.clip_by_unit_norm(0.01, **wide),
        "optclip.clip_by_block_rms": optclip.clip_by_block_rms(0.01, **wide),
        "optclip.adaptive_grad_clip": optclip.adaptive_grad_clip(0.01, **wide),
        "optclip.normalize_by_norm": optclip.normalize_by_norm(1.0, **wide),
        "optclip.soft_clip": optclip.soft_clip(1.0, **wide),
        "optclip.clip_by_global_norm, skip": optclip.clip_by_global_norm(
            1.0, nonfinite="skip", **wide
        ),
        "optclip.record_norms + clip_by_global_norm": optax.chain(
            optclip.record_norms(), optclip.clip_by_global_norm(1.0, **wide)
        ),
        **(
            {"optclip.clip_by_global_norm, rounded": optclip.clip_by_global_norm(1.0)}
            if wide
            else {}
        ),
    }


def adaptive(dtype):
    """Returns the adaptive transformations, and the constant one for comparison."""
    del dtype
    return {
        "AdamW alone": None,
        "optclip.clip_by_global_norm": optclip.clip_by_global_norm(1.0),
        "optclip.quantile_clip": optclip.quantile_clip(),
        "optclip.zclip": optclip.zclip(),
        "optclip.autoclip": optclip.autoclip(),
        "optclip.autoclip, whole history": optclip.autoclip(window=None),
        "optclip.rolling_sigma_clip": optclip.rolling_sigma_clip(),
        "optclip.ema_sigma_clip": optclip.ema_sigma_clip(),
        "optclip.dual_ema_clip": optclip.dual_ema_clip(),
        "optclip.clip_by_leaf_norm": optclip.clip_by_leaf_norm(0.1),
        "optclip.adagc": optclip.adagc(),
        "optclip.percentile_clip": optclip.percentile_clip(),
        "optclip.norm_growth_limiter": optclip.norm_growth_limiter(),
    }


CORE = (
    "AdamW alone",
    "optax.clip_by_global_norm",
    "optclip.clip_by_global_norm",
    "optclip.clip_by_leaf_norm",
)


def random_tree(shapes, dtype, seed):
    rng = np.random.default_rng(seed)
    return {
        f"leaf{i:04d}": jnp.asarray(
            rng.standard_normal(shape, np.float32) * 0.01
        ).astype(dtype)
        for i, shape in enumerate(shapes)
    }


class Step(NamedTuple):
    """One compiled step, and the costs known from its compilation."""

    run: object
    state: list
    trace_s: float
    compile_s: float
    alone_s: float
    temp_bytes: int
    accessed_bytes: float


def build(clip, params, grads):
    """Compiles one step, and separately the transformation alone, with empty caches."""
    inner = optax.adamw(1e-3)
    if callable(clip):  # a wrapper of the optimizer
        tx = clip = clip(inner)
    else:
        tx = inner if clip is None else optax.chain(clip, inner)
    opt_state = tx.init(params)

    def step(params, opt_state, grads):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    jax.clear_caches()
    start = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, opt_state, grads)
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    alone = 0.0
    if clip is not None:
        clip_state = clip.init(params)
        jax.clear_caches()
        begin = time.perf_counter()
        jax.jit(clip.update).lower(grads, clip_state, params).compile()
        alone = time.perf_counter() - begin
    cost = compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    copies = jax.tree.map(lambda x: jnp.array(x, copy=True), (params, opt_state))
    return Step(
        compiled,
        list(copies),
        traced - start,
        done - traced,
        alone,
        compiled.memory_analysis().temp_size_in_bytes,
        cost.get("bytes accessed", float("nan")),
    )


def measure(steps, grads, rounds):
    """Runs all steps alternately; returns seconds by name."""
    times = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            out = jax.block_until_ready(step.run(*step.state, grads))
            times[name].append(time.perf_counter() - start)
            step.state[:] = out
    return {name: np.asarray(t[2:]) for name, t in times.items()}


def table(name, dtype, rounds, chosen, clips=variants):
    params = random_tree(TREES[name], jnp.float32, 0)
    grads = random_tree(TREES[name], dtype, 1)
    size = sum(x.nbytes for x in grads.values())
    steps = {
        key: build(clip, params, grads)
        for key, clip in clips(dtype).items()
        if chosen is None or key in chosen
    }
    times = measure(steps, grads, rounds)
    base = times["AdamW alone"]
    lines = [
        f"## {name}, {jnp.dtype(dtype).name} gradients ({size / 1e6:.0f} MB)",
        "",
        f"AdamW alone: {np.median(base) * 1e3:.1f} ms a step.",
        "",
        "| clip | time ratio | spread | temporaries, MB | bytes accessed, MB "
        "| trace, s | compile, s | clip alone: trace + compile, s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for key, step in steps.items():
        ratios = times[key] / base
        low, high = np.percentile(ratios, [25, 75])
        lines.append(
            f"| {key} | {np.median(ratios):.2f} | {low:.2f}\N{EN DASH}{high:.2f} "
            f"| {step.temp_bytes / 1e6:.1f} | {step.accessed_bytes / 1e6:.0f} "
            f"| {step.trace_s:.1f} | {step.compile_s:.1f} | {step.alone_s:.1f} |"
        )
    return "\n".join(lines)


NOTE = """Times are ratios to AdamW alone, medians over rounds in which all variants
take turns; the spread is the interquartile range. "Bytes accessed" is XLA's own
estimate: it counts in full the branch of optclip that runs only on steps whose sums
overflow, underflow or are not finite. bf16 gradients are used with f32 parameters;
there optclip returns its updates in float32 (`update_dtype`), except in rows named
"rounded"."""


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--quick", action="store_true", help="fewer rounds")
    options = arguments.parse_args()
    rounds = 8 if options.quick else 32
    parts = ["# What a clip costs", f"Measured on {machine()}.", NOTE]
    for name in TREES:
        for dtype in (jnp.float32, jnp.bfloat16):
            many = "1,000" in name
            chosen = CORE if options.quick or many else None
            parts.append(table(name, dtype, rounds // (2 if many else 1), chosen))
            print(parts[-1] + "\n", flush=True)
    if not options.quick:
        first = next(iter(TREES))
        parts.append(table(first, jnp.float32, rounds, None, adaptive))
        parts[-1] = parts[-1].replace("## ", "## Adaptive clips: ", 1)
        print(parts[-1], flush=True)
    write(options.output, "step_cost.md", ["\n\n".join(parts)])


if __name__ == "__main__":
    main()
