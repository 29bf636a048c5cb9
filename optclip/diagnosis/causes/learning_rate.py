"""A learning rate that is too high."""

import dataclasses
import math

from optclip.diagnosis._candidates import Candidate
from optclip.diagnosis._memory import SHORT
from optclip.diagnosis._rehearsals import Run, ended
from optclip.diagnosis._signals import LIMITS, Signals
from optclip.diagnosis.causes.uphill import uphill
from optclip.diagnosis.findings import Finding, Remedy

__all__ = ["best_part", "learning_rate"]


ADAPTIVE = "Use an adaptive optimizer such as AdamW, which tolerates larger steps."
MOMENTUM = (
    "Lower the momentum, for example to 0.9: each gradient counts 1 / (1 - momentum) "
    "times."
)


@dataclasses.dataclass(frozen=True)
class _Evidence:
    """What the learning rate is judged by.

    Attributes:
        whole: The rehearsal at the full learning rate.
        slow: The rehearsal at a tenth of it.
        trust: Fraction of the predicted decrease that a full step achieves.
        trusted: Parts of a step that achieve most of their predicted decrease.
        tenth_trust: The same for a tenth of a step.
        hopeless_steps: Whether steps of every size that was tried fail; only far
            smaller ones might work.
        begun: Whether the run has started.
        dead: Whether the gradient becomes exactly 0 at the full learning rate.
        floor: In such a run, a loss that is no better than that of an untrained model.
    """

    whole: Run
    slow: Run
    trust: float
    trusted: tuple[float, ...]
    tenth_trust: float
    hopeless_steps: bool
    begun: bool
    floor: float
    dead: bool

    @property
    def wins(self) -> bool:
        """Whether a tenth of the rate ends lower by more than noise."""
        return self.slow.end < self.whole.end - self.whole.noise

    @property
    def leaps(self) -> bool:
        """Whether the loss is many times its initial value at any step."""
        start = self.whole.start
        peak = max(self.whole.losses)
        leaped = peak > start + LIMITS.leap * max(abs(start), 1e-12)
        # Near a loss of 0, a harder batch can have a loss many times as large.
        return leaped and (not self.begun or peak > self.floor)

    @property
    def distrusted(self) -> bool:
        """Whether smaller steps achieve their prediction and full steps do not."""
        return self.trust < LIMITS.trust and any(p <= 0.3 for p in self.trusted)

    @property
    def mild(self) -> bool:
        """Whether a full step is close to achieving nothing, and a tenth is not."""
        half = 2 * LIMITS.trust_after
        return self.trust < LIMITS.mild_trust and self.tenth_trust > half

    @property
    def relapses(self) -> bool:
        """Whether a run that has started loses much of what it gained."""
        bound = max(LIMITS.rise * abs(self.whole.start), self.floor)
        return self.wins and self.whole.end > bound

    @property
    def suspicious(self) -> bool:
        """Whether the full rate seems too high, whatever the remedy achieves."""
        if math.isinf(self.whole.end) or self.leaps or self.dead:
            return True
        if len(self.whole.starts) >= LIMITS.long and self.wins:
            return True
        if self.begun:
            return self.relapses
        if self.hopeless_steps and self.whole.fails and self.slow.fails:
            return True
        return self.mild or (self.wins and (self.whole.fails or self.distrusted))


def _lost(s: Signals, whole: Run) -> float:
    """Returns a rise of the loss that is small for a run that has started."""
    gained = s.empty_loss - whole.start
    return LIMITS.lost * gained if gained > 0 else 0.0


def _evidence(s: Signals) -> _Evidence:
    whole, slow = (Run(s.starts, s.rehearsals[part]) for part in (1.0, 0.1))
    trusted = [p for p, t in s.trust.items() if p < 1 and t > LIMITS.trust_after]
    return _Evidence(
        whole,
        slow,
        s.trust.get(1.0, math.nan),
        tuple(trusted),
        s.trust.get(0.1, math.nan),
        bool(s.trust) and min(s.trust) <= 0.01 and max(s.trust.values()) < 0,
        s.begun,
        whole.start + _lost(s, whole),
        1.0 in s.dead,
    )


