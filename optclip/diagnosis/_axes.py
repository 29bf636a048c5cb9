"""Axes, colors and the `Panel` type, shared by all parts of the report."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

__all__ = ["Panel", "drawable", "log_axis", "tidy"]

# Okabe and Ito's colors, which people with any type of color vision can tell apart.
BLUE, SKY, ORANGE = "#0072B2", "#56B4E9", "#E69F00"
VERMILION, PURPLE, GREEN = "#D55E00", "#CC79A7", "#009E73"

# Lines with more points than this are drawn without markers.
FEW = 60


class Panel(NamedTuple):
    """A plot of one quantity.

    Attributes:
        title: The title of the plot.
        says: A one-sentence description, used as alternative text.
        draw: A function that draws the plot into a figure or subfigure.
        wide: Whether the plot needs the full width of the page.
        height: Height in inches, for a page 10 inches wide.
    """

    title: str
    says: str
    draw: Callable[[Any], None]
    wide: bool
    height: float


def _power(value: float, _: Any = None) -> str:
    """Returns the label of a tick: a short number or a power of ten."""
    if value <= 0:
        return ""
    exponent = round(math.log10(value))
    if 1e-3 < value < 1e4 or abs(value / 10.0**exponent - 1) > 1e-6:
        return f"{value:.4g}"
    return f"$10^{{{exponent}}}$"


def log_axis(axis: Any, values: np.ndarray, least: float = 0.0) -> None:
    """Makes an axis logarithmic, with ticks that suit the range of the values.

    The axis spans at least ``least`` decades, so that nearly constant values look
    flat.
    """
    low, high = float(np.min(values)), float(np.max(values))
    if (lacking := 10 ** (least / 2) / math.sqrt(high / low)) > 1:
        low, high = low / lacking, high * lacking
    decades = math.log10(high) - math.log10(low)
    room = max(0.06 * decades, 0.03)
    powers = max(math.log10(low) - room, -300), min(math.log10(high) + room, 307)
    ends = tuple(10**power for power in powers)  # within the range of a float
    axis.axes.set(**{f"{axis.axis_name}lim": ends})
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})  # keeps the limits from changing
    if decades < 0.7:
        axis.set_major_locator(MaxNLocator(4))
    else:
        subs = (1.0, 2.0, 5.0) if decades < 2 else (1.0,)
        axis.set_major_locator(LogLocator(subs=subs, numticks=7))
    axis.set_major_formatter(FuncFormatter(_power))
    axis.set_minor_locator(NullLocator())


def tidy(axes: Any) -> None:
    """Adds a light grid to the axes and removes the box around them."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def drawable(values: np.ndarray) -> np.ndarray:
    """Replaces values that a logarithmic axis can't show by NaN."""
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)
