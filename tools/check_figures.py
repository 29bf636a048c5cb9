"""Checks that every figure in the README and the docs comes from a committed result.

A figure is a number in prose with a decimal point, a percent sign, a unit, or of the
form "9 of 10". Below its paragraph, a comment names where it comes from:

    <!-- source: step_cost.md, device_cost.md -->  results, in benchmarks/results/
    <!-- source: code -->      the output of the page's code, which the tests run
    <!-- source: settings -->  arguments, defaults, definitions, arithmetic

Figures from results must be in one of these files, up to rounding, and the file must
name the machine. Numbers that are not measured are in backticks if they share a
paragraph with figures from results.

Usage: python tools/check_figures.py
"""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [
    ROOT / "README.md",
    *sorted(p for p in (ROOT / "docs").glob("*.md") if p.name != "changelog.md"),
]
UNITS = r"(?:MB|KB|GB|ms|seconds|minutes|times as|CPU seconds)"
FORMS = (r"\d[\d,]*\.\d+(?:e[+-]?\d+)?%?", r"\d+%", rf"\d[\d,]* {UNITS}", r"\d+ of \d+")
FIGURE = re.compile(rf"(?<![\w.,])(?:{'|'.join(FORMS)})")
SOURCE = re.compile(r"<!-- source: ([^>]*?) -->")
# Versions are not figures.
NAMES = "Python|JAX|Optax|optclip|Apache|version|Flax"
VERSION = re.compile(rf"({NAMES})[ -]\(?[\d.]+(\.\w+)?")
NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
MACHINE = re.compile(r"JAX \d")


def paragraphs(text):
    """Returns the paragraphs, list items and tables of a page, with their lines."""
    found, lines, begun, code = [], [], 1, False
    for number, line in enumerate([*text.splitlines(), ""], 1):
        fence = line.lstrip().startswith("```")
        code = code != fence
        item = re.match(r"\s*(?:[-*]|\d+\.) ", line)
        if (
            not line.strip() or item or code or fence or line.startswith("#")
        ) and lines:
            found.append((begun, "\n".join(lines)))
            lines = []
        if not (code or fence) and line.strip():
            begun = begun if lines else number
            lines.append(line)
    return found


def with_sources(text):
    """Returns (line, paragraph, sources); a comment alone belongs to what is above."""
    found = []
    for line, words in paragraphs(text):
        sources = [s.strip() for m in SOURCE.findall(words) for s in m.split(",")]
        words = SOURCE.sub("", words)
        if not words.strip() and found:
            found[-1][2].extend(sources)
        else:
            found.append((line, words, sources))
    return found


def figures(words):
    """Returns the figures in a paragraph, without code, links and versions."""
    words = re.sub(r"`[^`]*`|\]\([^)]*\)", " ", words)
    return FIGURE.findall(VERSION.sub(" ", words))


def values(text):
    """Returns the numbers in a text."""
    return [float(x.replace(",", "")) for x in NUMBER.findall(text)]


def is_in(figure, known):
    """Whether a number, rounded to the digits of the figure, is among those known."""
    if " of " in figure:
        return figure in known[1]
    (value, *_), digits = values(figure), figure.rstrip("%").partition(".")[2]
    places = len(re.match(r"\d*", digits)[0])
    scales = (1, 100) if figure.endswith("%") else (1,)
    half = 0.5 * 10**-places * (1 + 1e-6)
    return any(abs(value - x * k) <= half for x in known[0] for k in scales)


def problems(page):
    """Yields a message for each figure on a page without a source, or not in it."""
    name = page.relative_to(ROOT)
    for line, words, sources in with_sources(page.read_text(encoding="utf-8")):
        found = figures(words)
        if found and not sources:
            yield f"{name}:{line}: no source for {', '.join(found)}"
        files = [s for s in sources if s not in ("code", "settings")]
        texts = []
        for source in files:
            path = RESULTS / source
            if not path.is_file():
                yield f"{name}:{line}: there is no result {source}"
                continue
            texts.append(path.read_text(encoding="utf-8"))
            if not MACHINE.search(texts[-1]):
                yield f"{name}:{line}: {source} does not name its machine"
        whole = "\n".join(texts)
        known = values(whole), whole
        if files:
            for figure in found:
                if not is_in(figure, known):
                    yield f"{name}:{line}: {figure} is not in {', '.join(files)}"


def main():
    """Prints the problems, and returns the exit code."""
    found = [words for page in PAGES for words in problems(page)]
    print("\n".join(found) or f"All figures of {len(PAGES)} pages have a source.")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
