"""Training that fails for none of the known causes."""

import math

from optclip.diagnosis._rehearsals import Rehearsal, Run
from optclip.diagnosis._signals import Signals
from optclip.diagnosis.findings import Finding, Remedy

__all__ = ["unknown"]

ADVICE = (
    "Look at these facts, at the batches and at the loss function. If it helps, a clip "
    "such as `optclip.stabilize` bounds the steps meanwhile."
)


def _end(run: Run) -> str:
    return f"{run.end:.3g}" if math.isfinite(run.end) else "a value that is not finite"


def unknown(s: Signals) -> Finding | None:
    """Describes a rehearsal that fails, whichever part of the learning rate is used."""
    if not s.rehearsals:
        return None
    runs = [Run(s.starts, s.rehearsals[1.0])]
    if s.repeats:
        runs.append(Run(s.repeat_starts, s.repeats[1.0]))
    if not Rehearsal(tuple(runs), s.empty_loss).fails:
        return None
    start = runs[0].start
    parts = {p: Run(s.starts, losses) for p, losses in s.rehearsals.items()}
    ends = ", ".join(
        f"to {_end(run)} with {p:g} of it" for p, run in parts.items() if p < 1
    )
    evidence = (
        f"In a rehearsal of {len(s.starts)} steps the loss goes from {start:.3g} to "
        f"{_end(runs[0])} at the learning rate of the run, {ends}. The gradient's norm "
        f"is {s.norm:.3g}, the median of {len(s.batches)} batches."
    )
    remedies = (Remedy("advice", advice=ADVICE),)
    return Finding("unknown", (), evidence, remedies, "high", "")
