"""All scenarios by name: half of each class is held out; "unseen" is separate."""

from benchmarks.diagnosis import (
    faults_signal,
    faults_training,
    healthy,
    mixed,
    unseen_faults,
    unseen_healthy,
)

GROUPS = (faults_signal, faults_training, mixed, healthy)
SCENARIOS = {s.name: s for group in GROUPS for s in group.scenarios()}
UNSEEN = {s.name: s for g in (unseen_faults, unseen_healthy) for s in g.scenarios()}


def split(name):
    """Returns the scenarios of the split "tune", "held_out" or "unseen"."""
    if name == "unseen":
        return list(UNSEEN.values())
    return [s for s in SCENARIOS.values() if s.held_out == (name == "held_out")]
