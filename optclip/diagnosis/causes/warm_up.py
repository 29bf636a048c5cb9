"""A learning rate that is only too high at the start of training."""

from optclip.diagnosis._candidates import Candidate
from optclip.diagnosis._signals import Signals
from optclip.diagnosis.findings import Finding, Remedy

__all__ = ["warm_up"]

ADVICE = (
    "Raise the learning rate linearly over the first few hundred steps, for example "
    "with `optax.warmup_cosine_decay_schedule`."
)


def warm_up(s: Signals, steps: int) -> Candidate | None:
    """Suspects a rate that is too high, in a run that has not started."""
    if s.begun:
        return None
    finding = Finding(
        "warm_up",
        (),
        "The learning rate is too high for the first steps.",
        (Remedy("warm_up", float(steps), advice=ADVICE),),
        "medium",
    )
    # Ahead of the learning rate, whose remedy it makes unnecessary.
    return Candidate(finding, 0.95, suspected=True)
