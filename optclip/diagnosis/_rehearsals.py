"""Short trainings on a copy of the model, and what can be concluded from them."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from optclip.diagnosis._limits import LIMITS

__all__ = ["Rehearsal", "Run", "better", "ended"]

# The losses of so many steps are averaged at the end of a rehearsal.
LAST = 4


def ended(losses: Sequence[float]) -> float:
    """Returns the mean of the last losses; inf if they are not finite."""
    tail = np.asarray(losses[-LAST:])
    return float(tail.mean()) if len(losses) and np.isfinite(tail).all() else math.inf


@dataclasses.dataclass(frozen=True)
class Run:
    """A few steps of training on one order of the batches.

    Attributes:
        starts: Losses of the batches before the first step.
        losses: Loss of each step; they end early if one is not finite.
    """

    starts: Sequence[float]
    losses: Sequence[float]

    @property
    def start(self) -> float:
        """The loss that the last batches had before the first step."""
        return float(np.mean(self.starts[-LAST:]))

    @property
    def end(self) -> float:
        """The loss at the end; inf if a loss is not finite."""
        return ended(self.losses)

    @property
    def noise(self) -> float:
        """Differences of the loss below this are not evidence."""
        return LIMITS.worse * max(abs(self.start), 1e-12)

    @property
    def fails(self) -> bool:
        """Whether the loss is not finite, or higher at the end than at the start."""
        return self.end > self.start + self.noise

    @property
    def trains(self) -> bool:
        """Whether the loss is lower at the end than at the start."""
        return self.end < self.start


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """Runs that differ in the order of the batches only.

    Attributes:
        runs: The runs.
        empty_loss: The loss of the same batches if all parameters are 0, as a proxy of
            an untrained model; NaN if it is unknown.
    """

    runs: tuple[Run, ...]
    empty_loss: float = math.nan

    def _fails(self, run: Run) -> bool:
        # Near a loss of 0, a rise by a tenth is noise. It counts if it loses a tenth of
        # what the model has learned.
        learned = self.empty_loss - run.start
        lost = LIMITS.lost * learned if learned > 0 else 0.0
        return run.end > run.start + max(run.noise, lost)

    @property
    def fails(self) -> bool:
        """Whether every run fails."""
        return all(self._fails(run) for run in self.runs)

    @property
    def holds(self) -> bool:
        """Whether no run fails."""
        return not any(self._fails(run) for run in self.runs)

    @property
    def trains(self) -> bool:
        """Whether every run trains."""
        return all(run.trains for run in self.runs)

    def words(self) -> str:
        """Says from where to where the loss goes in the first run."""
        run = self.runs[0]
        end = f"{run.end:.3g}" if math.isfinite(run.end) else "a non-finite value"
        return f"from {run.start:.3g} to {end}"

    def _level(self, run: Run) -> float:
        """Returns the loss at the end in units that do not depend on its scale."""
        if not math.isfinite(run.end):
            return math.inf
        if math.isfinite(self.empty_loss) and self.empty_loss > 0:
            return run.end / self.empty_loss
        return 1 + (run.end - run.start) / max(abs(run.start), 1e-12)

    @property
    def levels(self) -> list[float]:
        """The loss at the end of each run, relative to that of an untrained model."""
        return [self._level(run) for run in self.runs]


def better(new: Rehearsal, old: Rehearsal, times: float) -> bool:
    """Whether a change of the model, the data or the loss makes it train better.

    Losses before and after such a change have different units. The change must let a
    model train that fails without it, or lower the relative loss by ``times``, with
    every order of the batches.
    """
    if old.fails and new.trains:
        return True
    pairs = zip(new.levels, old.levels, strict=True)
    lower = all(a * times < b for a, b in pairs)
    # A model that has been trained may get a little worse at first.
    return lower and (new.holds or max(new.levels) < 1)
