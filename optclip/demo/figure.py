"""The demo's figure: loss per character, and gradient norms with their threshold."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, ScalarFormatter

from optclip.demo.table import median
from optclip.demo.training import Progress, Run

__all__ = ["draw"]

# Okabe and Ito's colors, which people with any kind of color vision can distinguish.
# The dashes keep the first of two equal curves visible beneath the second.
_STYLES = (
    {"color": "#D55E00", "linestyle": "-"},
    {"color": "#56B4E9", "linestyle": "-"},
    {"color": "#004D40", "linestyle": (0, (3, 2))},
)


# Number of steps over which the thick lines are smoothed.
_WINDOW = 11


def _smooth(values: np.ndarray) -> np.ndarray:
    """Returns the running median over the steps, with non-finite medians as NaN."""
    padded = np.pad(values, _WINDOW // 2, mode="edge")
    smooth = np.median(np.lib.stride_tricks.sliding_window_view(padded, _WINDOW), -1)
    return np.where(np.isfinite(smooth), smooth, np.nan)


def _curves(axes: Any, runs: list[Run], progress: Progress, field: str) -> None:
    """Draws a thin line per seed, a thick line for the median, and divergence marks."""
    steps = np.arange(progress.step)
    every = zip(runs, progress.records, _STYLES, strict=True)
    for order, (run, record, style) in enumerate(every):
        values = record[field][: progress.step].astype(np.float64)
        lost = ~np.isfinite(values)
        shown = np.where(lost | (values <= 0), np.nan, values)
        thin = {"color": style["color"], "alpha": 0.3, "linewidth": 0.7}
        axes.plot(steps, shown, zorder=2 + order, **thin)
        middle = _smooth(median(np.where(lost, np.inf, shown)))
        axes.plot(
            steps, middle, label=run.name, linewidth=2.4, zorder=5 + order, **style
        )
        first = np.unique(np.argmax(lost, axis=0)[lost.any(axis=0)])
        axes.plot(
            first,
            np.full(len(first), 0.96),
            linestyle="none",
            marker="X",
            markersize=9,
            color=style["color"],
            markeredgecolor="black",
            label="not finite from here on" if len(first) else None,
            transform=axes.get_xaxis_transform(),
            zorder=9,
        )


def _note(axes: Any, height: float, words: str) -> None:
    """Writes text above the right end of a horizontal line."""
    axes.annotate(
        words,
        xy=(1, height),
        xycoords=axes.get_yaxis_transform(),
        xytext=(-6, 5),
        textcoords="offset points",
        horizontalalignment="right",
        zorder=10,
        fontsize=11,
        bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.5},
    )


def _thresholds(axes: Any, runs: list[Run], progress: Progress, meaning: str) -> None:
    """Draws the thresholds of the methods; equal thresholds are drawn once."""
    drawn: list[np.ndarray] = []
    for run, record in reversed(list(zip(runs, progress.records, strict=True))):
        level = median(record["threshold"][: progress.step])
        if np.isinf(run.threshold) or any(np.array_equal(level, x) for x in drawn):
            continue
        drawn.append(level)
        style = "-" if len(drawn) == 1 else ":"
        axes.plot(level, color="black", linewidth=1.2, linestyle=style, zorder=9)
        words = f"threshold {run.threshold:g}"
        words += f" ({meaning})" if len(drawn) == 1 else f" ({run.name})"
        _note(axes, float(level[-1]), words)


def draw(
    path: Path, runs: list[Run], progress: Progress, entropy: float, meaning: str
) -> None:
    """Plots the runs and saves the figure as a PNG file.

    Args:
        path: Path of the PNG file.
        runs: The runs to plot.
        progress: The progress of the runs, including their metrics.
        entropy: Unigram entropy of the text, in nats.
        meaning: Description of the quantity that the threshold of optclip's clip
            bounds.
    """
    figure = Figure(figsize=(8, 7.6), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    losses, norms = figure.subplots(2, 1, sharex=True)

    _curves(losses, runs, progress, "loss")
    losses.axhline(entropy, color="black", linewidth=1.2, zorder=9)
    _note(losses, entropy, f"unigram entropy of the text: {entropy:.2f}")
    losses.set_yscale("log")
    losses.yaxis.set_major_locator(FixedLocator([1, 2, 3, 5, 10, 20, 50, 100]))
    losses.yaxis.set_major_formatter(ScalarFormatter())
    losses.yaxis.set_minor_formatter(NullFormatter())
    losses.set_ylabel("loss (nats per character)", fontsize=12)

    _curves(norms, runs, progress, "norm_before")
    norms.set_yscale("log")
    _thresholds(norms, runs, progress, meaning)
    norms.set_ylabel("gradient norm before the clip", fontsize=12)
    norms.set_xlabel("training step", fontsize=12)

    for axes in (losses, norms):
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    handles, labels = losses.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        title=f"thin: each seed; thick: their median, over {_WINDOW} steps",
        title_fontsize=10.5,
        alignment="left",
        loc="outside upper left",
        ncols=3,
        fontsize=10.5,
        columnspacing=1.4,
        frameon=False,
    )
    figure.savefig(path)
