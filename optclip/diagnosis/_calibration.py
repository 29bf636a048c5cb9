"""How often a finding was right, by what is known about it."""

import math

__all__ = ["RIGHT", "probability"]

# By `Finding.basis`: how many first findings named the true cause, and of how many, on
# the models that the rules were developed on, before the last corrections of the rules.
# Counted by `benchmarks/diagnosis/calibrate.py`.
RIGHT = {
    "works": (47, 52),
    "helps": (11, 12),
    "measured": (45, 45),
    "fails": (0, 0),
    "eliminated": (0, 0),
}


def probability(basis: str) -> float:
    """Returns the probability that a finding is right.

    One right and one wrong finding are added to those counted, so that a few findings
    that are all right don't count as certain.
    """
    right, total = RIGHT.get(basis, (0, 0))
    return (right + 1) / (total + 2) if basis else math.nan
