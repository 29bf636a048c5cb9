"""Rules for a signal that grows from layer to layer or from step to step."""

import math
import statistics
from typing import NamedTuple

from optclip.diagnosis._growth import Layer
from optclip.diagnosis._positions import finding_over_positions
from optclip.diagnosis._signals import LIMITS, Signals
from optclip.diagnosis.findings import Finding, Remedy

__all__ = [
    "Candidate",
    "activation",
    "depth",
    "initialization",
    "lowered",
    "recurrence",
    "vanishing",
]


class Candidate(NamedTuple):
    """A finding, and the number of decades by which its remedy improves the norm."""

    finding: Finding
    benefit: float


def lowered(before: float, after: float) -> float:
    """Returns by how many decades the norm decreases; inf if it becomes finite."""
    if not math.isfinite(after):
        return 0.0
    if not math.isfinite(before):
        return math.inf
    return math.log10(max(before, 1e-30)) - math.log10(max(after, 1e-30))


def _paths(layers: list[Layer]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(x.leaf for x in layers))


def _growing(s: Signals) -> float:
    """Returns the number of decades by which a signal grows over the layers."""
    if s.depth is None:
        return 0.0
    return max(s.depth.back, s.depth.forward)


def activation(s: Signals) -> Candidate | None:
    def gain(pair: tuple[Layer, float, float]) -> float:
        return max([x for x in pair[1:] if math.isfinite(x)], default=0.0)

    strong = [pair for pair in s.gains if gain(pair) > LIMITS.activation]
    drop = lowered(s.norm, s.relu_norm)
    if not s.gains or drop < LIMITS.drop or (s.first.finite and not strong):
        return None
    strong = strong or s.gains
    if s.first.finite:
        # The gain of the activations must explain a substantial part of the growth.
        share = sum(math.log10(gain(pair)) for pair in strong)
        if share < 0.4 * max(_growing(s), LIMITS.drop):
            return None
    layers = [layer for layer, _, _ in strong]
    names = sorted({str(layer.activation) for layer in layers})
    most = max(map(gain, strong))
    finding = Finding(
        "activation",
        _paths(layers),
        f"The functions before these layers ({', '.join(names)}) make the signal up to "
        f"{most:.3g} times as large. With relu in their place the gradient's norm is "
        f"{s.relu_norm:.3g}, not {s.norm:.3g}.",
        "Use an activation that does not grow faster than its input: relu, gelu, tanh. "
        "Or normalize before it.",
        "high" if drop > 2 else "medium",
        "measured",
        (Remedy("change_activation"), Remedy("normalize"), Remedy("clip", 1.0)),
    )
    return Candidate(finding, drop)


def recurrence(s: Signals) -> Candidate | None:
    return _recurrence_in_program(s) or _recurrence_over_positions(s)


def _recurrence_over_positions(s: Signals) -> Candidate | None:
    """Finds a recurrence that the program does not show step by step."""
    seen = s.positions
    if seen is None or seen.back < LIMITS.position_growth:
        return None
    if seen.half < LIMITS.time_growth:
        return None
    return Candidate(finding_over_positions(seen, _clip_bound(s)), seen.back)


def _recurrence_in_program(s: Signals) -> Candidate | None:
    time = s.time
    if time is None:
        return None
    grown = max(time.back, time.forward)
    if time.half < LIMITS.time_growth or grown < 2 * LIMITS.time_growth:
        return None
    which = "backward" if time.back >= time.forward else "forward"
    each = 10 ** (grown / (0.75 * time.count))
    bound = _clip_bound(s)
    factor = min((s.scaled.get(leaf, 1.0) for leaf in time.leaves), default=1.0)
    smaller, first = (), "Clip"
    if factor < 1:
        smaller = (Remedy("scale_weights", factor, time.leaves),)
        first = f"Multiply the weights by about {factor:.2g}, clip"
    finding = Finding(
        "recurrence",
        time.leaves,
        f"The {which} signal grows by {10**grown:.3g} over {time.count} steps, "
        f"x{each:.3g} a step.",
        f"{first} the gradient at {bound:.3g}, and use a gated cell (LSTM or GRU), "
        "an orthogonal or identity initialization, or fewer steps at a time.",
        "high" if grown > 2 else "medium",
        "measured",
        (*smaller, Remedy("clip", bound), Remedy("gate"), Remedy("normalize")),
    )
    return Candidate(finding, grown)


