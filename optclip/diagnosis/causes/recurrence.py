"""A signal that grows from step to step of a recurrence."""

from optclip.diagnosis._candidates import Candidate
from optclip.diagnosis._growth import Growth
from optclip.diagnosis._signals import LIMITS, Signals
from optclip.diagnosis.findings import Finding, Remedy

__all__ = ["in_program", "recurrence"]

GATE = (
    "Use a gated cell (LSTM or GRU), an orthogonal or identity initialization, or "
    "fewer steps at a time."
)
FACTORS = "Keep the factors of a linear recurrence (state-space layer) at or below 1."


def _bound(s: Signals) -> float:
    """Returns a clipping bound for a gradient whose own norm can't be trusted."""
    return 1.0 if not s.first.finite else float(min(1.0, s.norm))


def recurrence(s: Signals) -> Candidate | None:
    """Finds growth over the steps of a loop, or over the positions of an input."""
    return in_program(s) or _over_positions(s)


def in_program(s: Signals) -> Candidate | None:
    """Finds growth over the steps of a loop that the program shows."""
    time = s.time
    if time is None:
        return None
    grown = max(time.back, time.forward)
    if time.half < LIMITS.time_growth or grown < 2 * LIMITS.time_growth:
        return None
    which = "backward" if time.back >= time.forward else "forward"
    each = 10 ** (grown / (0.75 * time.count))
    factor = min((s.scaled.get(leaf, 1.0) for leaf in time.leaves), default=1.0)
    scale = ()
    if factor < 1:
        advice = f"Multiply the weights by about {factor:.2g}."
        scale = (Remedy("scale_weights", factor, time.leaves, advice),)
    bound = _bound(s)
    finding = Finding(
        "recurrence",
        time.leaves,
        f"The {which} signal grows by {10**grown:.3g} over {time.count} steps, "
        f"x{each:.3g} a step.",
        (
            *scale,
            Remedy("clip", bound, advice=f"Clip the gradient at {bound:.3g}."),
            Remedy("gate", advice=GATE),
            Remedy("normalize"),
        ),
        "high" if grown > 2 else "medium",
    )
    return Candidate(finding, grown)


def _over_positions(s: Signals) -> Candidate | None:
    """Finds a recurrence that the program does not show step by step."""
    seen = s.positions
    if seen is None or seen.back < LIMITS.position_growth:
        return None
    if seen.half < LIMITS.time_growth:
        return None
    return Candidate(_positions_finding(seen, _bound(s)), seen.back)


def _positions_finding(growth: Growth, bound: float) -> Finding:
    return Finding(
        "recurrence",
        growth.leaves,
        f"The derivative of the loss with respect to the inputs grows by "
        f"{10**growth.back:.3g} from the last quarter of {growth.count} positions to "
        f"the first, x{growth.each:.3g} a position.",
        (
            Remedy("clip", bound, advice=f"Clip the gradient at {bound:.3g}."),
            Remedy("advice", advice=FACTORS),
            Remedy("gate", advice=GATE),
            Remedy("normalize"),
        ),
        "high",
    )
