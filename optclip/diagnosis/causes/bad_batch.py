"""A few batches whose gradients are unlike those of the others."""

import math

import numpy as np

from optclip.diagnosis._candidates import Candidate, lowered
from optclip.diagnosis._signals import Signals
from optclip.diagnosis.causes.not_finite import operation
from optclip.diagnosis.findings import Finding, Remedy

__all__ = ["bad_batch"]


def bad_batch(s: Signals) -> Candidate | None:
    """Finds batches that are not finite, or whose norm is far above the median."""
    if not s.outliers or not s.first.finite:
        return None
    bad = [s.batches[i] for i in s.outliers]
    broken = sum(not b.finite for b in bad)
    largest = max((b.norm for b in bad if b.finite), default=math.inf)
    words = [f"{broken} not finite"] if broken else []
    if broken < len(bad):
        words.append(f"norms up to {largest:.3g}")
    bound = float(np.median([b.norm for b in s.batches if b.finite]))
    numbers = tuple(str(i) for i in s.outliers)
    drop = (
        "Look at these batches, and drop or fix them. `optclip.skip_steps` leaves such "
        f"steps out; a clip at {bound:.3g} bounds those that are finite."
    )
    finding = Finding(
        "bad_batch",
        tuple(f"batch {i}" for i in numbers),
        f"{len(bad)} of {len(s.batches)} batches: {', '.join(words)}, where the median "
        f"of all is {bound:.3g}.{operation(s) if broken else ''}",
        (Remedy("drop_batches", None, numbers, drop), Remedy("clip", bound)),
        "high" if broken else "medium",
    )
    return Candidate(finding, lowered(largest, s.norm))
