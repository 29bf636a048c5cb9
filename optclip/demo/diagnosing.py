"""The report on a run whose learning rate is too high, for ``--diagnose``."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optclip.demo import model, training
from optclip.demo.acts import NONE, RATE, Run
from optclip.demo.options import Options, Sizes
from optclip.demo.records import LOG, name_of
from optclip.diagnosis.page import write_report
from optclip.diagnosis.records import read_run
from optclip.diagnosis.summary import pick

__all__ = ["NAMES", "chosen", "write"]

NAMES = ("report.png", "report.html")

# Number of batches used for the diagnosis.
_BATCHES = 16


def chosen(runs: list[Run]) -> tuple[str, float]:
    """Returns the name and the learning rate of the run to diagnose."""
    (run,) = [run for run in runs if (run.act, run.name) == (RATE, NONE)]
    rate = max(run.rates)
    return name_of(run, rate), rate


def _diagnosis(options: Options, sizes: Sizes, codes: jax.Array, rate: float) -> Any:
    """Returns a diagnosis of the network as initialized with the first seed."""
    try:
        from optclip.diagnosis._diagnose import diagnose
    except ImportError:
        return None
    definition = model.define(sizes.symbols, sizes.hidden)
    first = model.create(sizes.symbols, sizes.hidden, jnp.arange(1))
    params = jax.tree.map(lambda x: x[0], first)
    steps = range(min(_BATCHES, options.steps))
    return diagnose(
        lambda params, windows: model.loss(params, definition, windows),
        params,
        [training.windows_at(codes, 0, step, sizes) for step in steps],
        optimizer=optax.adam(rate),
    )


def write(
    options: Options, sizes: Sizes, codes: Any, runs: list[Run]
) -> tuple[Path, Path]:
    """Writes the report for the first seed of the run and returns its file paths."""
    name, rate = chosen(runs)
    run = pick(read_run(options.output / LOG), name, 0)
    diagnosis = _diagnosis(options, sizes, jnp.asarray(codes), rate)
    return write_report(run, diagnosis=diagnosis, output=options.output)
