"""All scenarios by name: half of each class is held out."""

from benchmarks.diagnosis import faults_signal, faults_training, healthy, mixed

GROUPS = (faults_signal, faults_training, mixed, healthy)
SCENARIOS = {s.name: s for group in GROUPS for s in group.scenarios()}


def split(name):
    """Returns the scenarios of the split "tune" or "held_out"."""
    return [s for s in SCENARIOS.values() if s.held_out == (name == "held_out")]
