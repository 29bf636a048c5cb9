"""What is known without looking into the program of the loss."""

import collections
import math
from collections.abc import Collection, Sequence
from typing import Any

import jax
import numpy as np

from optclip.diagnosis._limits import LIMITS
from optclip.diagnosis._replay import magnitude
from optclip.diagnosis.taps import Tapped
from optclip.telemetry import metrics

__all__ = ["excess_of", "larger_steps", "norms_by_path", "unseen_ratios"]

# Steps that a cap divides are tried at these multiples of their size, but not above the
# size that they would have without the cap.
MULTIPLES = (10.0, 100.0)


def unseen_ratios(
    tapped: Tapped | None, params: Any, seen: Collection[str]
) -> dict[str, float]:
    """Returns the relative size of weights that have no measured site.

    Sizes are relative to He initialization. Such weights belong to matrix products and
    convolutions that appear in the program but can't be measured there, for example in
    a function with a custom derivative. Only their signals are out of reach.
    """
    if tapped is None:
        return {}
    leaves = jax.tree.leaves(params)
    ratios = collections.defaultdict(list)
    for spec in tapped.plan.unseen:
        if spec.kind in ("matmul", "conv") and len(spec.leaves) == 1:
            (leaf,) = spec.leaves
            size = float(magnitude(leaves[leaf], mean=True))
            ratios[tapped.paths[leaf]].append(size / math.sqrt(2 / max(spec.fan_in, 1)))
    return {
        path: float(np.median(found))
        for path, found in ratios.items()
        if path not in seen
    }


def norms_by_path(
    paths: Sequence[str], rows: Sequence[Sequence[float]]
) -> dict[str, tuple[float, ...]]:
    """Returns the numbers of each leaf, by path, from one row per step."""
    if not rows:
        return {}
    return dict(zip(paths, zip(*rows, strict=True), strict=True))


def excess_of(opt_state: Any) -> float:
    """Returns the largest average ratio of the update to its cap; 1 without a cap."""
    found = metrics(opt_state).items()
    excess = [float(value) for key, value in found if key.endswith("/mean_excess")]
    return max(excess, default=1.0)


def larger_steps(excess: float) -> list[float]:
    """Returns the factors by which to enlarge updates that a cap divides."""
    tried = {min(excess, multiple) for multiple in MULTIPLES}
    return sorted(tried) if excess > LIMITS.excess else []
