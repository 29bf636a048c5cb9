"""What a rule proposes: a cause, before its remedies are tried."""

import math
from typing import NamedTuple

from optclip.diagnosis.findings import Finding

__all__ = ["Candidate", "lowered"]


class Candidate(NamedTuple):
    """A cause that a rule proposes.

    Attributes:
        finding: The finding; its probability is estimated later.
        benefit: By how many decades the remedy lowers the norm of the gradient, or a
            comparable number; inf if nothing else can be judged before it is fixed.
        suspected: Whether the cause is only suspected: it is named only if one of its
            remedies, once tried, lets the model train.
    """

    finding: Finding
    benefit: float
    suspected: bool = False


def lowered(before: float, after: float) -> float:
    """Returns by how many decades the norm decreases; inf if it becomes finite."""
    if not math.isfinite(after):
        return 0.0
    if not math.isfinite(before):
        return math.inf
    return math.log10(max(before, 1e-30)) - math.log10(max(after, 1e-30))
