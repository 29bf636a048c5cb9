"""Writes the report of a run as one PNG and one HTML page."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optclip._engine import validation
from optclip.diagnosis._contents import Contents, Item, Section, contents_of
from optclip.diagnosis.findings import Diagnosis
from optclip.diagnosis.records import Run, printable, read_run
from optclip.diagnosis.summary import pick
from optclip.telemetry import NonfiniteLeaf

__all__ = ["write_report"]

_STYLE = """
body { margin: 0 auto; max-width: 46rem; padding: 1rem; background: #fff;
  color: #1a1a1a; font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.3rem; margin: 0; }
h2 { font-size: 1.05rem; margin: 2rem 0 0.3rem; }
.headline { font-size: 1.15rem; margin: 0.3rem 0 0; }
svg { display: block; width: 100%; height: auto; }
section p { margin: 0.8rem 0 0; }
.lead { font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.1rem 0.8rem;
  margin: 0.2rem 0 0; }
dt { color: #555; }
dd { margin: 0; }
footer { margin-top: 2.5rem; color: #555; font-size: 0.9rem; }
@media (max-width: 30rem) { dl { display: block; } dt { margin-top: 0.4rem; } }
"""


def _text(text: str) -> str:
    """Returns text escaped for HTML."""
    return html.escape(printable(text))


def _words(text: str) -> str:
    """Returns text escaped for HTML; text in backticks becomes code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", _text(text))


def _item(item: Item) -> str:
    if not item.rows:
        return f"<p>{_words(item.lead)}</p>"
    rows = "".join(
        f"<dt>{_words(label)}</dt><dd>{_words(words)}</dd>"
        for label, words in item.rows
    )
    return f'<p class="lead">{_words(item.lead)}</p><dl>{rows}</dl>'


def _section(section: Section) -> str:
    items = "\n".join(_item(item) for item in section.items)
    return f"<section><h2>{_text(section.heading)}</h2>\n{items}</section>"


def _panel(title: str, svg: str) -> str:
    return f"<section><h2>{_text(title)}</h2>\n{svg}</section>"


def _page(contents: Contents, svgs: Sequence[tuple[str, str]]) -> str:
    """Returns the page as well-formed, self-contained HTML."""
    title = _text(contents.title)
    parts = [_panel(*named) for named in svgs]
    parts += [_section(section) for section in contents.sections]
    body = "\n".join(parts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<p class="headline">{_words(contents.headline)}</p>
{body}
<footer>Made by optclip.</footer>
</body>
</html>
"""


def _folder(output: Any) -> Path:
    if not isinstance(output, (str, Path)) or not str(output):
        raise TypeError(f"`output` must be a folder, got {output!r}.")
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"`output` {output} cannot be written to ({error.strerror}). Name another "
            "folder."
        ) from error
    return Path(output)


def _pictures() -> Any:
    try:
        from optclip.diagnosis import pictures
    except ImportError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        raise ImportError(
            "The report needs matplotlib, not installed here. Run: "
            'pip install "optclip[report]"',
            name="matplotlib",
        ) from error
    return pictures


def write_report(
    run_or_metrics: Any,
    *,
    diagnosis: Diagnosis | None = None,
    nonfinite_leaves: Sequence[NonfiniteLeaf] | None = None,
    output: str | Path,
) -> tuple[Path, Path]:
    """Writes a report of a run as ``report.png`` and ``report.html``.

    The report plots the gradient norm over the steps, with the threshold and the steps
    that were clipped, skipped or not finite, and the distribution of the norms. It also
    suggests a threshold. It says what the run shows: spikes, growth, non-finite steps,
    and which step to go back to. If a diagnosis is given, it adds the backward signal
    by depth and the findings. Parts without data are omitted. The page is a single
    self-contained file without scripts.

    | run                    | the report                                       |
    | ---------------------- | ------------------------------------------------ |
    | diverged               | the threshold uses only the steps before that    |
    | fewer than ten norms   | no distribution, and no threshold                |
    | no finite norm         | no plot of the norms; the headline says so       |
    | several names or seeds | the first that diverged, else with a bad step    |

    Args:
        run_or_metrics: A run's folder or log; a mapping of arrays or a list of dicts
            with the keys of `optclip.metrics`, optionally with "step" and "loss"; an
            array of gradient norms; or a `Run`.
        diagnosis: The result of `diagnose`.
        nonfinite_leaves: The result of `optclip.nonfinite_leaves`.
        output: Folder to write to. It is created if needed, and any existing report in
            it is replaced.

    Returns:
        The paths of the two files.

    Raises:
        ImportError: If matplotlib is missing.
        TypeError: If an argument is of the wrong type.
        ValueError: If there is no run, or if ``output`` can't be written to.

    Example:
        >>> import tempfile, optclip
        >>> metrics = {"norm_before": [1.0, 3.0, 1.5], "threshold": [2.0, 2.0, 2.0]}
        >>> folder = tempfile.mkdtemp()
        >>> png, page = optclip.diagnosis.write_report(metrics, output=folder)
        >>> png.name, page.name
        ('report.png', 'report.html')
    """
    if diagnosis is not None:
        validation.instance("diagnosis", diagnosis, Diagnosis, "of `optclip.diagnose`")
    if isinstance(run_or_metrics, Run):
        run = run_or_metrics
    else:
        run = pick(read_run(run_or_metrics))
    pictures = _pictures()
    folder = _folder(output)
    contents = contents_of(run, diagnosis, nonfinite_leaves)
    png, page = folder / "report.png", folder / "report.html"
    text = _page(contents, pictures.svgs_of(contents))
    # Moved into place atomically, to avoid partial files and writes through symlinks.
    drawn, written = folder / "report.png.new", folder / "report.html.new"
    pictures.save_png(drawn, contents)
    written.write_text(text, encoding="utf-8")
    drawn.replace(png)
    written.replace(page)
    return png, page
