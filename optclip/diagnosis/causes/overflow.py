"""Numbers that leave the range of float16."""

import math

import numpy as np

from optclip.diagnosis._candidates import Candidate
from optclip.diagnosis._signals import Signals
from optclip.diagnosis.findings import Finding, Remedy

__all__ = ["overflow"]

FORWARD = "Compute these layers in float32 or bfloat16, whose range is that of float32."
BACKWARD = "Lower the loss scale, or compute in float32 or bfloat16."


def overflow(s: Signals) -> Candidate | None:
    """Finds non-finite numbers that are finite if the program runs in float32."""
    broken = [b for b in s.batches if not b.finite]
    if not broken or "float16" not in s.low or not math.isfinite(s.wide_norm):
        return None
    sites = [x for x in broken[0].sites if x.dtype in ("float16", "bfloat16")]
    forward = [x for x in sites if not np.all(np.isfinite(x.rms_out))]
    measured = [x for x in sites[::-1] if "signal_out" not in x.unmeasured]
    backward = [x for x in measured if not np.all(np.isfinite(x.signal_out))]
    what = "forward" if forward or not backward else "backward"
    finding = Finding(
        "overflow",
        tuple(dict.fromkeys(x.leaf for x in forward or backward)),
        f"{len(broken)} of {len(s.batches)} batches are not finite: the {what} signal "
        f"leaves the range of float16 (65504). The same program in float32 has a "
        f"gradient of norm {s.wide_norm:.3g}.",
        (Remedy("float32", advice=FORWARD if what == "forward" else BACKWARD),),
        "high",
    )
    return Candidate(finding, math.inf)
