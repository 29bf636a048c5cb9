"""Reads the logs of a run, and marks the steps that are far above those before.

The norm of a healthy run changes slowly, so each step is compared with the typical
steps shortly before it. A step that is far above them begins an episode, which ends
when a few steps in a row are typical again. During an episode the comparison stays with
the steps before it, so that a run that stays high is not mistaken for a new normal.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from optclip.diagnosis._logs import Row
from optclip.diagnosis.records import Run, runs_with_rows
from optclip.diagnosis.summary import names_of, pick
from optclip.diagnosis.thresholds import DEVIATIONS, FAR, FEWEST, FLOOR

__all__ = ["Episode", "Level", "Timeline", "level_of", "timeline_of", "timeline_of_run"]

# Number of typical steps that a step is compared with. Fewer follow the norm faster,
# but more are a better estimate of its spread.
WINDOW = 100
# The comparison is updated after this many typical steps, since a median takes longer
# than everything else.
EVERY = 10
# This many steps in a row must be typical for an episode to end: one or two can be by
# chance.
BACK = 3
# A loss is far above the others if it is this many robust deviations above their
# median ...
LOSS_DEVIATIONS = 8.0
# ... and by this fraction of their median, since a loss rarely changes by a decade.
LOSS_RISE = 0.2
# Added to the deviation of a loss as this fraction of its median, since the losses of a
# full batch have almost no deviation. Eight deviations are then below `LOSS_RISE`.
LOSS_FLOOR = 0.02


class Level(NamedTuple):
    """The typical range of a series: decades for a norm, the value itself for a loss.

    Attributes:
        middle: The median.
        deviation: 1.4826 times the median deviation, plus a floor.
        limit: The value above which a step is far above the others.
        steps: The number of steps that these are computed from.
    """

    middle: float
    deviation: float
    limit: float
    steps: int


class Episode(NamedTuple):
    """A range of steps that begins far above the steps before.

    Attributes:
        start: Index of its first step.
        stop: Index after its last step.
        end: "returned" if the steps after it are typical again, "stayed" if the norm
            stayed at another level for `WINDOW` steps, "open" if the run ended first.
    """

    start: int
    stop: int
    end: str


@dataclasses.dataclass(frozen=True)
class Timeline:
    """A run, with the steps that are far above those before.

    Attributes:
        run: The run.
        rows: The row of the log for each step; empty if unknown.
        norms: float64. Decadic logarithms of the norms; NaN if unknown, not finite or
            0.
        losses: float64. The losses; NaN if unknown or not finite.
        norm_far: bool. Whether the norm is far above those before.
        loss_far: bool. The same for the loss.
        norm_episodes: The episodes of the norm, including non-finite steps.
        loss_episodes: The same for the loss.
        others: The other runs in the same logs, in words; "" if there are none.
    """

    run: Run
    rows: Sequence[Row]
    norms: np.ndarray
    losses: np.ndarray
    norm_far: np.ndarray
    loss_far: np.ndarray
    norm_episodes: tuple[Episode, ...]
    loss_episodes: tuple[Episode, ...]
    others: str = ""

    def norm_before(self, place: int) -> Level | None:
        """Returns the typical range of the norm before a step; None if unknown."""
        return _before(self.norms, self.norm_far, place, is_norm=True)

    def loss_before(self, place: int) -> Level | None:
        """Returns the typical range of the loss before a step; None if unknown."""
        return _before(self.losses, self.loss_far, place, is_norm=False)

    @property
    def episodes(self) -> tuple[Episode, ...]:
        """The episodes of the norm and the loss; those that overlap become one."""
        merged: list[Episode] = []
        for episode in sorted(self.norm_episodes + self.loss_episodes):
            if merged and episode.start <= merged[-1].stop:
                last = merged.pop()
                ends = (last.end, episode.end)
                end = next(e for e in ("open", "stayed", "returned") if e in ends)
                stop = max(last.stop, episode.stop)
                episode = Episode(last.start, stop, end)
            merged.append(episode)
        return tuple(merged)


def _median(values: np.ndarray) -> float:
    ordered = np.sort(values)  # several times as fast as `np.median`
    half = len(ordered) // 2
    return float(ordered[half] + ordered[-half - 1]) / 2


def level_of(values: np.ndarray, *, is_norm: bool) -> Level:
    """Returns the typical range of finite values: logarithms of norms, or losses."""
    middle = _median(values)
    deviation = 1.4826 * _median(np.abs(values - middle))
    if is_norm:
        deviation += FLOOR
        limit = middle + max(FAR, DEVIATIONS * deviation)
    else:
        deviation += LOSS_FLOOR * abs(middle)
        limit = middle + max(LOSS_RISE * abs(middle), LOSS_DEVIATIONS * deviation)
    return Level(middle, deviation, limit, len(values))


def _before(
    values: np.ndarray, far: np.ndarray, place: int, *, is_norm: bool
) -> Level | None:
    typical = np.isfinite(values[:place]) & ~far[:place]
    kept = values[:place][typical][-WINDOW:]
    return level_of(kept, is_norm=is_norm) if len(kept) else None


class _Comparison:
    """Compares each value of a series with the typical values before it."""

    def __init__(self, is_norm: bool):
        self._is_norm = is_norm
        self._typical: deque[float] = deque(maxlen=WINDOW)
        self._new = EVERY
        self.level: Level | None = None

    def add(self, values: list[float]) -> None:
        """Adds typical values, and updates the level from time to time."""
        self._typical.extend(values)
        self._new += len(values)
        if self._new >= EVERY and len(self._typical) >= FEWEST:
            self.level = level_of(np.array(self._typical), is_norm=self._is_norm)
            self._new = 0

    def restart(self) -> None:
        """Forgets the values so far."""
        self._typical.clear()
        self.level, self._new = None, EVERY

    def is_far(self, value: float) -> bool:
        return self.level is not None and value > self.level.limit


def _episodes(
    values: np.ndarray, nonfinite: np.ndarray, *, is_norm: bool
) -> tuple[np.ndarray, tuple[Episode, ...]]:
    """Returns which values are far above those before, and the episodes of these."""
    comparison, found = _Comparison(is_norm), []
    far = np.zeros(len(values), bool)
    start, held = -1, []  # held: (place, value) of the typical steps after the last far
    pairs = zip(values.tolist(), nonfinite.tolist(), strict=True)
    for place, (value, bad) in enumerate(pairs):
        far[place] = bad or comparison.is_far(value)
        if far[place]:
            start, held = (place if start < 0 else start), []
        elif np.isnan(value):  # unknown
            continue
        elif start < 0:
            comparison.add([value])
        else:
            held.append((place, value))
            if len(held) == BACK:
                found.append(Episode(start, held[0][0], "returned"))
                comparison.add([x for _, x in held])
                start, held = -1, []
        # A norm may move to another level in a healthy run, as in a warm-up. Steps that
        # are not finite don't count as a level.
        if is_norm and start >= 0 and place - start >= WINDOW and not bad:
            found.append(Episode(start, place + 1, "stayed"))
            comparison.restart()
            start, held = -1, []
    if np.isnan(values).all():  # nothing to return to
        return far, ()
    if start >= 0 and held:
        found.append(Episode(start, held[0][0], "returned"))
    elif start >= 0:
        found.append(Episode(start, len(values), "open"))
    return far, tuple(found)


def _logs_of(logs: Any) -> tuple[tuple[Run, list[Row]], ...]:
    """Reads ``logs``, with errors that name the argument."""
    given: Any = logs  # keeps its type unknown after the checks below
    scalar = logs is None or isinstance(logs, (bytes, int, float, complex))
    if scalar or not (isinstance(logs, Path) or hasattr(logs, "__iter__")):
        raise TypeError(
            "`logs` must be the path of a log or of its folder, a list of rows (one "
            f"dict per step) or a mapping of arrays, got {type(logs).__name__}."
        )
    if isinstance(logs, str) and not logs:
        raise ValueError("`logs` must be a path, got an empty one.")
    rows = given
    if not isinstance(logs, (str, Path, Mapping)) and not hasattr(logs, "dtype"):
        rows = list(given)
        wrong = [x for x in rows if not isinstance(x, Mapping)]
        mixed = 0 < len(wrong) < len(rows)
        if mixed or any(isinstance(x, str) for x in wrong):
            hint = ""
            if hasattr(logs, "to_dict"):  # a data frame
                hint = ' Of a pandas DataFrame, pass `frame.to_dict("list")`.'
            raise TypeError(
                "`logs` must be a list of rows, one dict per step, got a "
                f"{type(wrong[0]).__name__} in it.{hint}"
            )
    try:
        return runs_with_rows(rows, or_loss=True)
    except ValueError as error:
        raise ValueError(f"`logs`: {error}") from error


def timeline_of(logs: Any) -> Timeline:
    """Reads the logs of a run.

    Args:
        logs: As for `optclip.diagnose`. If there are several runs, the one that the
            report of a run would show is used.

    Returns:
        A `Timeline`.

    Raises:
        TypeError: If ``logs`` is of the wrong type.
        ValueError: If there are no rows, or if they have neither a norm nor a loss.
    """
    pairs = _logs_of(logs)
    runs = [run for run, _ in pairs]
    run = pick(runs)
    rows = next(rows for other, rows in pairs if other is run)
    others = [other for other in runs if other is not run]
    return timeline_of_run(run, rows, names_of(others) if others else "")


def timeline_of_run(run: Run, rows: Sequence[Row] = (), others: str = "") -> Timeline:
    """Returns the timeline of a run; without its rows, the leaves are unknown."""
    known = np.isfinite(run.norms) & (run.norms > 0)
    norms = np.log10(np.where(known, run.norms, 1.0))
    norms[~known] = np.nan
    losses = np.full(len(norms), np.nan) if run.losses is None else run.losses.copy()
    losses[~np.isfinite(losses)] = np.nan
    if not np.any(losses[np.isfinite(losses)]):  # `skip/loss` is 0 if it is not given
        losses[:] = np.nan
    norm_far, norm_episodes = _episodes(norms, run.nonfinite, is_norm=True)
    # A non-finite step is an episode of the norm, if norms are recorded. The loss may
    # be recorded less often, and its return would be seen late.
    bad = run.nonfinite if np.isnan(norms).all() else np.zeros_like(run.nonfinite)
    loss_far, loss_episodes = _episodes(losses, bad, is_norm=False)
    return Timeline(
        run,
        rows,
        norms,
        losses,
        norm_far,
        loss_far,
        norm_episodes,
        loss_episodes,
        others,
    )
