"""The report of a diagnosis: findings with their evidence and remedies."""

import dataclasses
import math
import statistics
import textwrap
from collections.abc import Mapping
from typing import Any

from optclip.diagnosis._calibration import probability
from optclip.diagnosis.facts import HEADING, HistoryFact

__all__ = ["CAUSES", "Diagnosis", "Finding", "Remedy"]

# Maps each cause to its name in the report.
CAUSES = {
    "input_scale": "The inputs or targets are far from unit scale",
    "loss_scale": "A factor in the loss is too large",
    "initialization": "The weights are too large",
    "depth": "The signal grows from layer to layer",
    "recurrence": "The signal grows from step to step of a recurrence",
    "activation": "The activation magnifies the signal",
    "learning_rate": "The learning rate is too high",
    "warm_up": "The learning rate needs a warm-up",
    "update_cap": "The cap on the update holds training back",
    "bad_batch": "A few batches are unlike the others",
    "overflow": "Numbers leave the range of their dtype",
    "precision": "The precision of the dtype is too low",
    "loss_sum": "The loss sums over the batch",
    "vanishing": "The signal dies out from layer to layer",
    "uphill": "The updates point up the gradient",
    "not_finite": "Numbers are not finite",
    "unknown": "Training fails, and the cause is unknown",
}

# The least probability that is called "high", and "medium".
HIGH, MEDIUM = 0.9, 0.6


