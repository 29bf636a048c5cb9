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
    # Seen with weights of typical size, if large ones make all batches alike.
    batches = s.evened or s.batches
    bad = [batches[i] for i in s.outliers]
    broken = sum(not b.finite for b in bad)
    largest = max((b.norm for b in bad if b.finite), default=math.inf)
    large = len(bad) - broken
    words = [f"{broken} {'are' if broken > 1 else 'is'} not finite"] if broken else []
    if large:
        of = "have norms of up to" if large > 1 else "has a norm of"
        words.append(f"{large} {of} {largest:.3g}")
    bound = float(np.median([b.norm for b in batches if b.finite]))
    numbers = tuple(str(i) for i in s.outliers)
    drop = (
        "Look at these batches, and drop or fix them. `optclip.skip_steps` leaves such "
        f"steps out; a clip at {bound:.3g} bounds those that are finite."
    )
    evened = " (with weights of a typical size)" if s.evened else ""
    finding = Finding(
        "bad_batch",
        tuple(f"batch {i}" for i in numbers),
        f"Of {len(batches)} batches, {' and '.join(words)}; the median norm{evened} "
        f"is {bound:.3g}.{operation(s) if broken else ''}",
        (Remedy("drop_batches", None, numbers, drop), Remedy("clip", bound)),
        "high" if broken else "medium",
    )
    return Candidate(finding, lowered(largest, batches[s.typical].norm))
