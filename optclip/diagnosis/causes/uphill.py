"""Updates that point up the gradient."""

import math

from optclip.diagnosis._candidates import Candidate
from optclip.diagnosis._signals import Signals
from optclip.diagnosis.findings import Finding, Remedy

__all__ = ["uphill"]

ADVICE = (
    "Check that the chain ends with a negative learning rate, as in `optax.sgd(0.1)` "
    "or `optax.scale(-0.1)`. A clip alone does not change the sign of the gradient, "
    "and neither does `optax.masked` for the leaves that it excludes."
)


def uphill(s: Signals) -> Candidate | None:
    """Finds a first step whose predicted change of the loss is positive."""
    # In a run that has started, momentum may point uphill for a step.
    if s.begun or not s.slope > 1e-5 * abs(s.first.loss):
        return None
    finding = Finding(
        "uphill",
        (),
        f"The gradient predicts that the next step raises the loss by {s.slope:.3g}. "
        "The updates of an optimizer are added to the parameters, so they must point "
        "down the gradient.",
        (Remedy("advice", advice=ADVICE),),
        "high",
    )
    return Candidate(finding, math.inf)
