"""All scenarios by name: half of each class is held out.

The splits "unseen", "tune_kinds" and "fresh" are separate. The models of "fresh" were
written without reference to the rules.
"""

from benchmarks.diagnosis import (
    faults_signal,
    faults_training,
    fresh_data,
    fresh_faults,
    fresh_healthy,
    fresh_more_faults,
    fresh_numerics,
    fresh_precision,
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
FRESH_GROUPS = (
    fresh_faults,
    fresh_more_faults,
    fresh_numerics,
    fresh_precision,
    fresh_data,
    fresh_healthy,
)
FRESH = {s.name: s for group in FRESH_GROUPS for s in group.scenarios()}
SPLITS = ("tune", "held_out", "unseen", "tune_kinds", "fresh")


def split(name):
    """Returns the scenarios of a split, which is one of `SPLITS`."""
    if name == "unseen":
        return list(UNSEEN.values())
    if name == "tune_kinds":
        return list(KINDS.values())
    if name == "fresh":
        return list(FRESH.values())
    return [s for s in SCENARIOS.values() if s.held_out == (name == "held_out")]