def best_part(s: Signals) -> float | None:
    """Returns the largest part of the rate that is as good as the best one.

    It must end lower than the full rate with every order of the batches, by more than
    noise. Returns None if no part does.
    """
    orders = [(s.starts, s.rehearsals)]
    orders += [(s.repeat_starts, s.repeats)] if s.repeats else []
    parts = set.intersection(*(set(tried) for _, tried in orders)) - {1.0} - s.dead
    for starts, tried in orders:
        whole = Run(starts, tried[1.0])
        ends = {part: ended(tried[part]) for part in parts}
        end = math.inf if 1.0 in s.dead else whole.end - whole.noise
        # A run that has started may stand still. Otherwise, it must train.
        most = whole.start
        if s.begun:
            most += max(whole.noise, _lost(s, whole))
        most = min(end, most)
        ends = {part: end for part, end in ends.items() if end < most}
        least = min(ends.values(), default=math.inf)
        parts = {part for part, end in ends.items() if end <= least + whole.noise}
    return max(parts, default=None)


def _promise(trust: float, smaller: float, part: float) -> str:
    """Describes how much of the predicted decrease in the loss is achieved."""
    if not (math.isfinite(trust) and math.isfinite(smaller)):
        return ""

    def brings(share: float) -> str:
        return f"brings {share:.0%} of it" if share > 0.005 else "makes the loss rise"

    less = f", one with {part:g} of its size {brings(smaller)}"
    less = less if smaller > max(trust, 0) else ""
    return f"The gradient predicts a fall of the loss; a step {brings(trust)}{less}. "


def _rehearsed(s: Signals, found: _Evidence, part: float) -> str:
    """Describes how the rehearsals went."""

    def end_of(end: float) -> str:
        return f"{end:.3g}" if math.isfinite(end) else "a value that is not finite"

    peak = max(found.whole.losses)
    over = found.leaps and math.isfinite(found.whole.end)
    over = f" over {peak:.3g}" if over else ""
    dead = ", where the gradient is exactly 0" if found.dead else ""
    orders = " (and with the batches in another order)" if s.repeats else ""
    return (
        f"In a rehearsal of {len(s.starts)} steps{orders} the loss goes from "
        f"{found.whole.start:.3g}{over} to {end_of(found.whole.end)}{dead}; with "
        f"{part:g} of the learning rate, to {end_of(ended(s.rehearsals[part]))}."
    )


def learning_rate(s: Signals) -> Candidate | None:
    """Finds a rate that is too high, and a lower one with which the model trains."""
    if 0.1 not in s.rehearsals or uphill(s):
        return None
    found, part = _evidence(s), best_part(s)
    if part is None or not found.suspicious:
        return None
    end, start = found.whole.end, found.whole.start
    lower = f"Multiply the learning rate by about {part:g}, or warm it up."
    advice = [] if s.adaptive else [ADAPTIVE]
    if s.memory > SHORT:
        advice.insert(0, MOMENTUM)
    other = (Remedy("advice", advice=words) for words in advice)
    finding = Finding(
        "learning_rate",
        (),
        _promise(found.trust, s.trust.get(part, math.nan), part)
        + _rehearsed(s, found, part),
        (Remedy("scale_learning_rate", part, advice=lower), *other),
        "high" if not math.isfinite(end) or end > 2 * abs(start) else "medium",
        "works" if found.whole.fails or found.dead else "helps",
    )
    # Other causes also make steps fail; findings whose remedy helps more come first.
    gained = min(end, 1e30) - ended(s.rehearsals[part])
    relative = max(gained / max(abs(start), 1e-12), 0.0)
    return Candidate(finding, min(math.log10(1 + relative), 0.9))
