"""Draws the report as one PNG and its panels as SVG, using Matplotlib."""

import contextlib
import html
import io
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from optclip.diagnosis._contents import Contents, Section
from optclip.diagnosis._panels import Panel, panels_of
from optclip.diagnosis.records import printable

__all__ = ["save_png", "svgs_of"]

_WIDTH, _DPI, _FONT = 10.0, 160, 12
# Height of a line of text in inches, and the number of characters that fit in it.
_LINE, _CHARACTERS = 0.235, 110
# Size of a separate panel, chosen so that its text is readable on a phone.
_ALONE = 6.2


@contextlib.contextmanager
def _own_style() -> Iterator[None]:
    """Draws independently of the user's settings, with reproducible bytes."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "font.size": _FONT,
                "axes.titlesize": _FONT,
                "axes.axisbelow": True,
                "svg.fonttype": "path",
                "svg.hashsalt": "optclip",
            }
        )
        yield


# --- text in the figure ---------------------------------------------------------------


def _wrapped(words: str, indent: int) -> list[str]:
    lines = textwrap.wrap(words.replace("`", ""), _CHARACTERS - indent) or [""]
    return [" " * indent + line for line in lines]


def _lines(section: Section) -> list[tuple[str, bool]]:
    """Returns the lines of a section as pairs (text, whether it is bold)."""
    found = [("", False), (section.heading, True)]
    for item in section.items:
        found += [(line, False) for line in _wrapped(item.lead, 0)]
        for label, words in item.rows:
            found += [(line, False) for line in _wrapped(f"{label}: {words}", 6)]
    return found


def _write(figure: Any, lines: list[tuple[str, bool]], inches: float) -> None:
    for number, (line, bold) in enumerate(lines):
        weight = "bold" if bold else "normal"
        height = 1 - (number + 0.7) * _LINE / inches
        figure.text(
            0.02,
            height,
            printable(line).replace("$", r"\$"),
            weight=weight,
            va="center",
        )


# --- the page -------------------------------------------------------------------------


def _rows(panels: list[Panel]) -> list[list[Panel]]:
    """Returns the panels by row: wide ones alone, others in pairs."""
    rows: list[list[Panel]] = []
    for panel in panels:
        joins = rows and len(rows[-1]) == 1 and not (panel.wide or rows[-1][0].wide)
        if joins:
            rows[-1].append(panel)
        else:
            rows.append([panel])
    return rows


def _place(panel: Panel, part: Any) -> None:
    part.suptitle(panel.title, weight="bold", x=0.02, ha="left", fontsize=_FONT)
    panel.draw(part)


def save_png(path: Path, contents: Contents) -> None:
    """Draws the whole report into one PNG file."""
    head = [(contents.title, True)]
    head += [(line, False) for line in _wrapped(contents.headline, 0)]
    foot = [line for section in contents.sections for line in _lines(section)]
    rows = _rows(panels_of(contents))
    heights = [len(head) * _LINE + 0.15, *(max(p.height for p in row) for row in rows)]
    heights.append(len(foot) * _LINE + 0.15)
    with _own_style():
        size = (_WIDTH, sum(heights))
        figure: Any = Figure(figsize=size, dpi=_DPI, layout="constrained")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(w_pad=0.09, h_pad=0.06)
        parts = figure.subfigures(len(heights), 1, height_ratios=heights)
        _write(parts[0], head, heights[0])
        for row, part in zip(rows, parts[1:-1], strict=True):
            places = part.subfigures(1, len(row), squeeze=False)
            for panel, place in zip(row, places[0], strict=True):
                _place(panel, place)
        _write(parts[-1], foot, heights[-1])
        figure.savefig(path, format="png", metadata={"Software": None})


# --- separate panels ------------------------------------------------------------------


def _inline(svg: str, prefix: str, says: str) -> str:
    """Returns an SVG for embedding, with unique ids and no external references."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    named = f'<svg role="img" aria-label="{html.escape(says)}"'
    return svg.replace("<svg", named, 1)


def _svg(panel: Panel) -> str:
    figure = Figure(figsize=(_ALONE, panel.height - 0.3), layout="constrained")
    FigureCanvasSVG(figure)
    panel.draw(figure)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def svgs_of(contents: Contents) -> list[tuple[str, str]]:
    """Returns the title and SVG element of each panel, for embedding in a page."""
    with _own_style():
        return [
            (panel.title, _inline(_svg(panel), f"p{number}-", panel.says))
            for number, panel in enumerate(panels_of(contents))
        ]
