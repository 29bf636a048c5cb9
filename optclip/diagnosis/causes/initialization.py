"""Weights that are too large."""

import math
import statistics

from optclip.diagnosis._candidates import Candidate, lowered
from optclip.diagnosis._signals import LIMITS, Signals
from optclip.diagnosis.causes.recurrence import in_program
from optclip.diagnosis.findings import Finding, Remedy

__all__ = ["initialization"]

AVERAGE = (
    "Average the inputs instead of adding them up, or divide by their number's root."
)


def _helps(s: Signals) -> bool:
    """Whether weights of a typical size lower the norm of the gradient enough."""
    trust = s.trust.get(1.0, math.nan)
    kept = trust < LIMITS.trust and s.scaled_trust > max(LIMITS.trust_after, 2 * trust)
    limit = LIMITS.mild_drop if kept else LIMITS.drop
    return lowered(s.norm, s.scaled_norm) > limit


def _recurrent(s: Signals) -> bool:
    """Whether a recurrence that grows uses these weights."""
    if s.time is None or not set(s.scaled) & set(s.time.leaves):
        return False
    return in_program(s) is not None


def _summed(s: Signals) -> dict[str, float]:
    """Returns, for each leaf whose inputs are sums, how many values they sum."""
    return {x.leaf: x.addends for x in s.layers if x.addends > 1 and x.leaf in s.scaled}


def _root(summed: dict[str, float], leaf: str) -> float:
    return math.sqrt(summed.get(leaf, 1.0))


def initialization(s: Signals) -> Candidate | None:
    """Finds weights above He initialization, without which the gradient is smaller."""
    if not s.scaled or not _helps(s) or s.learned or s.by_depth or _recurrent(s):
        return None
    largest = max(s.he[leaf] for leaf in s.scaled)
    if largest < LIMITS.weights:
        return None  # of a typical size; something else makes the signal grow
    factor = round(statistics.geometric_mean(s.scaled.values()), 4)
    leaves, summed = tuple(s.scaled), _summed(s)
    own = [leaf for leaf in leaves if s.he[leaf] > LIMITS.weights * _root(summed, leaf)]
    scale = (
        f"Multiply these weights by about {factor:.2g}: He initialization (variance 2 "
        "/ fan_in) for relu, Xavier initialization (2 / (fan_in + fan_out)) for tanh."
    )
    large = (
        f"The weights are up to {largest:.3g} times as large as with He initialization."
    )
    if summed:
        most = max(summed.values())
        large += (
            f" Each of their inputs is a sum of up to {most:.3g} values that nothing "
            "divides, which counts like so many more inputs."
        )
    finding = Finding(
        "initialization",
        leaves,
        f"{large} With weights of that size the gradient's norm is "
        f"{s.scaled_norm:.3g}, not {s.norm:.3g}.",
        (
            Remedy("scale_weights", factor, leaves, scale),
            *((Remedy("normalize", advice=AVERAGE),) if summed else ()),
            Remedy("normalize", advice="Normalize each layer."),
            Remedy("clip", 1.0),
        ),
        "high" if lowered(s.norm, s.scaled_norm) > 2 else "medium",
    )
    # A model may be meant to sum its inputs: then only what helps it is named.
    return Candidate(finding, lowered(s.norm, s.scaled_norm), suspected=not own)
