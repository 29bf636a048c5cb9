"""An activation that magnifies the signal."""

import math

from optclip.diagnosis._candidates import Candidate, lowered
from optclip.diagnosis._growth import Layer
from optclip.diagnosis._signals import LIMITS, Signals
from optclip.diagnosis.findings import Finding, Remedy

__all__ = ["activation"]


def _gain(pair: tuple[Layer, float, float]) -> float:
    return max([x for x in pair[1:] if math.isfinite(x)], default=0.0)


def _explained(s: Signals, strong: list[tuple[Layer, float, float]]) -> bool:
    """Whether the activations account for a substantial part of the growth."""
    share = sum(math.log10(_gain(pair)) for pair in strong)
    return share >= 0.4 * max(s.growing, LIMITS.drop)


# Operations whose result is not finite for an argument outside of their domain, however
# small the signal is.
DOMAIN = {"acos", "asin", "atanh", "log", "log1p", "rsqrt", "sqrt"}
# The derivative of a loss below this does not overflow by growth alone.
MODERATE = 1e6


def _outside_domain(s: Signals) -> bool:
    """Whether numbers are not finite because of an operation, not because of growth."""
    if s.first.finite or s.origin is None:
        return False
    moderate = s.origin.backward and abs(s.first.loss) < MODERATE
    return moderate or s.origin.primitive in DOMAIN


def activation(s: Signals) -> Candidate | None:
    """Finds activations with a large gain, without which the gradient is smaller."""
    strong = [pair for pair in s.gains if _gain(pair) > LIMITS.activation]
    drop = lowered(s.norm, s.relu_norm)
    if not s.gains or drop < LIMITS.drop or _outside_domain(s):
        return None
    if s.first.finite and not (strong and _explained(s, strong)):
        return None
    strong = strong or s.gains
    layers = [layer for layer, _, _ in strong]
    names = sorted({str(layer.activation) for layer in layers})
    most = max(map(_gain, strong))
    change = (
        "Use an activation that does not grow faster than its input: relu, gelu, tanh."
    )
    finding = Finding(
        "activation",
        tuple(dict.fromkeys(layer.leaf for layer in layers)),
        f"The functions before these layers ({', '.join(names)}) make the signal up to "
        f"{most:.3g} times as large. With relu in their place the gradient's norm is "
        f"{s.relu_norm:.3g}, not {s.norm:.3g}.",
        (
            Remedy("change_activation", advice=change),
            Remedy("normalize", advice="Normalize the input of the activation."),
            Remedy("clip", 1.0),
        ),
        "high" if drop > 2 else "medium",
    )
    return Candidate(finding, drop)
