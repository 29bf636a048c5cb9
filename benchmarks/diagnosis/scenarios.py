"""All scenarios by name: half of each class is held out.

The splits "unseen" and "tune_kinds" are separate.
"""

from benchmarks.diagnosis import (
    faults_signal,
    faults_training,
    healthy,
    kinds_faults,
    kinds_growth,
    kinds_numerics,
    kinds_unknown,
    mixed,
    unseen_faults,
    unseen_healthy,
)

GROUPS = (faults_signal, faults_training, mixed, healthy)
SCENARIOS = {s.name: s for group in GROUPS for s in group.scenarios()}
UNSEEN = {s.name: s for g in (unseen_faults, unseen_healthy) for s in g.scenarios()}
KINDS_GROUPS = (kinds_faults, kinds_growth, kinds_numerics, kinds_unknown)
KINDS = {s.name: s for group in KINDS_GROUPS for s in group.scenarios()}
SPLITS = ("tune", "held_out", "unseen", "tune_kinds")


def split(name):
    """Returns the scenarios of a split, which is one of `SPLITS`."""
    if name == "unseen":
        return list(UNSEEN.values())
    if name == "tune_kinds":
        return list(KINDS.values())
    return [s for s in SCENARIOS.values() if s.held_out == (name == "held_out")]
