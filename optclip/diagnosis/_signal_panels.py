"""Panels of the backward signal, by depth and over the steps of a recurrence."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from optclip.diagnosis._axes import (
    BLUE,
    FEW,
    GREEN,
    ORANGE,
    PURPLE,
    VERMILION,
    Panel,
    drawable,
    log_axis,
    tidy,
)
from optclip.diagnosis.records import printable

__all__ = ["signal_panels"]

_LINES = (BLUE, ORANGE, GREEN, PURPLE, VERMILION)

# More rows than this are drawn as a heat map, more columns than this are thinned, and
# more names than this are omitted.
_ROWS, _COLUMNS, _NAMES = len(_LINES), 96, 10


def _short(path: str) -> str:
    path = printable(path)
    return (path if len(path) <= 20 else "\u2026" + path[-19:]).replace("$", r"\$")


def _lost(axes: Any, places: np.ndarray) -> None:
    """Marks the positions at which the signal is not finite."""
    if places.size:
        axes.plot(
            places,
            np.full(len(places), 0.97),
            "X",
            color=VERMILION,
            markersize=8,
            clip_on=False,
            transform=axes.get_xaxis_transform(),
            label="not finite",
        )
        axes.legend(frameon=False)


def _draw_depth(sites: Sequence[Any], figure: Any) -> None:
    axes = figure.subplots()
    values = np.array([site.signal_out for site in sites], np.float64)
    places, shown = np.arange(len(sites)), drawable(values)
    marker = "o" if len(sites) <= FEW else None
    axes.plot(places, shown, color=BLUE, marker=marker, markersize=5)
    log_axis(axes.yaxis, shown[np.isfinite(shown)], least=1.5)
    _lost(axes, places[~np.isfinite(values)])
    tidy(axes)
    axes.set_ylabel("backward signal (norm)")
    if len(sites) <= _NAMES:
        names = [_short(site.leaf) for site in sites]
        turned = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(places, names, **(turned if len(sites) > 3 else {}))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("parameter, in order of use (first layer: 0)")


def _table(sites: Sequence[Any]) -> np.ndarray:
    """Returns the signal of each site and step; shorter scans are padded with NaN."""
    length = max(len(site.signal_out) for site in sites)
    table = np.full((len(sites), length), np.nan)
    for row, site in zip(table, sites, strict=True):
        row[: len(site.signal_out)] = site.signal_out
    return table


def _draw_heat(axes: Any, figure: Any, sites: Sequence[Any], table: np.ndarray) -> None:
    length = table.shape[1]
    starts = np.unique(np.linspace(0, length, _COLUMNS, endpoint=False).astype(int))
    logs = np.log10(np.fmax.reduceat(table, starts, axis=1))
    edges = np.append(starts, length) - 0.5
    mesh = axes.pcolormesh(
        edges,
        np.arange(len(sites) + 1) - 0.5,
        np.ma.masked_invalid(logs),
        cmap="viridis",
        edgecolors="face",  # avoids gaps in browsers
        linewidth=0.4,
    )
    axes.set_facecolor("white")
    bar = figure.colorbar(mesh, ax=axes)
    bar.set_label("backward signal, log10 of norm")
    bar.solids.set(rasterized=False, edgecolor="face")
    bar.locator = MaxNLocator(5, integer=True)
    bar.update_ticks()
    axes.set_ylabel("parameter, in order of use")
    names = [_short(site.leaf) for site in sites]
    if len(sites) <= 2 * _NAMES:
        axes.set_yticks(np.arange(len(sites)), names)
    axes.invert_yaxis()


def _draw_time(sites: Sequence[Any], figure: Any) -> None:
    axes = figure.subplots()
    table = drawable(_table(sites))
    axes.set_xlabel("step of the recurrence")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if len(sites) > _ROWS:
        _draw_heat(axes, figure, sites, table)
        return
    for row, site, color in zip(table, sites, _LINES, strict=False):
        marker = "o" if len(row) <= FEW // 2 else None
        style = {"color": color, "marker": marker, "markersize": 4}
        axes.plot(row, label=_short(site.leaf), **style)
    log_axis(axes.yaxis, table[np.isfinite(table)], least=1.5)
    axes.legend(frameon=False)
    axes.set_ylabel("backward signal (norm)")
    tidy(axes)


def _can_draw(signals: Sequence[Any]) -> bool:
    """Whether there are at least two numbers to join with a line."""
    flat = [np.ravel(np.asarray(x, np.float64)) for x in signals]
    values = np.concatenate([*flat, np.zeros(0)])
    return bool(np.sum(np.isfinite(drawable(values))) >= 2)


def signal_panels(every: Sequence[Any]) -> list[Panel]:
    """Returns the panels for which the `Site`s of a diagnosis contain data."""
    sites = [
        s
        for s in every
        if s.signal_out is not None and "signal_out" not in getattr(s, "unmeasured", ())
    ]
    sites = sorted(sites, key=lambda site: site.order)
    over_time = [s for s in sites if np.ndim(s.signal_out)]
    by_depth = [s for s in sites if not np.ndim(s.signal_out)]
    found = []
    if _can_draw([s.signal_out for s in by_depth]):
        says = "Norm of the backward signal at each parameter, in order of use."
        found.append(
            Panel(
                "Backward signal by depth",
                says,
                lambda figure: _draw_depth(by_depth, figure),
                False,
                3.7,
            )
        )
    if _can_draw([s.signal_out for s in over_time]):
        says = "Norm of the backward signal at each step of the recurrence."
        found.append(
            Panel(
                "Backward signal over the recurrence",
                says,
                lambda figure: _draw_time(over_time, figure),
                False,
                3.7,
            )
        )
    return found
