"""Whether a cap on the update, as in `optclip.stabilize`, holds training back."""

from __future__ import annotations

import math

import numpy as np

from optclip.diagnosis._candidates import Candidate
from optclip.diagnosis._limits import LIMITS
from optclip.diagnosis._signals import Signals, ended
from optclip.diagnosis.findings import Finding, Remedy

__all__ = ["update_cap"]


def update_cap(s: Signals) -> Candidate | None:
    """Finds a cap that divides all updates, though larger ones lower the loss more."""
    if not s.uncapped:
        return None
    start, end = float(np.mean(s.starts[-4:])), ended(s.rehearsals[1.0])
    larger, part = min((ended(losses), part) for part, losses in s.uncapped.items())
    # Both runs begin with the same parameters and use the same batches.
    gained, more = start - end, start - larger
    if not more > max(LIMITS.faster * gained, LIMITS.progress * abs(start)):
        return None
    scale = (
        f"Multiply `max_ratio` of `optclip.stabilize`, or `ratio` of "
        f"`optclip.cap_update`, by about {part:.2g}. If parameters start at zero, or "
        "far below their final size, raise `floor` instead."
    )
    finding = Finding(
        "update_cap",
        (),
        f"On average, the update is {s.excess:.3g} times its cap, and updates are "
        f"divided by this ratio. In a rehearsal of {len(s.uncapped[part])} steps the "
        f"loss goes from {start:.3g} to {end:.3g}; with updates {part:.3g} times as "
        f"large, to {larger:.3g}.",
        (Remedy("scale_cap", part, advice=scale),),
        "medium",
    )
    relative = (more - gained) / max(abs(start), 1e-12)
    return Candidate(finding, min(math.log10(1 + relative), 0.9))
