"""A fact about the history of a run, as `optclip.diagnose` reports it."""

import dataclasses
import textwrap

__all__ = ["FACTS", "HEADING", "HistoryFact"]

# The heading of the facts in a report.
HEADING = "What the run shows"

# Maps each kind of fact to its name in the report, in the order of the report.
FACTS = {
    "steady": "Nothing stands out",
    "divergence": "The run diverged",
    "spike": "A spike",
    "level_shift": "The norm moved to another level",
    "nan_after_growth": "A non-finite step after the norm had grown",
    "nan_without_warning": "A non-finite step without a warning",
    "growth": "The norm grew over many steps",
    "leading_leaf": "One leaf leads",
    "several_leaves": "Several leaves rise together",
    "clipping": "Nearly all steps were clipped",
    "skipping": "Steps were skipped",
    "checkpoint": "Where to go back to",
}


@dataclasses.dataclass(frozen=True)
class HistoryFact:
    """One thing that the logs of a run show.

    Attributes:
        kind: A key of `FACTS`.
        steps: The steps that the fact is about, as numbered in the logs: one step, or
            the first and the last. For a "checkpoint", the step to go back to, then
            the first and last step whose batches to use.
        leaf: The name of the leaf in the logs; None if the fact is not about one leaf.
        evidence: What the logs show, in one or two sentences.
    """

    kind: str
    steps: tuple[int, ...]
    leaf: str | None
    evidence: str

    @property
    def title(self) -> str:
        """The kind in words."""
        return FACTS[self.kind]

    def __str__(self) -> str:
        """Returns the fact as a few lines of text."""
        words = f"{self.title}. {self.evidence}"
        return textwrap.fill(words, 80, initial_indent="  ", subsequent_indent=" " * 4)
