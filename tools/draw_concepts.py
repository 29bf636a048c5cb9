"""Draws the diagrams of `docs/concepts.md` and `docs/choosing.md`, which show no data.

Usage: python tools/draw_concepts.py
"""

import io
import pathlib

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from PIL import Image

FOLDER = pathlib.Path(__file__).parent.parent / "docs" / "_static" / "concepts"
# Okabe and Ito's colors, and light shades of them as text backgrounds.
BLUE, ORANGE, GREEN, GRAY = "#0072B2", "#D55E00", "#009E73", "#555555"
PALE = {BLUE: "#DCEBF5", ORANGE: "#FBE6DA", GREEN: "#DDF2EB", GRAY: "#EEEEEE"}
DPI = 150


def canvas(width, height):
    """Returns a figure of the given size in inches, and axes in the same unit."""
    figure = Figure(figsize=(width, height), dpi=DPI)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def box(axes, x, y, width, height, color, title, words="", size=13, mono=False):
    """Draws a box around its center, with a title and smaller text below it."""
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2), width, height,
            boxstyle="round,pad=0,rounding_size=0.1",
            facecolor=PALE[color], edgecolor=color, linewidth=1.6,
        )
    )  # fmt: skip
    family = "monospace" if mono else "sans-serif"
    up = 0.16 if words else 0
    how = {"ha": "center", "va": "center"}
    weight = "normal" if mono else "bold"
    axes.text(x, y + up, title, size=size, family=family, weight=weight, **how)
    if words:
        axes.text(x, y - 0.2, words, size=size - 2.5, color="#222222", **how)


def arrow(axes, start, end, words="", beside=(0, 0.14), color=GRAY):
    """Draws an arrow, with text next to its midpoint."""
    how = {"arrowstyle": "-|>", "color": color, "linewidth": 1.6, "shrinkA": 0}
    axes.annotate("", end, start, arrowprops={**how, "shrinkB": 0})
    if words:
        x, y = ((a + b) / 2 + d for a, b, d in zip(start, end, beside, strict=True))
        axes.text(x, y, words, size=11, color=color, ha="center", va="center")


def pipeline():
    """Draws the path of one update through clipping."""
    figure, axes = canvas(10, 3.9)
    top, low, width, height = 2.75, 0.75, 1.75, 0.95
    parts = [
        (1.95, "scope", "which entries\nshare a norm"),
        (4.35, "rule", "what is\ntoo large"),
        (6.75, "action", "what is done\nabout it"),
    ]
    for x, title, words in parts:
        box(axes, x, top, width, height, BLUE, "", "")
        axes.text(
            x, top + 0.25, title, size=14, weight="bold", ha="center", va="center"
        )
        axes.text(x, top - 0.17, words, size=10.5, ha="center", va="center")
    arrow(axes, (0.1, top), (1.07, top), "gradients", (-0.02, 0.2))
    arrow(axes, (2.83, top), (3.47, top), "norms", (0, 0.2))
    arrow(axes, (5.23, top), (5.87, top), "limits", (0, 0.2))
    arrow(axes, (7.63, top), (8.27, top), "scales", (0, 0.2))
    box(axes, 9.0, top, 1.45, height, GREEN, "updates", "to the optimizer", 13)
    box(
        axes,
        4.35,
        low,
        3.6,
        0.8,
        ORANGE,
        "state",
        "state of the rule, statistics of the step",
    )
    arrow(axes, (4.0, 1.15), (4.0, 2.27), "", color=ORANGE)
    arrow(axes, (4.7, 2.27), (4.7, 1.15), "", color=ORANGE)
    axes.text(3.87, 1.7, "reads", size=11, color=ORANGE, ha="right", va="center")
    axes.text(4.83, 1.7, "writes", size=11, color=ORANGE, ha="left", va="center")
    box(axes, 8.1, low, 3.0, 0.8, GRAY, "optclip.metrics(state)", "", 12, mono=True)
    arrow(axes, (6.15, low), (6.6, low))
    axes.text(0.1, 3.6, "One clipping transformation", size=14, weight="bold")
    return figure


QUESTIONS = [
    ("Does it explode in every run, from the start?", "optclip.diagnose(...)",
     "fix the cause, then continue"),
    ("Are there NaNs, or whole bad batches?", "skip_steps(optimizer)",
     "skip such steps; clip the others"),
    ("Are single examples wrong?", "clipped_grad(loss_fn, 1.0)",
     "bounds each example's influence"),
    ("Does one layer explode and slow the others?", "clip_by_leaf_norm(1.0), adagc()",
     "each leaf by its own norm"),
    ("Is the problem rare spikes in a long run?", "zclip(max_grad_norm=None)",
     "typical steps are not changed"),
    ("Are normalization layers left out on purpose?", "adaptive_grad_clip(0.01)",
     "relative to the weights"),
    ("Do you know which norm is too large?", "clip_by_global_norm(1.0)",
     "the common choice"),
]  # fmt: skip


def choosing():
    """Draws the decision chart: questions from top to bottom; the first yes decides."""
    step, left, right = 0.92, 2.65, 7.75
    height = step * (len(QUESTIONS) + 1) + 0.1
    figure, axes = canvas(10, height)
    y = height - 0.55
    for question, answer, words in QUESTIONS:
        box(axes, left, y, 4.9, 0.6, BLUE, question, size=11.5)
        box(axes, right, y, 4.2, 0.68, GREEN, answer, words, 12, mono=True)
        arrow(axes, (5.1, y), (5.65, y), "yes", (-0.02, 0.15))
        last = question == QUESTIONS[-1][0]
        end = y - step + (0.34 if last else 0.3)
        arrow(axes, (left, y - 0.3), (left, end), "no", (0.25, 0))
        y -= step
    box(
        axes,
        left,
        y,
        4.9,
        0.68,
        GREEN,
        "stabilize(optimizer)",
        "nothing to choose: it follows the norm",
        12,
        mono=True,
    )
    return figure


def save(figure, name):
    """Saves the figure with a small palette, which reduces the file size."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    picture = Image.open(buffer).convert("RGB").quantize(128)
    picture.save(FOLDER / f"{name}.png", optimize=True)


def main():
    for make in (pipeline, choosing):
        save(make(), make.__name__)


if __name__ == "__main__":
    main()
