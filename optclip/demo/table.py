"""The demo's table of results."""

from typing import NamedTuple

import numpy as np

from optclip.demo.training import Progress, Run

__all__ = ["Summary", "median", "render", "summarize"]


class Summary(NamedTuple):
    """The outcome of a run.

    Attributes:
        name: Name of the run.
        losses: Final loss of each seed: the mean over the last tenth of the steps.
        diverged: Number of seeds whose final loss is above their initial loss or not
            finite.
        clipped: Fraction of the steps, over all seeds, in which anything was clipped.
    """

    name: str
    losses: np.ndarray
    diverged: int
    clipped: float


def median(values: np.ndarray) -> np.ndarray:
    """Returns the lower median over the last axis; non-finite values rank last."""
    ordered = np.sort(np.where(np.isfinite(values), values, np.inf), axis=-1)
    return ordered[..., (ordered.shape[-1] - 1) // 2]


def summarize(run: Run, record: dict[str, np.ndarray]) -> Summary:
    """Returns the outcome of a run."""
    loss = record["loss"].astype(np.float64)
    final = loss[-max(1, len(loss) // 10) :].mean(axis=0)
    final = np.where(np.isfinite(final), final, np.inf)
    diverged = int(np.sum(~(final <= loss[0])))
    return Summary(run.name, final, diverged, float(np.mean(record["clipped"] > 0)))


def _number(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else "not finite"


def render(runs: list[Run], progress: Progress, entropy: float) -> str:
    """Returns the table as text."""
    head = ("", "final loss", "of all seeds", "diverged", "clipped")
    unit = ("", "nats/char", "lowest to highest", "seeds", "steps")
    rows = [head, unit]
    for run, record in zip(runs, progress.records, strict=True):
        found = summarize(run, record)
        count = len(found.losses)
        span = f"{_number(found.losses.min())} to {_number(found.losses.max())}"
        share = "-" if np.isinf(run.threshold) else f"{found.clipped:.0%}"
        rows.append(
            (
                found.name,
                _number(float(median(found.losses))),
                span,
                f"{found.diverged}/{count} = {found.diverged / count:.0%}",
                share,
            )
        )
    rows.append(("unigram entropy of the text", _number(entropy), "", "", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [
            cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    rule = "-" * max(map(len, lines))
    return "\n".join([*lines[:2], rule, *lines[2:-1], rule, lines[-1]])
