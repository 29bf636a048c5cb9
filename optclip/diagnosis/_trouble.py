"""Finds the part of a run that a diagnosis should look at.

Each function looks at a `Timeline` and returns indices of its steps.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from optclip.diagnosis._timeline import WINDOW, Episode, Timeline
from optclip.diagnosis.summary import diverged_at
from optclip.diagnosis.thresholds import DRIFTED, FEWEST

__all__ = [
    "LONG",
    "Trouble",
    "divergence_start",
    "excess",
    "first_nonfinite",
    "growth_places",
    "largest_spike",
    "last_typical",
    "shift_of",
    "spikes_of",
    "stays_from",
    "trouble_of",
]

# A step is typical up to this many robust deviations above the median, which a normal
# distribution exceeds at one step in 700.
_TYPICAL = 3.0
# A run without non-finite steps diverged if it stays high for at least this many steps,
# as in `diverged_at`.
LONG = 10
# A loss that stays above the first losses must be above them by this fraction: if it
# does not improve, it stays slightly above them by chance.
_ABOVE = 0.1
# A trend is fitted to at least this many norms: each of its quarters has a median of 5.
_FEWEST_OF_TREND = 20
# Each quarter of a trend must rise by at least this fraction of an even rise. This
# tells a trend from a jump.
_EVEN = 0.5


class Trouble(NamedTuple):
    """The part of a run that most of the facts are about.

    Attributes:
        kind: "divergence", "spike", "nonfinite", "level_shift" or "growth".
        start: Index of its first step.
        stop: Index after its last step.
    """

    kind: str
    start: int
    stop: int


def excess(t: Timeline, place: int, before: int) -> float:
    """Returns how far a step is above the steps before; 1 is just far enough."""
    found = [0.0]
    pairs = (
        (t.norms[place], t.norm_before(before)),
        (
            t.losses[place],
            t.loss_before(before),
        ),
    )
    for value, level in pairs:
        if level is not None and np.isfinite(value) and level.limit > level.middle:
            found.append((value - level.middle) / (level.limit - level.middle))
    return max(found)


def _peak(t: Timeline, start: int, stop: int) -> int:
    """Returns the place that is farthest above the steps before."""
    levels = t.norm_before(start), t.loss_before(start)
    total = np.zeros(stop - start)
    for values, level in zip((t.norms, t.losses), levels, strict=True):
        if level is not None:
            scale = max(level.limit - level.middle, np.finfo(float).tiny)
            part = (values[start:stop] - level.middle) / scale
            total = np.fmax(total, part)
    return start + int(np.argmax(total))


def last_typical(t: Timeline, start: int) -> int | None:
    """Returns the last place before ``start`` with a typical norm and loss."""
    levels = (t.norms, t.norm_before(start)), (t.losses, t.loss_before(start))
    fine = ~(t.norm_far | t.loss_far | t.run.nonfinite)[:start]
    for values, level in levels:
        if level is not None:
            high = values[:start] > level.middle + _TYPICAL * level.deviation
            fine &= ~high
    if levels[0][1] is not None:  # a step without a norm is not known to be typical
        fine &= np.isfinite(t.norms[:start])
    places = np.flatnonzero(fine)
    return int(places[-1]) if places.size else None


def first_nonfinite(t: Timeline, start: int) -> int | None:
    places = np.flatnonzero(t.run.nonfinite[start:])
    return start + int(places[0]) if places.size else None


def divergence_start(t: Timeline) -> int | None:
    """Returns where the run leaves its typical range permanently, or None."""
    last = t.episodes[-1] if t.episodes and t.episodes[-1].end == "open" else None
    place = stays_from(t)
    return place if place is None or last is None else min(place, last.start)


def stays_from(t: Timeline) -> int | None:
    """Returns from where on the run is non-finite, or its loss high, up to the end."""
    place = diverged_at(t.run)
    if place is not None and not t.run.nonfinite[place:].all():
        # The first loss may be low by chance, so several of the first ones count.
        began = float(np.nanmax(t.losses[: min(max(place, 1), FEWEST)]))
        if np.nanmedian(t.losses[place:]) < began + _ABOVE * abs(began):
            place = None
    if place is not None:
        return place
    # The loss may stay high, but below where a run of random weights began.
    known = t.loss_episodes if np.isfinite(t.losses).any() else t.norm_episodes
    return known[-1].start if known and _is_long(t, known[-1]) else None


def _is_long(t: Timeline, episode: Episode) -> bool:
    """Whether an episode lasts to the end of the run, and longer than a spike."""
    return episode.end == "open" and len(t.run.steps) - episode.start >= LONG


def spikes_of(t: Timeline) -> list[tuple[Episode, int]]:
    """Returns the finite episodes that ended, each with the place of its peak."""
    diverged = divergence_start(t)
    until = len(t.run.steps) if diverged is None else diverged
    found = []
    for episode in t.episodes:
        lasting = episode.end == "stayed" or _is_long(t, episode)
        if lasting or episode.start >= until:
            continue
        peak = _peak(t, episode.start, episode.stop)
        if excess(t, peak, episode.start) > 1.0:
            found.append((episode, peak))
    return found


def largest_spike(t: Timeline) -> tuple[Episode, int] | None:
    spikes = spikes_of(t)
    return max(spikes, key=lambda s: excess(t, s[1], s[0].start), default=None)


def _trend(t: Timeline, places: np.ndarray) -> float | None:
    """Returns the decades by which the norm rises over places, or None if unevenly."""
    logs = t.norms[places]
    medians = [float(np.median(part)) for part in np.array_split(logs, 4)]
    rise = medians[3] - medians[0]
    if rise < DRIFTED or min(np.diff(medians)) < _EVEN * rise / 3:
        return None
    ends = FEWEST // 2
    return float(np.median(logs[-ends:]) - np.median(logs[:ends]))


def growth_places(t: Timeline) -> tuple[np.ndarray, float] | None:
    """Returns the longest last part of the run over which the norm rises, and by what.

    The part ends where the run stops being finite, or diverges, or ends.
    """
    place = stays_from(t)
    end = len(t.run.steps)
    if place is not None:
        lost = first_nonfinite(t, place)
        end = place + 1 if lost is None else min(place + 1, lost)
    usable = np.isfinite(t.norms[:end])
    for episode in t.episodes:
        if episode.end == "returned":  # a spike is not a trend
            usable[episode.start : episode.stop] = False
    places = np.flatnonzero(usable)
    size = len(places)
    while size >= _FEWEST_OF_TREND:
        rise = _trend(t, places[-size:])
        if rise is not None:
            return places[-size:], rise
        size = int(size / 1.2)
    return None


def shift_of(t: Timeline) -> Episode | None:
    """Returns where the norm last moved to another level, if the run did not diverge.

    A rise in the first steps is a warm-up, and one over many steps is a trend.
    """
    if divergence_start(t) is not None or growth_places(t) is not None:
        return None
    found = [e for e in t.norm_episodes if e.end == "stayed" or _is_long(t, e)]
    found = [e for e in found if e.start >= WINDOW]
    return found[-1] if found else None


def trouble_of(t: Timeline) -> Trouble | None:
    """Returns the part of the run that a diagnosis should look at."""
    start = divergence_start(t)
    grown = growth_places(t)
    unfinished = not t.episodes or t.episodes[-1].end == "open"
    trend = None
    if grown is not None:
        trend = Trouble("growth", int(grown[0][0]), int(grown[0][-1]) + 1)
    if trend is not None and unfinished:
        return trend
    if start is not None:
        return Trouble("divergence", start, len(t.run.steps))
    largest = largest_spike(t)
    if largest is not None:
        return Trouble("spike", largest[0].start, largest[0].stop)
    lost = first_nonfinite(t, 0)
    if lost is not None:
        episode = next((e for e in t.episodes if e.start <= lost < e.stop), None)
        stop = lost + 1 if episode is None else episode.stop
        return Trouble("nonfinite", lost, stop)
    shift = shift_of(t)
    return trend if shift is None else Trouble("level_shift", shift.start, shift.stop)
