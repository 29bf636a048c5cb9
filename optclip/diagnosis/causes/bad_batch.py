"""A few batches whose gradients are unlike those of the others."""

import math

import numpy as np

from optclip.diagnosis._candidates import Candidate, lowered
from optclip.diagnosis._signals import Signals
from optclip.diagnosis.causes.not_finite import cure, operation
from optclip.diagnosis.findings import Finding, Remedy

__all__ = ["bad_batch"]

DROP = (
    "Look at these batches, and drop or fix them. Meanwhile, `optclip.skip_steps` "
    "leaves such steps out."
)


def bad_batch(s: Signals) -> Candidate | None:
    """Finds batches that are not finite, or whose norm is far above the median."""
    if not s.outliers or not s.first.finite:
        return None
    # Seen with weights of typical size, if large ones make all batches alike.
    batches = s.evened or s.batches
    bad = [batches[i] for i in s.outliers]
    broken = sum(not b.finite for b in bad)
    largest = max((b.norm for b in bad if b.finite), default=math.inf)
    others = [b for i, b in enumerate(batches) if i not in s.outliers]
    bound = float(np.median([b.norm for b in others]))
    count, words, drop = len(batches), [], DROP
    if broken:
        verb = "have" if broken > 1 else "has"
        words.append(
            f"{broken} of {count} batches {verb} a loss or gradient that is not finite"
        )
    if large := len(bad) - broken:
        verb = "have norms of up to" if large > 1 else "has a norm of"
        words.append(f"{large} of {count} batches {verb} {largest:.3g}")
        drop += f" A clip at {bound:.3g} bounds those that are finite."
    operations = (Remedy("advice", advice=cure(s)),) if broken and s.origin else ()
    clip = Remedy("clip", bound)
    numbers = tuple(str(i) for i in s.outliers)
    evened = " (with weights of a typical size)" if s.evened else ""
    finding = Finding(
        "bad_batch",
        tuple(f"batch {i}" for i in numbers),
        f"{', and '.join(words)}; the median norm of the others{evened} is "
        f"{bound:.3g}.{operation(s) if broken else ''}",
        (Remedy("drop_batches", None, numbers, drop), *operations, clip),
        "high" if broken else "medium",
    )
    return Candidate(finding, lowered(largest, batches[s.typical].norm))
