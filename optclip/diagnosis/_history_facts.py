"""States what the logs of a run show; each function looks for one kind of fact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from optclip.diagnosis._leading_leaf import leading_leaf
from optclip.diagnosis._timeline import WINDOW, Level, Timeline
from optclip.diagnosis._trouble import (
    LONG,
    Trouble,
    divergence_start,
    excess,
    first_nonfinite,
    growth_places,
    largest_spike,
    last_typical,
    shift_of,
    spikes_of,
    stays_from,
    trouble_of,
)
from optclip.diagnosis.facts import FACTS, HistoryFact
from optclip.diagnosis.thresholds import FEWEST, factor_of

__all__ = ["facts_of"]

# Nearly all steps. Adaptive thresholds at the median clip about half.
_NEARLY_ALL = 0.9
# Finding a bad batch takes at least four batches, most of them good.
_FEWEST_BATCHES = 8
# The default of `max_batches`.
_MOST_BATCHES = 24


# --- in words -------------------------------------------------------------------------


def _step(t: Timeline, place: int) -> str:
    return f"{t.run.steps[place]:,}"


def _steps(t: Timeline, *places: int) -> tuple[int, ...]:
    return tuple(int(t.run.steps[place]) for place in dict.fromkeys(places))


def _before(t: Timeline, level: Level) -> str:
    """Names the steps that a level was computed from."""
    recorded = "" if np.all(np.diff(t.run.steps) == 1) else "recorded "
    return f"the {level.steps} {recorded}steps before"


def _norm_at(t: Timeline, place: int, level: Level | None) -> str:
    """Describes a norm relative to the steps before."""
    words = f"the norm was {factor_of(t.norms[place])}"
    if level is None:
        return words
    times = factor_of(t.norms[place] - level.middle)
    return f"{words}, {times} times its median in {_before(t, level)}"


def _loss_at(t: Timeline, place: int, level: Level | None) -> str:
    words = f"the loss was {t.losses[place]:.3g}"
    return words if level is None else f"{words} (median before: {level.middle:.3g})"


def _both_at(t: Timeline, place: int, before: int) -> str:
    """Describes the norm and the loss at a step, relative to the steps before."""
    parts = []
    if np.isfinite(t.norms[place]):
        parts.append(_norm_at(t, place, t.norm_before(before)))
    if np.isfinite(t.losses[place]):
        parts.append(_loss_at(t, place, t.loss_before(before)))
    return ", and ".join(parts)


# --- one kind of fact each ------------------------------------------------------------


def divergence(t: Timeline) -> HistoryFact | None:
    """Says from which step on the run does not return, as it diverged."""
    start, place = divergence_start(t), stays_from(t)
    if start is None or place is None:
        return None
    end = len(t.run.steps) - 1
    words = ""
    if start < place:
        words = f"At step {_step(t, start)} the run left its typical range. "
    words += f"From step {_step(t, place)} to the end, step {_step(t, end)}, "
    began = t.losses[np.isfinite(t.losses)][:1]
    if t.run.nonfinite[place:].all():
        words += "no step is finite."
    elif np.isfinite(t.losses).any():
        lowest = np.nanmin(t.losses[place:])
        words += f"the loss stayed at {lowest:.3g} or above"
        level = t.loss_before(start)
        if lowest > began[0]:
            words += f". It began at {began[0]:.3g}."
        elif level is not None:
            words += f". Its median in {_before(t, level)} is {level.middle:.3g}."
        else:
            words += "."
    else:
        level = t.norm_before(start)
        assert level is not None  # an episode has steps before it
        middle = factor_of(level.middle)
        words += f"the norm stayed far above its median in the steps before, {middle}."
    return HistoryFact("divergence", _steps(t, start, end), None, words)


def spike(t: Timeline) -> HistoryFact | None:
    """Describes the largest spike: steps far above those before, and then a return."""
    largest = largest_spike(t)
    if largest is None:
        return None
    episode, peak = largest
    words = f"At step {_step(t, peak)}, {_both_at(t, peak, episode.start)}. "
    if t.run.skipped is not None and t.run.skipped[peak]:
        words += "The step was skipped. "
    if episode.stop < len(t.run.steps):
        words += f"At step {_step(t, episode.stop)} it was typical again."
    else:
        words += "The logs end before it is typical again."
    others = [_step(t, p) for e, p in spikes_of(t) if e != episode]
    if others:
        shown = ", ".join(others[-4:])
        many = f"the last of {len(others)} others at steps" if others[4:] else "others"
        words += f" It is the largest spike ({many}: {shown})."
    places = (episode.start, max(episode.stop - 1, episode.start))
    return HistoryFact("spike", _steps(t, *places), None, words)


def level_shift(t: Timeline) -> HistoryFact | None:
    """Says that the norm moved to another level and stayed there."""
    shift = shift_of(t)
    level = None if shift is None else t.norm_before(shift.start)
    after = t.norms[shift.start : shift.stop] if shift is not None else np.zeros(0)
    if shift is None or level is None or not np.isfinite(after).any():
        return None
    start, stop, _ = shift
    middle = float(np.nanmedian(after))
    words = (
        f"At step {_step(t, start)} the norm rose from a median of "
        f"{factor_of(level.middle)} to {factor_of(middle)}, a factor of "
        f"{factor_of(middle - level.middle)}, and stayed there up to step "
        f"{_step(t, stop - 1)} or longer."
    )
    return HistoryFact("level_shift", _steps(t, start, stop - 1), None, words)


def growth(t: Timeline) -> HistoryFact | None:
    """Says that the norm grew evenly over many steps, up to the end or a divergence."""
    found = growth_places(t)
    if found is None:
        return None
    places, rise = found
    first, last = int(places[0]), int(places[-1])
    # A line is fitted for the growth per step, which the ends alone don't determine.
    steps = (t.run.steps[places] - t.run.steps[first]).astype(float)
    slope = float(np.polyfit(steps, t.norms[places], 1)[0])
    words = (
        f"From about step {_step(t, first)} to step {_step(t, last)} the norm grew by "
        f"a factor of {factor_of(rise)}, which is a factor of {factor_of(100 * slope)} "
        "per 100 steps."
    )
    return HistoryFact("growth", _steps(t, first, last), None, words)


def nonfinite(t: Timeline) -> HistoryFact | None:
    """Says whether the norm had grown before the first step that is not finite.

    If the run diverged, only the steps from there on count.
    """
    start = divergence_start(t)
    place = first_nonfinite(t, start or 0)
    if place is None:
        return None
    known = np.isfinite(t.norms) | np.isfinite(t.losses)
    known &= ~t.run.nonfinite
    earlier = np.flatnonzero(known[:place])
    total = int(np.sum(t.run.nonfinite))
    to_the_end = total == len(t.run.steps) - place
    more = "" if to_the_end else f" In all, {total:,} steps are not finite."
    more = more if total > 1 else ""
    name = _step(t, place)
    if not earlier.size:
        words = f"Step {name}, the first in the logs, is not finite.{more}"
        return HistoryFact("nan_without_warning", _steps(t, place), None, words)
    last = int(earlier[-1])
    begun = next((e.start for e in t.episodes if e.start <= place < e.stop), place)
    at = _both_at(t, last, begun)
    grown = growth_places(t)
    risen = grown is not None and int(grown[0][-1]) == last and grown[1] >= 1.0
    if excess(t, last, begun) > 1.0 or risen:
        words = f"At step {_step(t, last)}, {at}. Step {name} is not finite.{more}"
        return HistoryFact("nan_after_growth", _steps(t, last, place), None, words)
    words = (
        f"Step {name} is not finite. The step recorded before it, {_step(t, last)}, "
        f"was typical: {at}.{more}"
    )
    return HistoryFact("nan_without_warning", _steps(t, place), None, words)


def leaf(t: Timeline, trouble: Trouble) -> HistoryFact | None:
    """Says which leaf leads when the run leaves its typical range."""
    steps, rows = t.run.steps, t.rows
    if not rows:
        return None
    start, stop = trouble.start, min(trouble.stop, trouble.start + WINDOW)
    if trouble.kind == "growth":
        quarter = max((trouble.stop - start) // 4, FEWEST)
        before: Sequence[int] = range(max(start - WINDOW, 0), start + quarter)
        during = range(start + quarter, trouble.stop)
        if not during:
            return None
        return leading_leaf(rows, steps, before, during, during[-1])
    # A leaf may rise before the norm of all leaves does.
    bad = t.norm_far | t.loss_far | t.run.nonfinite
    typical = np.flatnonzero(~bad[:start])[-2 * WINDOW :]
    if not typical.size:
        return None
    middle = len(typical) // 2
    during = range(int(typical[middle]), stop)
    return leading_leaf(rows, steps, typical[:middle].tolist(), during, start)


def clipping(t: Timeline, place: int) -> HistoryFact | None:
    """Says that nearly all of the steps before a place were clipped."""
    if t.run.clipped is None:
        return None
    places = np.flatnonzero(~t.run.nonfinite[:place])[-WINDOW:]
    clipped = t.run.clipped[places]
    if len(places) < FEWEST or np.mean(clipped) < _NEARLY_ALL:
        return None
    first, last = int(places[0]), int(places[-1])
    words = (
        f"{int(np.sum(clipped)):,} of the {len(places)} steps from {_step(t, first)} "
        f"to {_step(t, last)} were clipped"
    )
    if t.run.thresholds is not None:
        known = t.run.thresholds[places]
        known = known[np.isfinite(known)]
        norms = t.norms[places]
        norms = norms[np.isfinite(norms)]
        if known.size and norms.size:
            words += (
                f": the median threshold is {np.median(known):.3g}, and the median "
                f"norm {factor_of(float(np.median(norms)))}"
            )
    return HistoryFact("clipping", _steps(t, first, last), None, f"{words}.")


def skipping(t: Timeline) -> HistoryFact | None:
    """Counts the steps that were skipped."""
    if t.run.skipped is None or not t.run.skipped.any():
        return None
    places = np.flatnonzero(t.run.skipped)
    first, last = int(places[0]), int(places[-1])
    if len(places) == 1:
        words = f"Step {_step(t, first)} was skipped."
    else:
        cuts = np.flatnonzero(np.diff(places) > 1) + 1
        longest = max(len(part) for part in np.split(places, cuts))
        words = (
            f"{len(places):,} of {len(t.run.steps):,} steps were skipped, the first at "
            f"step {_step(t, first)} and the last at step {_step(t, last)}; at most "
            f"{longest} in a row."
        )
    return HistoryFact("skipping", _steps(t, first, last), None, words)


def checkpoint(
    t: Timeline, trouble: Trouble, leaf: HistoryFact | None = None
) -> HistoryFact:
    """Says which checkpoint and which batches a diagnosis needs.

    If a leaf rises earlier than the norm of all leaves, the checkpoint is from before
    that.
    """
    steps, start = t.run.steps, trouble.start
    if trouble.kind == "growth":
        end = trouble.stop - 1
        last = int(steps[end])
        first = max(last - _MOST_BATCHES + 1, int(steps[0]))
        words = (
            f"The norm has grown most at step {last:,}: use a checkpoint from shortly "
            f"before it, and the batches of steps {first:,} to {last:,}. For "
            f"comparison, diagnose one from step {_step(t, start)} or earlier."
        )
        return HistoryFact("checkpoint", (int(steps[start]), first, last), None, words)
    names = {
        "divergence": "divergence",
        "spike": "spike",
        "nonfinite": "non-finite step",
        "level_shift": "rise",
    }
    what = names[trouble.kind]
    # The batches of the first steps of the trouble, but not those after it broke.
    lost = first_nonfinite(t, start)
    end = min(trouble.stop - 1, start + LONG)
    last = int(steps[end if lost is None else min(end, lost)])
    early = leaf is not None and leaf.leaf is not None and leaf.steps[0] < steps[start]
    onset = int(np.searchsorted(steps, leaf.steps[0])) if early and leaf else start
    typical = last_typical(t, onset)
    if typical is None:
        first = int(steps[0])
        words = (
            f"No step before the {what} is typical: use the initial parameters, or a "
            f"checkpoint from before these logs, and the batches of steps {first:,} to "
            f"{last:,}."
        )
        return HistoryFact("checkpoint", (first, first, last), None, words)
    back = int(steps[typical])
    first = max(min(back + 1, last - _FEWEST_BATCHES + 1), int(steps[0]))
    quantity = "loss" if np.isnan(t.norms).all() else "norm"
    if early and leaf:
        what = f"rise of `{leaf.leaf}`"
    words = (
        f"The last step with a typical {quantity} before the {what} is {back:,}: use a "
        f"checkpoint from that step or earlier, and the batches of steps {first:,} to "
        f"{last:,}."
    )
    if last - first + 1 > _MOST_BATCHES:
        words += (
            f" `diagnose` reads {_MOST_BATCHES} batches by default, so pass the last "
            "of them."
        )
    return HistoryFact("checkpoint", (back, first, last), None, words)


def steady(t: Timeline) -> HistoryFact:
    """Says that nothing stands out."""
    end = len(t.run.steps) - 1
    words = (
        f"From step {_step(t, 0)} to step {_step(t, end)}, all steps are finite, no "
        "norm or loss is far above those before, and the norm does not grow steadily."
    )
    return HistoryFact("steady", _steps(t, 0, end), None, words)


# --- together -------------------------------------------------------------------------


def facts_of(t: Timeline) -> tuple[HistoryFact, ...]:
    """Returns everything that the logs of a run show, in the order of `FACTS`."""
    trouble = trouble_of(t)
    found: list[Any] = [divergence(t), spike(t), level_shift(t), nonfinite(t)]
    found += [growth(t), skipping(t)]
    if trouble is None:
        found += [steady(t), clipping(t, len(t.run.steps))]
    else:
        leading = leaf(t, trouble)
        found += [leading, clipping(t, trouble.start)]
        found += [checkpoint(t, trouble, leading)]
    order = list(FACTS)
    return tuple(sorted(filter(None, found), key=lambda fact: order.index(fact.kind)))
