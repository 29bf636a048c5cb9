"""The clipping methods available in the demo, with thresholds for its task."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

import optclip

__all__ = ["DEFAULT", "METHODS", "Method"]


class Method(NamedTuple):
    """One of optclip's methods as used in the demo.

    Attributes:
        optimizer: Function of the threshold and an optimizer that returns the optimizer
            with the method.
        threshold: The default of ``--threshold``; None if the method has none.
        meaning: Description of the quantity that the threshold bounds.
    """

    optimizer: Callable[[Any, Any], optax.GradientTransformationExtraArgs]
    threshold: float | None
    meaning: str


def _before(factory: Callable[..., Any], threshold: float, meaning: str) -> Method:
    """Returns a method that is chained in front of the optimizer."""

    def optimizer(threshold: Any, inner: Any) -> Any:
        return optax.chain(factory(threshold), inner)

    return Method(optimizer, threshold, meaning)


def _stabilize(threshold: None, inner: Any) -> Any:
    del threshold
    return optclip.stabilize(inner)


DEFAULT = "stabilize"

METHODS = {
    "stabilize": Method(_stabilize, None, "nothing to choose"),
    "clip_by_global_norm": _before(
        optclip.clip_by_global_norm, 1.0, "norm of all gradients"
    ),
    "clip_by_leaf_norm": _before(
        optclip.clip_by_leaf_norm, 0.5, "norm of each parameter's gradient"
    ),
    "clip_by_value": _before(optclip.clip_by_value, 0.01, "magnitude of each entry"),
    "clip_by_unit_norm": _before(
        optclip.clip_by_unit_norm, 0.1, "norm of each unit's gradient"
    ),
    "clip_by_block_rms": _before(
        optclip.clip_by_block_rms, 0.01, "root mean square of each gradient"
    ),
    "adaptive_grad_clip": _before(
        optclip.adaptive_grad_clip, 0.03, "gradient norm over weight norm, per unit"
    ),
    "normalize_by_norm": _before(
        optclip.normalize_by_norm, 1.0, "norm that every gradient is scaled to"
    ),
    "soft_clip": _before(optclip.soft_clip, 2.0, "norm that no gradient reaches"),
}
