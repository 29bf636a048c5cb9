"""The three acts of the demo, and the runs that each of them trains."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

import optclip
from optclip.demo import clips
from optclip.demo.options import Options

__all__ = [
    "BAD",
    "FINITE",
    "NONE",
    "OPTAX",
    "RATE",
    "Run",
    "incidents",
    "plan",
    "rates_of",
]

RATE, BAD = "rate", "bad batches"
NONE, OPTAX = "no clip", "optax.clip_by_global_norm"
# Optax's clip in Optax's own protection from NaN.
FINITE = "optax.apply_if_finite"
# The first act trains at the learning rate of the options times these factors.
FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)


class Run(NamedTuple):
    """Networks that are trained with the same clip, one per learning rate and seed.

    Attributes:
        act: The act that the run belongs to.
        name: The name of the run in the table, the figure and the log.
        optimizer: Function of the learning rate that returns the optimizer.
        rates: The learning rates.
        threshold: The threshold of the clip; infinite if there is none.
    """

    act: str
    name: str
    optimizer: Callable[[Any], optax.GradientTransformationExtraArgs]
    rates: tuple[float, ...]
    threshold: float = float("inf")

    @property
    def bad(self) -> bool:
        """Whether two batches are bad."""
        return self.act == BAD

    @property
    def skips(self) -> bool:
        """Whether the optimizer can skip steps."""
        return self.name in ("optclip.skip_steps", "optclip.stabilize")


def rates_of(options: Options) -> tuple[float, ...]:
    """Returns the learning rates of the first act."""
    return tuple(round(factor * options.learning_rate, 12) for factor in FACTORS)


def incidents(steps: int) -> tuple[int, int]:
    """Returns the steps with a batch that is too large and with one that is NaN."""
    return steps // 3, 2 * steps // 3


def _without(rate: Any) -> optax.GradientTransformationExtraArgs:
    return optax.with_extra_args_support(optax.adam(rate))


def _with_optax(rate: Any) -> optax.GradientTransformationExtraArgs:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))


def _if_finite(rate: Any) -> optax.GradientTransformationExtraArgs:
    guarded = optax.apply_if_finite(_with_optax(rate), max_consecutive_errors=10)
    return optax.with_extra_args_support(guarded)


def _with_skips(rate: Any) -> optax.GradientTransformationExtraArgs:
    return optclip.skip_steps(optax.adam(rate))


def plan(options: Options) -> list[Run]:
    """Returns the runs of both acts that train: without a clip, Optax's, and ours."""
    method, threshold = clips.METHODS[options.method], options.threshold

    def ours(rate: Any) -> optax.GradientTransformationExtraArgs:
        return method.optimizer(threshold, optax.adam(rate))

    several, one = rates_of(options), (options.learning_rate,)
    own = float("inf") if threshold is None else threshold
    return [
        Run(RATE, NONE, _without, several),
        Run(RATE, OPTAX, _with_optax, several, 1.0),
        Run(RATE, f"optclip.{options.method}", ours, several, own),
        Run(BAD, NONE, _without, one),
        Run(BAD, OPTAX, _with_optax, one, 1.0),
        Run(BAD, FINITE, _if_finite, one, 1.0),
        Run(BAD, "optclip.skip_steps", _with_skips, one),
    ]
