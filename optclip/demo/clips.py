"""The clipping methods available in the demo, with thresholds for its task."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import optax

import optclip

__all__ = ["BASELINE", "METHODS", "Method"]


class Method(NamedTuple):
    """One of optclip's methods as used in the demo.

    Attributes:
        factory: Function of the threshold that returns the transformation.
        threshold: The default of ``--threshold``, for the default learning rate.
        meaning: Description of the quantity that the threshold bounds.
    """

    factory: Callable[[Any], optax.GradientTransformationExtraArgs]
    threshold: float
    meaning: str


BASELINE = "clip_by_global_norm"

METHODS = {
    "clip_by_global_norm": Method(
        optclip.clip_by_global_norm, 0.5, "norm of all gradients"
    ),
    "clip_by_leaf_norm": Method(
        optclip.clip_by_leaf_norm, 0.25, "norm of each parameter's gradient"
    ),
    "clip_by_value": Method(
        functools.partial(optclip.clip_by_value, record=True),
        0.005,
        "magnitude of each entry",
    ),
    "clip_by_unit_norm": Method(
        optclip.clip_by_unit_norm, 0.05, "norm of each unit's gradient"
    ),
    "clip_by_block_rms": Method(
        optclip.clip_by_block_rms, 0.005, "root mean square of each gradient"
    ),
    "adaptive_grad_clip": Method(
        optclip.adaptive_grad_clip, 0.03, "gradient norm over weight norm, per unit"
    ),
    "normalize_by_norm": Method(
        optclip.normalize_by_norm, 0.5, "norm that every gradient is scaled to"
    ),
    "soft_clip": Method(optclip.soft_clip, 1.0, "norm that no gradient reaches"),
}
