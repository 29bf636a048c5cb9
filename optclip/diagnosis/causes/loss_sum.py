"""A loss that sums over the examples of a batch."""

import math

from optclip.diagnosis._candidates import Candidate
from optclip.diagnosis._signals import LIMITS, Signals
from optclip.diagnosis.findings import Finding, Remedy

__all__ = ["loss_sum"]

DIVIDE = (
    "Divide the loss by the number of examples, or of examples and positions, "
    "{} in a batch, so that the gradient does not grow with it."
)
PAIRS = "Divide the loss by the number of pairs of examples, {} in a batch."


def loss_sum(s: Signals) -> Candidate | None:
    """Finds a loss that is twice as large for twice as many examples, or four times."""
    pairs = LIMITS.fourfold[0] < s.halves < LIMITS.fourfold[1]
    if pairs:
        sizes, divide = [s.size * (s.size - 1)], PAIRS
    elif LIMITS.twice[0] < s.halves < LIMITS.twice[1]:
        sizes, divide = [s.size], DIVIDE
        sizes += [s.size * s.perhaps] if s.perhaps > 1 else []
    else:
        return None
    finding = Finding(
        "loss_sum",
        (),
        f"The loss of a batch is {s.halves:.3g} times the mean loss of its halves; a "
        "mean would give 1.",
        tuple(Remedy("divide_loss", float(n), advice=divide.format(n)) for n in sizes),
        "medium",
    )
    return Candidate(finding, math.log10(max(s.size, 1)), suspected=pairs)
