"""The text of the report, shared by the PNG and the HTML page."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from optclip.diagnosis._history_facts import facts_of
from optclip.diagnosis._timeline import timeline_of_run
from optclip.diagnosis.facts import HEADING, HistoryFact
from optclip.diagnosis.findings import Diagnosis, Finding, nothing_found
from optclip.diagnosis.records import Run
from optclip.diagnosis.summary import diverged_at, headline
from optclip.diagnosis.thresholds import (
    FEWEST,
    Suggestion,
    factor_of,
    suggest_threshold,
)
from optclip.telemetry import NonfiniteLeaf

__all__ = ["Contents", "Item", "Section", "contents_of", "facts_shown", "suggestion_of"]

# Lists longer than this are summarized by a count.
_NAMED, _MOST_LEAVES = 6, 8


@dataclasses.dataclass(frozen=True)
class Item:
    """A line of text followed by rows of (label, text)."""

    lead: str
    rows: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading followed by items."""

    heading: str
    items: tuple[Item, ...]


@dataclasses.dataclass(frozen=True)
class Contents:
    """Everything that the page shows.

    Attributes:
        title: The name of the run.
        headline: A one-sentence summary of the run.
        run: The recorded run to plot.
        sites: The `Site`s of the diagnosis; empty if there is no diagnosis.
        sections: The text below the plots.
        suggestion: The suggested threshold.
    """

    title: str
    headline: str
    run: Run
    sites: tuple[Any, ...]
    sections: tuple[Section, ...]
    suggestion: Suggestion


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    shown = ", ".join(names[:_NAMED])
    return f"{shown} and {more} more" if more > 0 else shown


def _finding(number: int, finding: Finding) -> Item:
    rows = (
        ("Where", _listed(finding.where)),
        ("Evidence", finding.evidence),
        *((name.capitalize(), words) for name, words in finding.advice()),
    )
    lead = f"{number}. {finding.headline}"
    return Item(lead, tuple(row for row in rows if row[1]))


def _findings(diagnosis: Diagnosis) -> Section:
    numbered = enumerate(diagnosis.findings, 1)
    items = [_finding(number, finding) for number, finding in numbered]
    if not items:
        items = [Item(nothing_found(diagnosis.signals))]
    items += [Item(f"Not seen: {words}") for words in diagnosis.not_seen]
    return Section("Diagnosis", tuple(items))


def facts_shown(run: Run, diagnosis: Diagnosis | None) -> tuple[HistoryFact, ...]:
    """Returns what the logs show; of the run itself, only if anything stands out."""
    if diagnosis is not None and diagnosis.history:
        return diagnosis.history
    facts = facts_of(timeline_of_run(run))
    return () if facts[0].kind == "steady" else facts


def _history(facts: Sequence[HistoryFact]) -> Section:
    items = [Item(fact.title, (("Logs", fact.evidence),)) for fact in facts]
    return Section(HEADING, tuple(items))


def _figure(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "not finite"


def _nonfinite_leaf(leaf: NonfiniteLeaf) -> Item:
    kinds = (
        (leaf.nan, "NaN"),
        (leaf.pos_inf, "+inf"),
        (leaf.neg_inf, "-inf"),
    )
    held = ", ".join(kind for present, kind in kinds if present)
    words = [f"held {held}"] if held else []
    if leaf.norm is not None:
        words.append(f"gradient norm {_figure(leaf.norm)}")
    if leaf.loss:  # 0 if no loss was given
        words.append(f"loss {_figure(leaf.loss)}")
    lead = "the loss" if leaf.path is None else leaf.path
    return Item(lead, ((f"Step {leaf.step}", "; ".join(words)),))


def _nonfinite_section(nonfinite_leaves: Sequence[NonfiniteLeaf]) -> Section:
    items = [_nonfinite_leaf(leaf) for leaf in nonfinite_leaves[:_MOST_LEAVES]]
    more = len(nonfinite_leaves) - _MOST_LEAVES
    items += [Item(f"and {more} more")] if more > 0 else []
    heading = "Leaves that went bad, and when"
    return Section(heading, tuple(items))


def suggestion_of(run: Run, diagnosis: Diagnosis | None) -> Suggestion:
    """Suggests a threshold from the norms recorded before the run diverged."""
    place = diverged_at(run)
    if not place:
        return suggest_threshold(run.norms, diagnosis=diagnosis)
    found = suggest_threshold(run.norms[:place], diagnosis=diagnosis)
    note = f"Only steps before it diverged, at step {run.steps[place]}, count."
    if found.declined is None:
        return dataclasses.replace(found, warnings=(note, *found.warnings))
    if found.samples >= FEWEST:
        return found
    return dataclasses.replace(found, declined=f"{found.declined} {note}")


def _advice(suggestion: Suggestion) -> Section:
    if suggestion.max_norm is None:
        lead = f"No threshold is suggested: {suggestion.declined}"
        return Section("Threshold", (Item(lead),))
    used = suggestion.samples - suggestion.outliers - suggestion.nonfinite
    factor = factor_of(suggestion.spread or 0.0)
    why = (
        f"It is the median of {used:,} norms, of which the middle 80% spread over a "
        f"factor of {factor}."
    )
    rows = [("Why", why), *(("Note", words) for words in suggestion.warnings)]
    lead = f"Clip at a gradient norm of {suggestion.max_norm:.3g}"
    return Section("Suggested threshold", (Item(lead, tuple(rows)),))


def contents_of(
    run: Run,
    diagnosis: Diagnosis | None,
    nonfinite_leaves: Sequence[NonfiniteLeaf] | None,
) -> Contents:
    """Returns the content of the report of a run."""
    suggestion = suggestion_of(run, diagnosis)
    sections = [] if diagnosis is None else [_findings(diagnosis)]
    if facts := facts_shown(run, diagnosis):
        sections.append(_history(facts))
    if nonfinite_leaves:
        sections.append(_nonfinite_section(nonfinite_leaves))
    sections.append(_advice(suggestion))
    sites = () if diagnosis is None else tuple(diagnosis.signals.get("sites", ()))
    return Contents(
        title=f"Gradient report: {run.title}" if run.title else "Gradient report",
        headline=headline(run),
        run=run,
        sites=sites,
        sections=tuple(sections),
        suggestion=suggestion,
    )
