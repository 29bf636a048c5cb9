"""Finds the leaf whose norm rises first, or most, in the logs of a run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from optclip.diagnosis._timeline import level_of
from optclip.diagnosis.facts import HistoryFact
from optclip.diagnosis.thresholds import DEVIATIONS, FEWEST, factor_of

__all__ = ["leading_leaf", "leaf_columns"]

# In decades: the norm of a leaf has risen if it is this far above its median (a factor
# of 2) and 5 robust deviations above it. The limit is lower than for a run, because it
# is only applied near a step at which the run leaves its typical range.
_RISEN = 0.3
# In decades: of leaves that rise at the same step, one leads if it rises this much more
# than the next (a factor of 3.2).
_LEADS = 0.5
_NAMED = 4
# Keys of norms that are not norms of a leaf.
_NOT_A_LEAF = re.compile(r"(^|/)(clip|skip|norms)(_\d+)?/([^/]+/)?norm(_before)?$")


class _Rise(NamedTuple):
    """The rise of one leaf.

    Attributes:
        leaf: The name of the leaf.
        place: Index of the step from which the norm is above its limit.
        peak: Decades above the median at the largest norm; inf if it is not finite.
        first: The same at ``place``.
    """

    leaf: str
    place: int
    peak: float
    first: float


def leaf_columns(rows: Sequence[Any]) -> dict[str, str]:
    """Returns the key of the norm of each leaf, by the name of the leaf.

    `leaf_metrics` writes the norm of a leaf as "PATH/norm_before" or "PATH/norm". The
    metrics of a clip have the same ending, but also contain "norm_after" or a counter.
    """
    keys = dict.fromkeys(key for row in rows for key in row)
    found: dict[str, str] = {}
    for ending in ("norm_before", "norm"):
        for key in keys:
            path = key.removesuffix(f"/{ending}")
            others = (f"{path}/norm_after", f"{path}/steps", f"{path}/skipped_steps")
            is_leaf = path != key and not _NOT_A_LEAF.search(key)
            if is_leaf and not any(other in keys for other in others):
                found.setdefault(path, key)
    return found


def _logs(rows: Sequence[Any], key: str) -> np.ndarray:
    """Returns logarithms of a column: NaN if missing or 0, inf if not finite."""

    def number(row):
        value = row.get(key, 0.0)
        try:
            return np.inf if value is None else float(value)  # JSON's null: non-finite
        except (TypeError, ValueError, OverflowError):
            return np.inf

    values = np.array([number(row) for row in rows], float)
    finite = np.isfinite(values)
    logs = np.log10(np.where(finite & (values > 0), values, 1.0))
    return np.where(finite, np.where(values > 0, logs, np.nan), np.inf)


def _rise(
    leaf: str, before: np.ndarray, during: np.ndarray, start: int
) -> _Rise | None:
    """Returns the rise of a leaf that is above its limit at or after ``start``."""
    known = before[np.isfinite(before)]
    if len(known) < FEWEST:
        return None
    level = level_of(known, is_norm=True)
    limit = level.middle + max(_RISEN, DEVIATIONS * level.deviation)
    above = during > limit
    later = np.flatnonzero(above[start:])
    if not later.size:
        return None
    place = start + int(later[0])
    while place > 0 and above[place - 1]:
        place -= 1
    peak = float(np.nanmax(during[place:])) - level.middle
    return _Rise(leaf, place, peak, float(during[place]) - level.middle)


def _size(decades: float) -> str:
    """Describes a norm relative to the median before."""
    if np.isinf(decades):
        return "not finite"
    return f"{factor_of(decades)} times its median before"


def _names(rises: Sequence[_Rise]) -> str:
    shown = ", ".join(f"`{rise.leaf}`" for rise in rises[:_NAMED])
    more = len(rises) - _NAMED
    return f"{shown} and {more} more" if more > 0 else shown


def _most(first: list[_Rise]) -> _Rise | None:
    """Returns the leaf that rises most of those that rise first, if one does."""
    ordered = sorted(first, key=lambda rise: -rise.first)
    if np.isinf(ordered[0].first):
        return None if len(ordered) > 1 and np.isinf(ordered[1].first) else ordered[0]
    ahead = len(ordered) == 1 or ordered[0].first - ordered[1].first >= _LEADS
    return ordered[0] if ahead else None


def leading_leaf(
    rows: Sequence[Any],
    steps: np.ndarray,
    before: Sequence[int],
    during: range,
    start: int,
) -> HistoryFact | None:
    """Says which leaf rises first or most when a run leaves its typical range.

    Args:
        rows: The rows of the run.
        steps: The step of each row.
        before: Indices of typical rows before.
        during: Indices of the rows to search, including some before ``start``.
        start: Index of the row at which the run leaves its typical range. A leaf that
            rose earlier and fell again by then is not considered.

    Returns:
        A fact of kind "leading_leaf" or "several_leaves"; None if there are fewer than
        two leaves in the logs, or if none of them rises.
    """
    earlier = [rows[place] for place in before]
    watched = [rows[place] for place in during]
    columns = leaf_columns([*earlier[-1:], *watched])
    if len(columns) < 2:
        return None
    rises = []
    for leaf, key in columns.items():
        parts = _logs(earlier, key), _logs(watched, key)
        rises.append(_rise(leaf, *parts, start - during.start))
    risen = sorted(filter(None, rises), key=lambda rise: rise.place)
    if not risen:
        return None
    place = risen[0].place
    first = [rise for rise in risen if rise.place == place]
    step = int(steps[during.start + place])
    at_once = f"{len(first)} of {len(columns)} leaves"
    lead = _most(first)
    if lead is None:
        how = "are not finite" if np.isinf(first[0].first) else "rise"
        if len(first) == len(columns):
            words = f"At step {step:,}, all {len(columns)} leaves {how}."
        else:
            words = f"At step {step:,}, {at_once} {how} first: {_names(first)}."
        return HistoryFact("several_leaves", (step,), None, words)
    if len(first) == 1:
        words = f"The norm of `{lead.leaf}` rises first, at step {step:,}"
        if len(risen) == 1:
            words += f", and none of the other {len(columns) - 1} leaves rises"
        else:
            gap = int(steps[during.start + risen[1].place]) - step
            words += f", {gap:,} step{'s' * (gap > 1)} before `{risen[1].leaf}`"
    else:
        words = (
            f"The norm of `{lead.leaf}` rises most: at step {step:,}, at which "
            f"{at_once} rise, it is {_size(lead.first)}"
        )
    if lead.peak > lead.first:
        words += f". At its largest, it is {_size(lead.peak)}"
    elif len(first) == 1:
        words += f". It is then {_size(lead.first)}"
    return HistoryFact("leading_leaf", (step,), lead.leaf, f"{words}.")
