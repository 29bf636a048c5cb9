"""The methods that the benchmark compares: each takes an optimizer and returns one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

import optclip
from benchmarks.training.candidates import CANDIDATES

__all__ = ["CONSTANT", "METHODS", "Method"]


class Method(NamedTuple):
    """A way to guard an optimizer.

    Attributes:
        build: Function of (optimizer, value) that returns an optimizer; ``value`` is
            one of ``values``, or None if there are none.
        values: The values of the one number that has to be picked by hand, if any.
    """

    build: Callable[[optax.GradientTransformation, Any], optax.GradientTransformation]
    values: tuple[float, ...] = ()


def before(clip: Callable[[], optax.GradientTransformation]) -> Method:
    """Returns the method that chains a clip before the optimizer."""
    return Method(lambda optimizer, value: optax.chain(clip(), optimizer))


CONSTANT = "clip_by_global_norm"
METHODS = {
    "none": Method(lambda optimizer, value: optimizer),
    # The threshold, jointly tuned with the learning rate, is what others compare with.
    CONSTANT: Method(
        lambda optimizer, value: optax.chain(
            optclip.clip_by_global_norm(value), optimizer
        ),
        (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
    ),
    "adaptive_grad_clip": before(optclip.adaptive_grad_clip),
    "zclip": before(optclip.zclip),
    "autoclip": before(optclip.autoclip),
    "adagc": before(optclip.adagc),
    "percentile_clip": before(optclip.percentile_clip),
    "rolling_sigma_clip": before(optclip.rolling_sigma_clip),
    "ema_sigma_clip": before(optclip.ema_sigma_clip),
    "dual_ema_clip": before(optclip.dual_ema_clip),
    "norm_growth_limiter": before(optclip.norm_growth_limiter),
    "adagn": before(optclip.adagn),
    "spam_clip": before(optclip.spam_clip),
    "adamw_clip": before(optclip.adamw_clip),
    "stable_spam_clip": before(optclip.stable_spam_clip),
    "quantile_clip": before(optclip.quantile_clip),
    "skip_steps": Method(lambda optimizer, value: optclip.skip_steps(optimizer)),
    "stabilize": Method(lambda optimizer, value: optclip.stabilize(optimizer)),
    "stabilize, normalize=False": Method(
        lambda optimizer, value: optclip.stabilize(optimizer, normalize=False)
    ),
}
METHODS |= {f"stabilize, {name}": Method(build) for name, build in CANDIDATES.items()}
