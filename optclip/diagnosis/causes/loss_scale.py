"""A factor of the loss, or of one of its terms, that is too large."""

import math

from optclip.diagnosis._candidates import Candidate
from optclip.diagnosis._factors import Factor
from optclip.diagnosis._signals import LIMITS
from optclip.diagnosis.findings import Finding, Remedy

__all__ = ["loss_scale"]

EQUIVALENT = (
    "With this optimizer, a factor of the whole loss has the same effect as a learning "
    "rate that is higher by this factor."
)


def _by_line(factors: tuple[Factor, ...]) -> dict[str, Factor]:
    """Returns the largest factor of each line that has one above the limit."""
    found: dict[str, Factor] = {}
    for factor in factors:
        known = found.get(factor.line)
        if factor.size > LIMITS.factor and (known is None or factor.size > known.size):
            found[factor.line] = factor
    return found


def loss_scale(factors: tuple[Factor, ...], adaptive: bool) -> list[Candidate]:
    """Suspects each line of the loss that multiplies by a large factor."""
    return [_candidate(factor, adaptive) for factor in _by_line(factors).values()]


def _candidate(factor: Factor, adaptive: bool) -> Candidate:
    if factor.weights:
        advice = "Normalize these weights, for example by their mean, or bound them."
    else:
        advice = "Divide this factor by"
    amounts = [10.0, 100.0, 1000.0, factor.size]
    remedies = []
    for amount in amounts:
        if 1 < amount <= factor.size:
            words = advice if factor.weights else f"{advice} about {amount:.3g}."
            words += "" if adaptive else f" {EQUIVALENT}"
            remedies.append(Remedy("divide_factor", amount, (factor.line,), words))
    finding = Finding(
        "loss_scale",
        (f"line {factor.line}",) if factor.line else (),
        f"A part of the loss is multiplied by {factor}.",
        tuple(remedies),
        "high",
    )
    return Candidate(finding, math.log10(factor.size), suspected=True)
