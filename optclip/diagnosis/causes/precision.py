"""Parameters or sums in a dtype whose precision is too low."""

import math

from optclip.diagnosis._candidates import Candidate
from optclip.diagnosis._signals import LIMITS, Signals
from optclip.diagnosis.findings import Finding, Remedy

__all__ = ["precision"]

STORE = (
    "Keep the parameters and the optimizer state in float32, and cast them to the "
    "lower precision inside of the loss."
)
SUM = (
    "Compute sums over many terms, normalizations and the loss in float32: cast the "
    "operands with `x.astype(jnp.float32)`."
)


def _differs(s: Signals) -> str:
    """Describes how the program differs from the same in float32; "" if it doesn't."""
    pairs = (
        ("loss", s.first.loss, s.wide_loss),
        ("gradient's norm", s.norm, s.wide_norm),
    )
    for name, low, wide in pairs:
        if not (math.isfinite(low) and math.isfinite(wide)):
            continue
        if abs(low - wide) > LIMITS.imprecise * max(abs(wide), 1e-12):
            return (
                f"The {name} is {low:.3g} in this precision, and {wide:.3g} if the "
                "same program runs in float32."
            )
    return ""


def precision(s: Signals) -> Candidate | None:
    """Finds updates that are rounded away, and results that differ from float32."""
    if not s.low or not s.first.finite:
        return None
    if s.lost_updates > LIMITS.rounded:
        evidence = (
            f"{s.lost_updates:.0%} of the updates of parameters in "
            f"{' and '.join(s.low)} are too small to change them: they are rounded "
            "away."
        )
        remedy = Remedy("float32", advice=STORE)
    elif differs := _differs(s):
        evidence, remedy = differs, Remedy("float32", advice=SUM)
    else:
        return None
    finding = Finding("precision", (), evidence, (remedy,), "medium")
    return Candidate(finding, 1.0)
