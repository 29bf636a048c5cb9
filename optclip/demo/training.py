"""Trains three runs with the same data and initialization but different clipping.

All seeds of a run are trained together under `jax.vmap`, with one `jax.lax.scan` per
chunk of steps. The metrics are read from the optimizer state inside the jitted step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optclip
from optclip.demo import clips, model
from optclip.demo.options import Options, Sizes

__all__ = [
    "FIELDS",
    "Progress",
    "Run",
    "advance",
    "begin",
    "compile_chunk",
    "plan",
    "windows_at",
]

FIELDS = ("loss", "norm_before", "norm_after", "threshold", "scale", "clipped")


class Run(NamedTuple):
    """A training configuration.

    Attributes:
        name: The name of the run in the table, the figure and the log.
        transformation: The clip chained with the optimizer.
        threshold: The clipping threshold; infinite if the run does not clip.
    """

    name: str
    transformation: optax.GradientTransformation
    threshold: float


class Progress(NamedTuple):
    """The progress of the runs, as stored in a checkpoint.

    Attributes:
        step: Number of steps taken.
        states: Parameters and optimizer state of each run, stacked over the seeds.
        records: Metrics of each run: a dict of float32[steps, seeds] arrays, which are
            NaN from index ``step`` onward.
    """

    step: int
    states: list[Any]
    records: list[dict[str, np.ndarray]]


def plan(options: Options) -> list[Run]:
    """Returns three runs: no clipping, Optax's clip, and a clip from optclip."""
    method = clips.METHODS[options.method]
    own = options.threshold
    same = options.method == clips.BASELINE
    typical = own if same else clips.METHODS[clips.BASELINE].threshold

    def run(name, clip, threshold):
        # `record_norms` measures the same norm in all runs, whatever the clip measures.
        descent = optax.sgd(options.learning_rate)
        chain = optax.chain(
            optclip.record_norms(), clip, optclip.record_norms(), descent
        )
        return Run(name, chain, threshold)

    return [
        run("no clip", optax.identity(), float("inf")),
        run(f"optax.{clips.BASELINE}", optax.clip_by_global_norm(typical), typical),
        run(f"optclip.{options.method}", method.factory(own), own),
    ]


def _telemetry(opt_state: Any, run: Run) -> dict[str, jax.Array]:
    """Returns the metrics of the gradients at the last step."""
    seen = optclip.metrics(opt_state)
    norm = seen["norms/global_norm"]
    norms = {"norm_before": norm, "norm_after": seen["norms_2/global_norm"]}
    if "clip/clipped" in seen:
        worst = "worst_" if "clip/worst_scale" in seen else ""
        mine = {name: seen[f"clip/{worst}{name}"] for name in ("threshold", "scale")}
        mine["clipped"] = seen["clip/clipped"]
        # The largest float32 means that there is no threshold yet.
        none = mine["threshold"] >= jnp.finfo(jnp.float32).max
        mine["threshold"] = jnp.where(none, jnp.inf, mine["threshold"])
        return norms | mine
    above = norm > run.threshold
    return norms | {
        "threshold": jnp.full_like(norm, run.threshold),
        "scale": jnp.where(above, run.threshold / norm, 1.0),
        "clipped": above.astype(jnp.float32),
    }


def begin(runs: list[Run], options: Options, sizes: Sizes) -> Progress:
    """Returns the progress of runs that have not started."""
    params = model.create(sizes.symbols, sizes.hidden, jnp.arange(options.seeds))
    states = [(params, jax.vmap(run.transformation.init)(params)) for run in runs]
    shape = (options.steps, options.seeds)
    records = [{n: np.full(shape, np.nan, np.float32) for n in FIELDS} for _ in runs]
    return Progress(0, states, records)


def windows_at(codes: jax.Array, seed: Any, step: Any, sizes: Sizes) -> jax.Array:
    """Returns the batch for a step: windows of text, [batch, length + 1].

    The batch depends only on the seed and the step, so that a resumed run trains on the
    same batches.
    """
    key = jax.random.fold_in(jax.random.key(seed), step)
    last = codes.shape[0] - sizes.length
    starts = jax.random.randint(key, (sizes.batch, 1), 0, last)
    return codes[starts + jnp.arange(sizes.length + 1)[None]]


def compile_chunk(run: Run, sizes: Sizes) -> Callable[..., Any]:
    """Returns a jitted function of (state, steps, seeds, codes) for all seeds of a run.

    The function returns the new state and the metrics, whose axes are [steps, seeds].
    """
    definition = model.define(sizes.symbols, sizes.hidden)

    def train_step(state, step, seed, codes):
        params, opt_state = state
        windows = windows_at(codes, seed, step, sizes)
        value, grads = jax.value_and_grad(model.loss)(params, definition, windows)
        updates, opt_state = run.transformation.update(grads, opt_state, params)
        seen = {"loss": value} | _telemetry(opt_state, run)
        return (optax.apply_updates(params, updates), opt_state), seen

    all_seeds = jax.vmap(train_step, in_axes=(0, None, 0, None))

    @jax.jit
    def chunk(state, steps, seeds, codes):
        return jax.lax.scan(lambda s, i: all_seeds(s, i, seeds, codes), state, steps)

    return chunk


def advance(
    progress: Progress, chunks: list[Callable[..., Any]], steps: int, codes: jax.Array
) -> Progress:
    """Trains every run for ``steps`` more steps and returns the new progress."""
    begun, ended = progress.step, progress.step + steps
    numbers = jnp.arange(begun, ended)
    states, records = [], []
    old = zip(chunks, progress.states, progress.records, strict=True)
    for chunk, state, record in old:
        seeds = jnp.arange(record["loss"].shape[1])
        state, seen = chunk(state, numbers, seeds, codes)
        states.append(jax.block_until_ready(state))
        record = {name: array.copy() for name, array in record.items()}
        for name, array in jax.device_get(seen).items():
            record[name][begun:ended] = array
        records.append(record)
    return Progress(ended, states, records)
