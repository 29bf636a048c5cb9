"""How often a finding was right, by what is known about it."""

import math

__all__ = ["RIGHT", "probability"]

# By `Finding.basis`: how many first findings named the true cause, and of how many, on
# models that the rules had never seen. Counted by `benchmarks/diagnosis/calibrate.py`.
RIGHT = {
    "works": (18, 25),
    "helps": (6, 9),
    "measured": (22, 23),
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
