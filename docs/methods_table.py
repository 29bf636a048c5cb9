"""Makes the table of methods from their docstrings; `conf.py` runs it."""

import inspect
import re

import optclip

OTHERS = [
    "stabilize",
    "skip_steps",
    "clipped_grad",
    "u_clip",
    "spectral_clip",
    "scale_by_stable_adam",
]


def methods():
    """Returns the names of the clips that have a file in `optclip.methods`."""
    functions = inspect.getmembers(optclip, inspect.isfunction)
    own = [n for n, f in functions if f.__module__.startswith("optclip.methods.")]
    return [n for n in own if n in optclip.__all__ and n not in OTHERS]


def first_sentence(text):
    """Returns the first paragraph in one line, without the full stop."""
    return " ".join(text.split("\n\n")[0].split()).rstrip(".")


def source(text):
    """Returns author and year as a link, or what stands under Reference."""
    found = re.search(r"^Reference:\n((?:    .*\n?)+)", text, re.M)
    if not found:
        return ""
    words = " ".join(found[1].split())
    year = re.search(r"\b(?:19|20)\d\d\b", words)
    link = re.search(r"https?://[^\s,)]+", words)
    name = words.rstrip(".").split(",")[0] + (f" {year[0]}" if year else "")
    return f"[{name}]({link[0]})" if link else name


def rows():
    """Yields the lines of the table."""
    yield "| name | what it does | published |"
    yield "| --- | --- | --- |"
    for name in [*methods(), *OTHERS]:
        text = inspect.getdoc(getattr(optclip, name))
        link = f"{{py:func}}`~optclip.{name}`"
        yield f"| {link} | {first_sentence(text)} | {source(text)} |"


def write(folder):
    """Writes the table where `methods.md` includes it from."""
    folder.mkdir(exist_ok=True)
    text = "\n".join(rows()) + "\n"
    (folder / "methods.md").write_text(text, encoding="utf-8")