@dataclasses.dataclass(frozen=True)
class Remedy:
    """A single remedy, in words and in a form that a program can apply.

    Attributes:
        kind: "scale_weights" (multiply the leaves ``where`` by ``amount``),
            "scale_learning_rate" (by ``amount``), "scale_cap" (the ratio of
            `optclip.cap_update`, by ``amount``), "divide_loss" (by ``amount``),
            "divide_factor" (a factor in the loss, by ``amount``), "standardize" (the
            leaves ``where`` of each batch), "warm_up" (over ``amount`` steps),
            "drop_batches" (the indices in ``where``), "float32", "normalize",
            "residual", "gate", "change_activation", "clip" (by a global norm of
            ``amount``), or "advice" (for which there is no program).
        amount: The factor or norm, or None if the kind needs no number.
        where: Paths of leaves, or indices of batches as strings.
        advice: The remedy in words; "" if the report does not mention it.
        tried: What happened when it was tried on a copy of the model; "" if it was not
            tried.
    """

    kind: str
    amount: float | None = None
    where: tuple[str, ...] = ()
    advice: str = ""
    tried: str = ""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One cause of large or non-finite gradients.

    Attributes:
        cause: A key of `CAUSES`.
        where: Paths of parameter leaves in the order in which they are used, or a batch
            such as "batch 23", counted from 0.
        evidence: The measurements that support the finding.
        remedies: Suggested fixes, most important first. A fix that was tried and did
            not help is left out.
        severity: "high" if training can't continue, "medium" if training suffers, "low"
            if the finding is merely worth knowing.
        basis: "works" if the model fails to train, and trains with one of the remedies
            that were tried; "helps" if it trains better with one; "fails" if none of
            those that were tried helped; "measured" if none was tried; "eliminated" if
            only other causes were ruled out; "" if the cause is unknown.
    """

    cause: str
    where: tuple[str, ...]
    evidence: str
    remedies: tuple[Remedy, ...]
    severity: str
    basis: str = "measured"

    @property
    def probability(self) -> float:
        """How often findings with this basis were right on tested models.

        These are the models that the rules were developed on. NaN if the cause is
        unknown.
        """
        return probability(self.basis)

    @property
    def title(self) -> str:
        """The cause in words."""
        return CAUSES[self.cause]

    @property
    def confidence(self) -> str:
        """The probability in a word: "high", "medium" or "low"."""
        if self.probability >= HIGH:
            return "high"
        return "medium" if self.probability >= MEDIUM else "low"

    @property
    def headline(self) -> str:
        """The cause in words, with its severity and probability."""
        if self.cause == "unknown":
            return self.title
        return (
            f"{self.title} (severity: {self.severity}; probability: "
            f"{self.probability:.0%})"
        )

    @property
    def remedy(self) -> str:
        """The remedies in words."""
        return " ".join(words for _, words in self.advice())

    def advice(self) -> list[tuple[str, str]]:
        """Returns the remedies in words, each with the name of its row."""
        rows, names = [], iter(("remedy", *("or",) * len(self.remedies)))
        for remedy in self.remedies:
            if remedy.advice:
                rows.append((next(names), remedy.advice))
            if remedy.advice and remedy.tried:
                rows.append(("tried", remedy.tried))
        return rows

    def __str__(self) -> str:
        """Returns the finding as a few lines of text."""
        where = ", ".join(self.where[:4])
        if where[:1].isdigit():  # paths into a list are bare numbers
            where = f"leaves {where}"
        if len(self.where) > 4:
            where += f" and {len(self.where) - 4} more"
        rows = [("where", where), ("evidence", self.evidence), *self.advice()]
        lines = [self.headline]
        for name, words in rows:
            begin = f"  {name + ':':<10}"
            wrapped = textwrap.fill(
                words, 80, initial_indent=begin, subsequent_indent=" " * len(begin)
            )
            lines += [wrapped] if words else []
        return "\n".join(lines)


NOTHING = "nothing was found that makes the gradients explode."
# Describes judgments made without inspecting the program.
OUTSIDE = "from outside (gradients of the batches, losses, trial steps)"


def _share(signals: Mapping[str, Any]) -> str:
    """Describes how many uses of parameters were seen."""
    seen, total = signals["uses"]
    partly = signals.get("forward_uses", 0)
    more = f", and {partly} only in the forward pass" if partly else ""
    return f"{seen} of {total} uses of parameters were seen{more}"


def nothing_found(signals: Mapping[str, Any]) -> str:
    """Returns the headline of a report without findings.

    A model that could not be inspected is not called healthy.
    """
    uses = signals.get("uses", (1, 1))
    if uses is None:
        return (
            "Could not look inside the model: its program could not be read. "
            f"{OUTSIDE.capitalize()}, {NOTHING}"
        )
    seen, total = uses
    if seen == total:
        return NOTHING.capitalize()
    words = _share(signals)
    if not (seen or signals.get("forward_uses")):
        return (
            f"Could not look inside the model: {words}. "
            f"{OUTSIDE.capitalize()}, {NOTHING}"
        )
    return (
        f"Could look inside only part of the model: {words}. In these, and {OUTSIDE}, "
        f"{NOTHING}"
    )


def largest_gradient(signals: Mapping[str, Any]) -> str:
    """Describes which parameter has the largest gradient; "" if unknown."""
    norms, steps = (
        signals.get(key, {}) for key in ("leaf_norms", "rehearsed_leaf_norms")
    )
    medians = {path: statistics.median(values) for path, values in norms.items()}
    known = {path: size for path, size in medians.items() if math.isfinite(size)}
    if not known:
        return ""
    most = max(known, key=lambda path: known[path])
    words = (
        f"The gradient is largest in {most}: its norm is {known[most]:.3g}, the median "
        f"of {len(norms[most])} batches"
    )
    if len(after := steps.get(most, ())) > 1:
        words += f", and {after[-1]:.3g} in the last of {len(after)} rehearsed steps"
    return textwrap.fill(f"{words}.", 80)


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """The result of `optclip.diagnose`.

    Attributes:
        findings: The causes, ordered by how much their remedy helps; empty if no
            problem was found.
        signals: The underlying measurements by name: scalars, tuples of numbers, and,
            under "sites", each `Site` of the program.
        not_seen: The parts that could not be inspected, with the reasons.
        history: What the logs of the run show; empty if no logs were given. These are
            facts, not causes.
    """

    findings: tuple[Finding, ...]
    signals: Mapping[str, Any]
    not_seen: tuple[str, ...] = ()
    history: tuple[HistoryFact, ...] = ()

    @property
    def healthy(self) -> bool:
        """Whether no problem was found."""
        return not self.findings

    def __str__(self) -> str:
        """Returns the report as text."""
        if self.healthy:
            head = textwrap.fill(nothing_found(self.signals), 80)
        else:
            numbered = enumerate(self.findings, 1)
            head = "\n\n".join(f"{n}. {finding}" for n, finding in numbered)
            if len(self.findings) > 1:
                head += "\n\nApply the first remedy and diagnose again: "
                head += "the others may not be needed."
        if self.history:
            head += "\n\n" + "\n".join([f"{HEADING}:", *map(str, self.history)])
        notes = [f"Not seen: {words}." for words in self.not_seen]
        if self.signals.get("uses"):
            seen, total = self.signals["uses"]
            batches = len(self.signals["batch_norms"])
            looked = f"{batches} batches and {seen} of {total} uses of parameters"
            partly = self.signals.get("forward_uses")
            looked += f" ({partly} only in the forward pass)" if partly else ""
            outside = [] if seen == total else [largest_gradient(self.signals)]
            notes = [f"Looked at {looked}.", *filter(None, outside), *notes]
        return "\n\n".join([head, "\n".join(notes)]) if notes else head
