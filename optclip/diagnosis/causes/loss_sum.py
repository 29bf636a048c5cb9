"""A loss that sums over the examples of a batch."""

import math

from optclip.diagnosis._candidates import Candidate
from optclip.diagnosis._signals import LIMITS, Signals
from optclip.diagnosis.findings import Finding, Remedy

__all__ = ["loss_sum"]


def loss_sum(s: Signals) -> Candidate | None:
    """Finds a loss that is twice as large for twice as many examples."""
    if not LIMITS.twice[0] < s.halves < LIMITS.twice[1]:
        return None
    divide = (
        "Divide the loss by the number of examples, or of examples and positions, "
        f"{s.size} in a batch, so that the gradient does not grow with it."
    )
    finding = Finding(
        "loss_sum",
        (),
        f"The loss of a batch is {s.halves:.3g} times the mean loss of its halves; a "
        "mean would give 1.",
        (Remedy("divide_loss", float(s.size), advice=divide),),
        "medium",
    )
    return Candidate(finding, math.log10(max(s.size, 1)))
