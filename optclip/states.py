"""The states of all transformations.

Each state is a named tuple of arrays. Use `optclip.metrics` to read the recorded
statistics, or `optax.tree.get` to read a single field of any optimizer state, as in
``optax.tree.get(opt_state, "norm_before")``.
"""

from optclip._engine.state import ClipState, GroupStats, UnrecordedState
from optclip.methods.stable_adam import StableAdamState
from optclip.telemetry import RecordNormsState
from optclip.wrappers.skip_steps import BadSteps, SkipState
from optclip.wrappers.stabilize import StabilizeState
from optclip.wrappers.u_clip import CarryState

__all__ = [
    "BadSteps",
    "CarryState",
    "ClipState",
    "GroupStats",
    "RecordNormsState",
    "SkipState",
    "StabilizeState",
    "StableAdamState",
    "UnrecordedState",
]
