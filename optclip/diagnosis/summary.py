"""Summarizes a run in one sentence and selects the run to report."""

from collections.abc import Sequence

import numpy as np

from optclip.diagnosis.records import Run

__all__ = ["diverged_at", "headline", "names_of", "pick"]

# A rise of the loss above its initial value is noise unless it lasts this long: at
# least this many steps and this fraction of the run.
_LONG, _PART = 10, 0.1


def _tail(flags: np.ndarray) -> int:
    """Returns the start of the trailing run of set flags, or ``len(flags)`` if none."""
    unset = np.flatnonzero(~flags)
    return int(unset[-1]) + 1 if unset.size else 0


def _lost(run: Run) -> np.ndarray:
    """Indicates the non-finite steps that were not skipped."""
    return run.nonfinite if run.skipped is None else run.nonfinite & ~run.skipped


def _began(run: Run) -> float:
    """Returns the first known loss, or infinity if there is none."""
    losses = np.zeros(0) if run.losses is None else run.losses
    known = losses[np.isfinite(losses)]
    return float(known[0]) if known.size else np.inf


def diverged_at(run: Run) -> int | None:
    """Returns the index at which the run diverged, or None if it did not.

    A run diverged if all of its steps from this index to the end are non-finite or, if
    there are no such steps, if the loss stays above its first value until the end, for
    at least ten steps and a tenth of the run.
    """
    lost, number = _lost(run), len(run.steps)
    place = _tail(lost)
    if place == number and run.losses is not None:
        above = _tail(lost | (run.losses > _began(run)))
        if number - above >= max(_LONG, _PART * number):
            place = above
    return place if place < number else None


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number:,} {word}s"


def _clips(run: Run) -> str:
    number = len(run.steps)
    all_there = np.all(np.diff(run.steps) == 1)
    steps = _count(number, "step" if all_there else "recorded step")
    clipped = 0 if run.clipped is None else int(np.sum(run.clipped))
    if clipped:
        return f"{clipped:,} of {steps} clipped"
    if run.thresholds is None:
        return f"{steps} without a clip"
    return f"none of {steps} clipped"


def _losses(run: Run) -> list[str]:
    """Describes how the run ended."""
    place = diverged_at(run)
    if place is None:
        return []
    words = f"diverged at step {run.steps[place]}"
    if np.all(_lost(run)[place:]):
        return [f"{words}, not finite from there on"]
    return [f"{words}: the loss stayed above {_began(run):.3g}, where it began"]


def headline(run: Run) -> str:
    """Summarizes a run in one plain sentence."""
    parts = [_clips(run)]
    if run.skipped is not None and run.skipped.any():
        parts.append(f"{int(np.sum(run.skipped)):,} left out")
    bad = int(np.sum(run.nonfinite))
    if bad == len(run.steps):
        parts.append("not one of them finite")
    else:
        parts.append(f"{_count(bad, 'step')} not finite" if bad else "all finite")
    zeros = int(np.sum(run.norms == 0))
    if zeros:
        parts.append(f"{_count(zeros, 'gradient')} of norm 0")
    sentence = "; ".join([*parts, *_losses(run)])
    return f"{sentence[0].upper()}{sentence[1:]}."


def names_of(runs: Sequence[Run]) -> str:
    """Returns the names of the runs, each with its seeds."""
    seeds: dict[str, list[str]] = {}
    for run in runs:
        seeds.setdefault(run.name, []).append(run.seed)
    words = []
    for name, numbers in seeds.items():
        known = [number for number in numbers if number]
        several = f"seed{'s' if len(known) > 1 else ''} {', '.join(known)}"
        words.append(", ".join(x for x in (name, several if known else "") if x))
    return "; ".join(words) or "one without a name"


def _has_to_say(run: Run) -> tuple[bool, ...]:
    left_out = run.skipped is not None and bool(run.skipped.any())
    return diverged_at(run) is not None, bool(run.nonfinite.any()), left_out


def pick(
    runs: Sequence[Run], name: str | None = None, seed: str | int | None = None
) -> Run:
    """Returns the requested run, or the first one with something to report.

    Of the runs that match ``name`` and ``seed``, returns the first that diverged, else
    the first with a non-finite step, else the first with a skipped step, else the first
    run.

    Raises:
        ValueError: If no run matches.
    """
    found = [run for run in runs if name is None or run.name == name]
    found = [run for run in found if seed is None or run.seed == str(seed)]
    if not found:
        wanted = [] if name is None else [repr(name)]
        wanted += [] if seed is None else [f"seed {seed}"]
        raise ValueError(
            f"There is no run {', '.join(wanted)}. There are: {names_of(runs)}."
        )
    return max(found, key=_has_to_say)
