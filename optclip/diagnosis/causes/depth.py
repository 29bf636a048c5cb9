"""A signal that grows from layer to layer."""

from optclip.diagnosis._candidates import Candidate
from optclip.diagnosis._signals import LIMITS, Signals
from optclip.diagnosis.findings import Finding, Remedy

__all__ = ["depth"]

NORMALIZE = (
    "Normalize each layer (layer or batch norm), add residual connections, or use "
    "fewer layers."
)


def depth(s: Signals) -> Candidate | None:
    """Finds growth over the layers."""
    if s.depth is None or not (s.growing > LIMITS.growth or s.by_depth):
        return None
    which = "backward" if s.depth.back >= s.depth.forward else "forward"
    clip = "Clip the gradient at 1, which bounds the steps meanwhile."
    finding = Finding(
        "depth",
        s.depth.leaves,
        f"The {which} signal grows by {10**s.growing:.3g} over {s.depth.count} layers, "
        f"x{s.depth.each:.3g} a layer.",
        (
            Remedy("residual"),
            Remedy("normalize", advice=NORMALIZE),
            Remedy("clip", 1.0, advice=clip),
        ),
        "high" if s.growing > 3 else "medium",
    )
    return Candidate(finding, s.growing)
