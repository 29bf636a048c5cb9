"""The demo's log, ``metrics.jsonl``: one JSON object per step and network."""

import json
import math
from pathlib import Path
from typing import IO, Any

import numpy as np

from optclip.demo.acts import Run
from optclip.demo.training import FIELDS, Progress

__all__ = ["LOG", "name_of", "open_log", "write_rows"]

LOG = "metrics.jsonl"


def name_of(run: Run, rate: float) -> str:
    """Returns the name of a network's run in the log."""
    words = "with bad batches" if run.bad else f"learning rate {rate:g}"
    return f"{run.name}, {words}"


def _number(value: np.float32) -> float | None:
    """Returns the shortest float that rounds to ``value``; None if it is not finite."""
    return float(str(value)) if math.isfinite(value) else None


def _row(name: str, seed: int, step: int, values: dict[str, Any]) -> dict[str, Any]:
    finite = math.isfinite(values["loss"]) and math.isfinite(values["norm_before"])
    row = {"run": name, "seed": seed, "step": step}
    row |= {name: _number(values[name]) for name in FIELDS}
    return row | {"nonfinite": not finite}


def write_rows(log: IO[str], runs: list[Run], progress: Progress, begun: int) -> None:
    """Writes the steps starting at ``begun``; a threshold is null if there is none."""
    for step in range(begun, progress.step):
        for run, record in zip(runs, progress.records, strict=True):
            networks = record["loss"].shape[1]
            seeds = networks // len(run.rates)
            for i in range(networks):
                values = {name: record[name][step, i] for name in FIELDS}
                name = name_of(run, run.rates[i // seeds])
                row = _row(name, i % seeds, step, values)
                log.write(json.dumps(row, allow_nan=False) + "\n")
    log.flush()


def open_log(path: Path, runs: list[Run], progress: Progress) -> IO[str]:
    """Rewrites the log to contain exactly the steps in ``progress``, and returns it."""
    log = path.open("w", encoding="utf-8")
    write_rows(log, runs, progress, 0)
    return log
