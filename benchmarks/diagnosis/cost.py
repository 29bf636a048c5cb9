"""What a diagnosis costs, in training steps of the same model and in compile time.

Usage: python -m benchmarks.diagnosis.cost [--output benchmarks/results]
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optclip
from benchmarks._results import machine, parser, write

WIDTH, BLOCKS, LENGTH, BATCH, SYMBOLS = 256, 6, 64, 8, 512


def weights(key):
    """Returns a transformer of about five million parameters."""
    names = {"qkv": 3 * WIDTH, "out": WIDTH, "up": 4 * WIDTH}
    blocks = []
    for k in jax.random.split(key, BLOCKS):
        keys = jax.random.split(k, 4)
        block = {
            name: jax.random.normal(one, (WIDTH, n)) / WIDTH**0.5
            for one, (name, n) in zip(keys, names.items(), strict=False)
        }
        down = jax.random.normal(keys[3], (4 * WIDTH, WIDTH)) / (4 * WIDTH) ** 0.5
        blocks.append({**block, "down": down, "gain": jnp.ones((2, WIDTH))})
    table = jax.random.normal(key, (SYMBOLS, WIDTH)) * 0.02
    return {"blocks": blocks, "table": table}


def normal(x, gain):
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * gain


def loss_fn(params, tokens):
    x = params["table"][tokens]
    mask = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))
    for block in params["blocks"]:
        q, k, v = jnp.split(normal(x, block["gain"][0]) @ block["qkv"], 3, -1)
        logits = jnp.einsum("bqd,bkd->bqk", q, k) / WIDTH**0.5
        attention = jax.nn.softmax(jnp.where(mask, logits, -1e9))
        x = x + attention @ v @ block["out"]
        hidden = jax.nn.gelu(normal(x, block["gain"][1]) @ block["up"])
        x = x + hidden @ block["down"]
    logits = (x @ params["table"].T)[:, :-1]
    scores = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.mean(scores)


def step_time(params, optimizer, batches):
    """Returns the median seconds of a jitted, donated training step."""

    def step(params, state, tokens):
        grads = jax.grad(loss_fn)(params, tokens)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    run = jax.jit(step, donate_argnums=(0, 1))
    params = jax.tree.map(jnp.array, params)
    state, times = optimizer.init(params), []
    for tokens in (*batches, *batches):
        start = time.perf_counter()
        params, state = jax.block_until_ready(run(params, state, tokens))
        times.append(time.perf_counter() - start)
    return float(np.median(times[2:]))


def main():
    options = parser(__doc__).parse_args()
    compiling = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: "/compile/" in name and compiling.append(seconds)
    )
    rng = np.random.default_rng(0)
    batches = [
        jnp.asarray(rng.integers(0, SYMBOLS, (BATCH, LENGTH))) for _ in range(24)
    ]
    params = weights(jax.random.key(0))
    count = sum(x.size for x in jax.tree.leaves(params))
    optimizer = optax.adamw(1e-3)
    step = step_time(params, optimizer, batches)
    compiling.clear()
    start = time.perf_counter()
    found = optclip.diagnose(loss_fn, params, batches, optimizer=optimizer)
    whole, compiled = time.perf_counter() - start, sum(compiling)
    print(found, file=sys.stderr)
    lines = [
        f"A transformer of {count / 1e6:.1f} million parameters, 24 batches: the "
        f"diagnosis takes {(whole - compiled) / step:.0f} training steps of "
        f"{step * 1e3:.0f} ms, and {compiled:.0f} s to trace and compile its programs.",
        "",
        f"Measured by `benchmarks/diagnosis/cost.py` on {machine()}.",
    ]
    print("\n".join(lines))
    write(options.output, "diagnosis_cost.md", lines)


if __name__ == "__main__":
    main()
