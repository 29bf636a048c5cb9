"""A signal that dies out from layer to layer."""

from optclip.diagnosis._candidates import Candidate
from optclip.diagnosis._signals import LIMITS, Signals
from optclip.diagnosis.findings import Finding, Remedy

__all__ = ["vanishing"]

ZERO = (
    "Look whether these weights are all 0, whether a relu is never above 0, or whether "
    "the loss is cut off by `jax.lax.stop_gradient`."
)
SMALL = (
    "Use He or Xavier initialization, an activation that does not saturate (relu, "
    "gelu), normalization or residual connections. A clip does not help."
)


def vanishing(s: Signals) -> Candidate | None:
    """Finds a signal that shrinks over the layers, or a gradient of zero."""
    if s.depth is None or not s.first.finite:
        return None
    if s.norm == 0:
        finding = Finding(
            "vanishing",
            s.depth.leaves,
            "The gradient is exactly 0, so no step changes anything.",
            (Remedy("normalize", advice=ZERO),),
            "high",
        )
        return Candidate(finding, LIMITS.shrink)
    if s.depth.back > -LIMITS.shrink:
        return None
    finding = Finding(
        "vanishing",
        s.depth.leaves[: max(len(s.depth.leaves) // 4, 1)],
        f"The backward signal shrinks by {10 ** abs(s.depth.back):.3g} over "
        f"{s.depth.count} layers, so the first hardly learn.",
        (
            Remedy("normalize", advice=SMALL),
            Remedy("residual"),
            Remedy("change_activation"),
        ),
        "medium",
    )
    return Candidate(finding, -s.depth.back)
