"""The panels of the report, each drawn into a part of a Matplotlib figure."""

from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from optclip.diagnosis._axes import (
    BLUE,
    FEW,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    Panel,
    drawable,
    log_axis,
    tidy,
)
from optclip.diagnosis._contents import Contents
from optclip.diagnosis._signal_panels import signal_panels
from optclip.diagnosis.records import Run
from optclip.diagnosis.summary import diverged_at

__all__ = ["panels_of"]

# A line with more than _MANY points is drawn as the range within each of _BINS parts.
_MANY, _BINS = 2000, 250
# With fewer norms than this, no histogram is drawn.
_HISTOGRAM = 10


# --- norms over steps -----------------------------------------------------------------


def _curve(axes: Any, x: np.ndarray, y: np.ndarray) -> None:
    """Draws a line or, if there are too many points, their range and its middle."""
    if len(x) <= _MANY:
        marker = "o" if len(x) <= FEW else None
        axes.plot(x, y, color=BLUE, linewidth=1.3, marker=marker, markersize=4)
        return
    starts = np.linspace(0, len(x), _BINS, endpoint=False).astype(int)
    low, high = np.fmin.reduceat(y, starts), np.fmax.reduceat(y, starts)
    parts = [part[np.isfinite(part)] for part in np.split(y, starts[1:])]
    middle = [np.median(part) if part.size else np.nan for part in parts]
    axes.fill_between(x[starts], low, high, color=SKY, alpha=0.6, linewidth=0)
    axes.plot(x[starts], middle, color=BLUE, linewidth=1.6)
    words = f"line: median of {len(x) // _BINS} steps; band: lowest to highest"
    axes.set_title(words, loc="right", fontsize=10.5)


def _marks(run: Run) -> list[tuple[str, np.ndarray, str]]:
    """Returns (name, flags, color) for each kind of step to mark."""
    kinds = (
        ("clipped", run.clipped, ORANGE),
        ("left out", run.skipped, PURPLE),
        ("not finite", run.nonfinite, VERMILION),
    )
    return [(name, f, c) for name, f, c in kinds if f is not None and f.any()]


def _bars(run: Run, flags: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Returns the positions, heights and width of the bars.

    Each bar stands for one step or, in a long run, for several steps. Its height
    increases with the fraction of these steps that are marked.
    """
    first, last = float(run.steps[0]), float(run.steps[-1])
    width = max(1.0, np.ceil((last - first) / _BINS))
    bins = ((run.steps - first) // width).astype(int)
    marked, number = np.bincount(bins, flags), np.bincount(bins)
    at = np.flatnonzero(marked)
    share = marked[at] / number[at]
    return first + at * width - 0.5, 0.45 + 0.35 * share, width


def _strip(axes: Any, run: Run) -> None:
    """Draws a row of bars for each kind of step that occurred."""
    marks = _marks(run)[::-1]
    for row, (_, flags, color) in enumerate(marks):
        lefts, heights, width = _bars(run, flags)
        drawn = 0.8 * width if len(run.steps) <= FEW else width
        axes.bar(lefts + width / 2, heights, drawn, row + 0.1, color=color)
        axes.annotate(
            f"{int(flags.sum()):,}",
            (1, row + 0.5),
            (6, 0),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            va="center",
        )
    axes.set_yticks(np.arange(len(marks)) + 0.5, [mark[0] for mark in marks])
    axes.set_ylim(0, len(marks))
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _threshold(axes: Any, run: Run) -> None:
    """Draws the threshold and labels it to the right of the data."""
    if run.thresholds is None:
        return
    axes.plot(run.steps, run.thresholds, color="black", linewidth=1.3)
    known = run.thresholds[np.isfinite(run.thresholds)]
    name = "threshold" if np.ptp(known) == 0 else "threshold,\nat last"
    axes.annotate(
        f"{name}\n{known[-1]:.3g}",
        (1, known[-1]),
        (6, 0),
        xycoords=axes.get_yaxis_transform(),
        textcoords="offset points",
        va="center",
    )


def _draw_norms(run: Run, figure: Any) -> None:
    rows = len(_marks(run))
    ratios = [1.0, 0.11 * rows] if rows else [1.0]
    grid = figure.subplots(
        len(ratios),
        1,
        sharex=True,
        squeeze=False,
        gridspec_kw={"height_ratios": ratios},
    )
    axes, last = grid[0, 0], grid[-1, 0]
    shown = drawable(run.norms)
    _curve(axes, run.steps, shown)
    _threshold(axes, run)
    levels = [shown] if run.thresholds is None else [shown, run.thresholds]
    values = np.concatenate(levels)
    log_axis(axes.yaxis, values[np.isfinite(values)])
    place = diverged_at(run)
    if place is not None:
        axes.axvline(run.steps[place], color=VERMILION, linestyle=(0, (4, 2)))
        right = place > len(shown) / 2
        axes.annotate(
            f"diverged, step {run.steps[place]}",
            (run.steps[place], 1),
            (-4 if right else 4, 4),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            color=VERMILION,
            ha="right" if right else "left",
        )
    tidy(axes)
    axes.set_ylabel("gradient norm\nbefore the clip")
    last.set_xlabel("training step")
    last.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    if rows:
        _strip(last, run)
    room = max(0.01 * float(np.ptp(run.steps)), 0.6)
    axes.set_xlim(run.steps[0] - room, run.steps[-1] + room)


# --- histogram ------------------------------------------------------------------------


def _draw_histogram(norms: np.ndarray, figure: Any) -> None:
    axes = figure.subplots()
    logs = np.log10(norms)
    low, high = float(logs.min()), float(logs.max())
    room = 0.05 if high - low < 0.1 else 0.0
    quarters = np.quantile(logs, [0.25, 0.75])
    width = 2 * np.ptp(quarters) / len(logs) ** (1 / 3)  # Freedman-Diaconis rule
    bins = int(np.clip((high - low) / max(width, 1e-3), 8, 80))
    counts, edges = np.histogram(logs, bins, (low - room, high + room))
    axes.stairs(counts, 10.0**edges, fill=True, color=SKY)
    log_axis(axes.xaxis, 10.0**edges)
    rows = ((10, -4, "right", 8), (50, 0, "center", 24), (90, 4, "left", 8))
    for percent, shift, side, height in rows:
        value = float(np.quantile(norms, percent / 100))
        axes.axvline(value, color="black", linewidth=1.3, linestyle=(0, (4, 2)))
        axes.annotate(
            f"q{percent}: {value:.3g}",
            (value, 1),
            (shift, height),
            xycoords=axes.get_xaxis_transform(),
            ha=side,
            textcoords="offset points",
        )
    tidy(axes)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_xlabel("gradient norm before the clip")
    axes.set_ylabel("steps")


# --- all panels -----------------------------------------------------------------------


def panels_of(contents: Contents) -> list[Panel]:
    """Returns the panels for which there is data."""
    run = contents.run
    shown = drawable(run.norms)
    norms = shown[np.isfinite(shown)]
    found = []
    if norms.size:
        found.append(
            Panel(
                "Gradient norm over the steps",
                contents.headline,
                lambda figure: _draw_norms(run, figure),
                True,
                3.9,
            )
        )
    found += signal_panels(contents.sites)
    if norms.size >= _HISTOGRAM:
        says = "How many steps had a gradient norm of which size, with quantiles."
        found.append(
            Panel(
                "How the norms are distributed",
                says,
                lambda figure: _draw_histogram(norms, figure),
                False,
                3.7,
            )
        )
    return found
