"""Inputs or targets that are far from unit scale."""

import math

from optclip.diagnosis._candidates import Candidate
from optclip.diagnosis._scales import Scale
from optclip.diagnosis._signals import LIMITS
from optclip.diagnosis.findings import Finding, Remedy

__all__ = ["input_scale"]

ADVICE = (
    "Subtract the mean of each column and divide by its standard deviation, both from "
    "the training data (divide pixels by 255). For targets, undo this after the model."
)


def input_scale(scales: tuple[Scale, ...]) -> Candidate | None:
    """Suspects leaves of the batches with a column that is far from unit scale."""
    large = [scale for scale in scales if scale.largest > LIMITS.unit]
    if not large:
        return None
    large.sort(key=lambda scale: -scale.largest)
    paths = tuple(scale.path for scale in large)
    words = [f"{x[0].upper()}{x[1:]}." for x in map(str, large[:2])]
    finding = Finding(
        "input_scale",
        tuple(path or "the batch" for path in paths),
        " ".join(words),
        (Remedy("standardize", None, paths, ADVICE),),
        "high",
    )
    return Candidate(finding, math.log10(large[0].largest), suspected=True)
