"""Trains the runs of the demo with the same data and initialization.

All networks of a run are trained together under `jax.vmap`, with one `jax.lax.scan` per
chunk of steps. The metrics are read from the optimizer state inside the jitted step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optclip
from optclip.demo import model
from optclip.demo.acts import Run, incidents
from optclip.demo.options import Options, Sizes

__all__ = ["FIELDS", "Progress", "advance", "begin", "compile_chunk", "windows_at"]

FIELDS = ("loss", "norm_before", "threshold", "clipped", "skipped")
# The weight of a batch that is too large; that of a broken one is NaN.
LARGE = 1000.0


class Progress(NamedTuple):
    """The progress of the runs, as stored in a checkpoint.

    Attributes:
        step: Number of steps taken.
        states: Parameters and optimizer state of each run, stacked over the learning
            rates and, for each rate, over the seeds.
        records: Metrics of each run: a dict of float32[steps, networks] arrays, which
            are NaN from index ``step`` onward.
    """

    step: int
    states: list[Any]
    records: list[dict[str, np.ndarray]]


def _optimizer(run: Run, rate: Any) -> optax.GradientTransformationExtraArgs:
    # `record_norms` measures the same norm in all runs, whatever the clip measures.
    return optax.chain(optclip.record_norms(), run.optimizer(rate))


def _networks(run: Run, seeds: int) -> tuple[jax.Array, jax.Array]:
    """Returns the learning rate and the seed of each network."""
    rates = jnp.repeat(jnp.array(run.rates, jnp.float32), seeds)
    return rates, jnp.tile(jnp.arange(seeds), len(run.rates))


def _telemetry(opt_state: Any, run: Run) -> dict[str, jax.Array]:
    """Returns the metrics of the gradients at the last step."""
    seen = optclip.metrics(opt_state)
    norm = seen["norms/global_norm"]
    threshold = jnp.full_like(norm, run.threshold)
    for name in ("clip/threshold", "clip/worst_threshold", "skip/threshold"):
        threshold = seen.get(name, threshold)
    skipped = jnp.zeros_like(norm)
    if run.skips:
        skipped = 1.0 - optclip.step_taken(opt_state).astype(jnp.float32)
    # The largest float32 means that there is no threshold yet.
    none = threshold >= jnp.finfo(jnp.float32).max
    return {
        "norm_before": norm,
        "threshold": jnp.where(none, jnp.inf, threshold),
        "clipped": seen.get("clip/clipped", (norm > run.threshold).astype(jnp.float32)),
        "skipped": skipped,
    }


def begin(runs: list[Run], options: Options, sizes: Sizes) -> Progress:
    """Returns the progress of runs that have not started."""
    states, records = [], []
    for run in runs:
        rates, seeds = _networks(run, options.seeds)
        params = model.create(sizes.symbols, sizes.hidden, seeds)
        init = jax.vmap(lambda rate, p, run=run: _optimizer(run, rate).init(p))
        states.append((params, init(rates, params)))
        shape = (options.steps, len(rates))
        records.append({n: np.full(shape, np.nan, np.float32) for n in FIELDS})
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


def _weight(run: Run, step: Any, steps: int) -> Any:
    """Returns the weight of the batch in the loss."""
    if not run.bad:
        return 1.0
    large, broken = incidents(steps)
    weight = jnp.where(step == large, LARGE, 1.0)
    return jnp.where(step == broken, jnp.nan, weight)


def compile_chunk(run: Run, options: Options, sizes: Sizes) -> Callable[..., Any]:
    """Returns a jitted function of (state, steps, codes) for all networks of a run.

    The function returns the new state and the metrics, whose axes are
    [steps, networks].
    """
    definition = model.define(sizes.symbols, sizes.hidden)
    rates, seeds = _networks(run, options.seeds)

    def train_step(state, step, rate, seed, codes):
        params, opt_state = state
        windows = windows_at(codes, seed, step, sizes)

        def loss_fn(params):
            weight = _weight(run, step, options.steps)
            return weight * model.loss(params, definition, windows)

        value, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = _optimizer(run, rate).update(grads, opt_state, params)
        seen = {"loss": value} | _telemetry(opt_state, run)
        return (optax.apply_updates(params, updates), opt_state), seen

    every = jax.vmap(train_step, in_axes=(0, None, 0, 0, None))

    @jax.jit
    def chunk(state, steps, codes):
        return jax.lax.scan(lambda s, i: every(s, i, rates, seeds, codes), state, steps)

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
        state, seen = chunk(state, numbers, codes)
        states.append(jax.block_until_ready(state))
        record = {name: array.copy() for name, array in record.items()}
        for name, array in jax.device_get(seen).items():
            record[name][begun:ended] = array
        records.append(record)
    return Progress(ended, states, records)
