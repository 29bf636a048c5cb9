"""The demo's figure: one panel per act."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, ScalarFormatter

from optclip.demo.acts import BAD, FINITE, NONE, OPTAX, RATE, Run, incidents
from optclip.demo.overflow import Overflow
from optclip.demo.table import final_losses, median
from optclip.demo.training import Progress

__all__ = ["draw"]

# Okabe and Ito's colors, which people with any kind of color vision can distinguish.
_STYLES = {
    NONE: {"color": "#D55E00", "linestyle": "-", "marker": "s"},
    OPTAX: {"color": "#56B4E9", "linestyle": "-", "marker": "o"},
    FINITE: {"color": "#0072B2", "linestyle": ":", "marker": "^"},
    "optclip": {"color": "#004D40", "linestyle": "-", "marker": "D"},
}
# Number of steps over which the curves are smoothed.
_WINDOW = 5
_LOST = {"marker": "X", "markersize": 10, "markeredgecolor": "black", "zorder": 9}


def _style(name: str) -> dict[str, Any]:
    return _STYLES.get(name, _STYLES["optclip"])


def _ours(runs: list[Run], act: str) -> str:
    """Returns the name of optclip's run in an act."""
    (name,) = [r.name for r in runs if r.act == act and r.name.startswith("optclip.")]
    return name


def _losses(axes: Any, entropy: float) -> None:
    axes.axhline(entropy, color="black", linewidth=1, linestyle=":")
    place = {"xycoords": axes.get_yaxis_transform(), "xytext": (0, 3)}
    how = {"textcoords": "offset points", "ha": "right", "fontsize": 9}
    axes.annotate("frequencies of characters alone", (1, entropy), **place, **how)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator([1, 1.5, 2, 3, 4, 5, 7, 10, 20, 50]))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("loss (nats per character, log scale)")


def _over_rates(axes: Any, runs: list[Run], progress: Progress, entropy: float) -> None:
    """Draws the loss at the end as a function of the learning rate."""
    for run, record in zip(runs, progress.records, strict=True):
        if run.act != RATE:
            continue
        losses = final_losses(run, record)
        middle = median(losses)
        shown = np.where(np.isfinite(middle), middle, np.nan)
        axes.plot(run.rates, shown, linewidth=2.2, markersize=6, **_style(run.name))
        lost = [r for r, x in zip(run.rates, middle, strict=True) if np.isinf(x)]
        _mark(axes, lost, _style(run.name)["color"])
    _losses(axes, entropy)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate of Adam")
    axes.set_title(f"1. Learning rates ({_ours(runs, RATE)})")


def _mark(axes: Any, places: Any, color: str, height: float = 0.95) -> None:
    """Marks where values are not finite, near the upper edge."""
    place = {"transform": axes.get_xaxis_transform(), "linestyle": "none"}
    axes.plot(places, [height] * len(places), color=color, **place, **_LOST)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Returns the running median over the steps, with non-finite medians as NaN."""
    padded = np.pad(values, _WINDOW // 2, mode="edge")
    smooth = np.median(np.lib.stride_tricks.sliding_window_view(padded, _WINDOW), -1)
    return np.where(np.isfinite(smooth), smooth, np.nan)


def _over_steps(axes: Any, runs: list[Run], progress: Progress, entropy: float) -> None:
    """Draws the loss over the steps, two of which have a bad batch."""
    height = 0.95
    for run, record in zip(runs, progress.records, strict=True):
        if run.act != BAD:
            continue
        middle = median(record["loss"].astype(np.float64))
        style = _style(run.name) | {"marker": None}
        axes.plot(_smooth(middle), linewidth=2.2, **style)
        if np.isinf(middle[-1]):
            first = int(np.argmax(np.isinf(middle)))
            _mark(axes, [first], _style(run.name)["color"], height)
            height -= 0.09
    _losses(axes, entropy)
    words = ("loss 1,000 times\ntoo large", "NaN")
    place = {"xycoords": axes.get_xaxis_transform(), "xytext": (4, 0)}
    for step, word in zip(incidents(progress.step), words, strict=True):
        axes.axvline(step, color="black", linewidth=1, linestyle="--", zorder=1)
        how = {"textcoords": "offset points", "va": "bottom", "fontsize": 10}
        axes.annotate(word, (step, 0.02), **place, **how)
    axes.set_xlabel("step")
    axes.set_title(f"2. Two bad batches ({_ours(runs, BAD)})")


def _over_norms(axes: Any, overflow: Overflow) -> None:
    """Draws the norm after a clip as a function of the norm before it."""
    dashes = {"float32": "-", "float16": "--"}
    for (package, dtype), after in overflow.after.items():
        before = overflow.before[dtype]
        name = OPTAX if package == "optax" else "optclip"
        style = _style(name) | {"linestyle": dashes[dtype], "marker": None}
        shown = np.where(np.isfinite(after), after, np.nan)
        axes.plot(before, shown, linewidth=2.2, **style)
        lost = np.flatnonzero(~np.isfinite(after))
        _mark(axes, before[lost[:1]], style["color"], 0.5)
    axes.set_xscale("log")
    axes.set_ylim(-0.06, 1.3)
    axes.set_xlabel("gradient norm (solid: float32, dashed: float16)")
    axes.set_ylabel("norm after clipping at 1")
    axes.set_title("3. Overflow (optclip.clip_by_global_norm)")
    how = {"textcoords": "offset points", "fontsize": 10, "xytext": (5, 0)}
    axes.annotate("256", (256, 0.5), **how)
    axes.annotate("1.8e19", (1.8e19, 0.5), **how)


def draw(
    path: Path,
    runs: list[Run],
    progress: Progress,
    overflow: Overflow,
    entropy: float,
) -> None:
    """Plots the three acts and saves the figure as a PNG file.

    Args:
        path: Path of the PNG file.
        runs: The runs to plot.
        progress: The progress of the runs, including their metrics.
        overflow: The norms of the third act.
        entropy: Unigram entropy of the text, in nats, drawn as a dotted line.
    """
    figure = Figure(figsize=(14, 4.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    first, second, third = figure.subplots(1, 3)
    _over_rates(first, runs, progress, entropy)
    _over_steps(second, runs, progress, entropy)
    _over_norms(third, overflow)
    for axes in (first, second, third):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    names = {
        NONE: NONE,
        f"{OPTAX}(1.0)": OPTAX,
        f"the same in {FINITE}": FINITE,
        "optclip, see the titles": "optclip",
    }
    lines = [first.plot([], [], linewidth=2.2, **_style(n))[0] for n in names.values()]
    lost = first.plot([], [], linestyle="none", color="white", **_LOST)
    how = {"loc": "outside upper center", "ncols": 5, "frameon": False}
    words = [*names, "not finite from here on"]
    figure.legend([*lines, *lost], words, fontsize=11, **how)
    figure.savefig(path)