def _clip_bound(s: Signals) -> float:
    """Returns a clipping bound for a gradient whose own norm can't be trusted."""
    return 1.0 if not s.first.finite else float(min(1.0, s.norm))


def _worse(s: Signals) -> bool:
    """Whether weights of typical size raise the loss, so the weights were learned."""
    before = s.first.loss
    return s.first.finite and s.scaled_loss > max(1.1 * before, before + 0.1)


def initialization(s: Signals) -> Candidate | None:
    drop, trust = lowered(s.norm, s.scaled_norm), s.trust.get(1.0, math.nan)
    kept = trust < LIMITS.trust and s.scaled_trust > max(LIMITS.trust_after, 2 * trust)
    enough = drop > (LIMITS.mild_drop if kept else LIMITS.drop)
    if not s.scaled or not enough or _worse(s) or _by_depth(s):
        return None
    if (
        s.time is not None
        and _recurrence_in_program(s)
        and set(s.scaled) & set(s.time.leaves)
    ):
        return None  # the recurrence itself uses these weights
    largest = max(s.he[leaf] for leaf in s.scaled)
    if largest < LIMITS.weights:
        return None  # of a typical size; something else makes the signal grow
    factor = round(statistics.geometric_mean(s.scaled.values()), 4)
    leaves = tuple(s.scaled)
    finding = Finding(
        "initialization",
        leaves,
        f"The weights are up to {largest:.3g} times as large as He initialization "
        f"makes them. With weights of that size the gradient's norm is "
        f"{s.scaled_norm:.3g}, not {s.norm:.3g}.",
        f"Multiply these weights by about {factor:.2g}: He initialization "
        "(variance 2 / fan_in) for relu, Xavier initialization (2 / (fan_in + "
        "fan_out)) for tanh. Or normalize each layer.",
        "high" if drop > 2 else "medium",
        "measured",
        (
            Remedy("scale_weights", factor, leaves),
            Remedy("normalize"),
            Remedy("clip", 1.0),
        ),
    )
    return Candidate(finding, drop)


def _by_depth(s: Signals) -> bool:
    """Whether a signal grows because many layers each amplify it slightly."""
    if s.depth is None or s.depth.count < LIMITS.many or s.depth.each > LIMITS.layer:
        return False
    evened = lowered(s.norm, s.scaled_norm) > LIMITS.drop and not _worse(s)
    return _growing(s) > (LIMITS.mild_growth if evened else LIMITS.growth)


def depth(s: Signals) -> Candidate | None:
    growing = _growing(s)
    if s.depth is None or not (growing > LIMITS.growth or _by_depth(s)):
        return None
    which = "backward" if s.depth.back >= s.depth.forward else "forward"
    finding = Finding(
        "depth",
        s.depth.leaves,
        f"The {which} signal grows by {10**growing:.3g} over {s.depth.count} layers, "
        f"x{s.depth.each:.3g} a layer.",
        "Normalize each layer (layer or batch norm), add residual connections, or use "
        "fewer layers. A clip at 1 bounds the steps meanwhile.",
        "high" if growing > 3 else "medium",
        "measured",
        (Remedy("residual"), Remedy("normalize"), Remedy("clip", 1.0)),
    )
    return Candidate(finding, growing)


def vanishing(s: Signals) -> Candidate | None:
    if s.depth is None or not s.first.finite:
        return None
    if s.depth.back > -LIMITS.shrink and s.norm > 0:
        return None
    if s.norm == 0:
        finding = Finding(
            "vanishing",
            s.depth.leaves,
            "The gradient is exactly 0, so no step changes anything.",
            "Look whether these weights are all 0, whether a relu is never above 0, or "
            "whether the loss is cut off by `jax.lax.stop_gradient`.",
            "high",
            "measured",
            (Remedy("normalize"),),
        )
        return Candidate(finding, LIMITS.shrink)
    finding = Finding(
        "vanishing",
        s.depth.leaves[: max(len(s.depth.leaves) // 4, 1)],
        f"The backward signal shrinks by {10 ** abs(s.depth.back):.3g} over "
        f"{s.depth.count} layers, so the first hardly learn.",
        "Use He or Xavier initialization, an activation that does not saturate "
        "(relu, gelu), normalization or residual connections. A clip does not help.",
        "medium",
        "measured",
        (Remedy("normalize"), Remedy("residual"), Remedy("change_activation")),
    )
    return Candidate(finding, -s.depth.back)
