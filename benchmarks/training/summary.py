"""Ratios of losses to that of the best constant clip, with intervals."""

import json
import pathlib
from typing import NamedTuple

import numpy as np

from benchmarks.training.methods import CONSTANT

__all__ = ["Ratios", "Results", "ratios", "read"]

# A run that diverged counts as one that ends at this multiple of what a model that has
# learned nothing has, so that one bad run does not decide a mean.
WORST = 2.0
RESAMPLES = 1000


class Results(NamedTuple):
    """The results of one task.

    Attributes:
        settings: The settings of the constants, as in their file.
        losses: By method, float[values, rates, seeds]: the logarithm of the clean loss,
            at most that of `WORST` times chance.
        diverged: By method, bool[values, rates, seeds]: whether a run diverged.
        machines: The machines and versions that the results come from.
    """

    settings: dict
    losses: dict[str, np.ndarray]
    diverged: dict[str, np.ndarray]
    machines: set[str]


class Ratios(NamedTuple):
    """Ratios of the loss of a method to that of the best constant, for one task.

    The best constant is the pair of a threshold and a learning rate with the lowest
    geometric mean over seeds. Each is an array with one entry per resample of the
    seeds; the first entry is of all seeds.

    Attributes:
        own: The method at its own best rate.
        same: The method at the rate of the best constant.
        high: The method at its worst rate among those that are at least as high as that
            of the best constant.
        worst: The method at its worst rate, which may be one that is too low.
    """

    own: np.ndarray
    same: np.ndarray
    high: np.ndarray
    worst: np.ndarray


def read(folder: pathlib.Path) -> dict[str, Results]:
    """Returns the results in a folder, by task."""
    found: dict[str, Results] = {}
    for file in sorted(folder.glob("*/*.json")):
        row = json.loads(file.read_text(encoding="utf-8"))
        settings = row["settings"]
        clean = np.array(row["clean"], dtype=float)  # None becomes NaN
        top = WORST * settings["chance"]
        diverged = ~(clean < top)
        losses = np.log(np.where(diverged, top, clean))
        task = found.setdefault(settings["task"], Results(settings, {}, {}, set()))
        # Each constant is a method too, and their table is what others compare with.
        task.machines.add(row["machine"])
        task.losses[settings["method"]] = losses
        task.diverged[settings["method"]] = diverged
        if settings["method"] == CONSTANT:
            found[settings["task"]] = task._replace(settings=settings)
            for k, value in enumerate(settings["values"]):
                name = f"{CONSTANT}({value:g})"
                task.losses[name] = losses[k : k + 1]
                task.diverged[name] = diverged[k : k + 1]
    return {name: task for name, task in found.items() if CONSTANT in task.losses}


def _resampled(seeds: int) -> np.ndarray:
    """Returns int[RESAMPLES, seeds]: the seeds of each resample; all in the first."""
    drawn = np.random.default_rng(0).integers(0, seeds, (RESAMPLES, seeds))
    drawn[0] = np.arange(seeds)
    return drawn


def ratios(task: Results, method: str) -> Ratios:
    """Returns the ratios of a method on a task."""
    losses, constant = task.losses[method], task.losses[CONSTANT]
    rows = _resampled(losses.shape[-1])
    means = losses[..., rows].mean(axis=-1).min(axis=0)  # [rates, resamples]
    best = constant[..., rows].mean(axis=-1)
    lowest = best.min(axis=(0, 1))
    rate = best.min(axis=0).argmin(axis=0)
    same = np.take_along_axis(means, rate[None], axis=0)[0]
    higher = np.arange(len(means))[:, None] >= rate
    return Ratios(
        own=np.exp(means.min(axis=0) - lowest),
        same=np.exp(same - lowest),
        high=np.exp(np.where(higher, means, -np.inf).max(axis=0) - lowest),
        worst=np.exp(means.max(axis=0) - lowest),
    )
