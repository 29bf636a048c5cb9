"""Training that fails for none of the known causes."""

import math

from optclip.diagnosis._rehearsals import Rehearsal, Run
from optclip.diagnosis._signals import Signals
from optclip.diagnosis.findings import Finding, Remedy

__all__ = ["unknown"]

ADVICE = (
    "Inspect the batches and the loss function. Meanwhile, a clip such as "
    "`optclip.stabilize` can limit the damage."
)
DERIVATIVE = (
    "Check that the gradient is the derivative of the loss, for example with "
    "`jax.test_util.check_grads(f, args, order=1, modes=['rev'])`. A custom derivative "
    "may be wrong, or the loss may change from call to call."
)


def _listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)


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
    parts = [part for part in s.rehearsals if part < 1]
    if len(parts) > 3:
        parts = [parts[0], parts[len(parts) // 2], parts[-1]]
    rates = _listed([f"{part:g}" for part in parts])
    ends = _listed([_end(Run(s.starts, s.rehearsals[part])) for part in parts])
    evidence = (
        f"In a rehearsal of {len(s.starts)} steps the loss goes from {start:.3g} to "
        f"{_end(runs[0])}. At {rates} times the learning rate, it ends at {ends}. The "
        f"gradient's norm is {s.norm:.3g}, the median of {len(s.batches)} batches."
    )
    remedies: tuple[Remedy, ...] = (Remedy("advice", advice=ADVICE),)
    if s.trust and max(s.trust.values()) < 0:
        evidence += (
            " The gradient predicts that the next step lowers the loss, but steps of "
            f"every size, down to {min(s.trust):g} of a full step, raise it."
        )
        remedies = (Remedy("advice", advice=DERIVATIVE), *remedies)
    return Finding("unknown", (), evidence, remedies, "high", "")
