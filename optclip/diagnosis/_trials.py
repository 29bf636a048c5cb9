"""Tries remedies on copies of the model: each is rehearsed as the run itself would be.

A remedy that changes numbers only (weights, steps, batches, factors of the loss) can be
tried. One that changes the program, such as a normalization, can't.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optclip.diagnosis._factors import Factor, Factors, factors_of
from optclip.diagnosis._probe import Knobs, Probe
from optclip.diagnosis._rehearsals import Rehearsal, Run
from optclip.diagnosis._scales import Scale, scales_of, standardized
from optclip.diagnosis.findings import Remedy

__all__ = ["Setting", "Trials"]

# A rehearsal with a warm-up has at least so many steps; the rate rises over two thirds
# of them.
LONG = 60


class Setting(NamedTuple):
    """Everything that a rehearsal depends on.

    Attributes:
        params: The parameters to start from.
        opt_state: The optimizer state to start from.
        batches: The batches.
        knobs: What to change in each step.
        ramp: Over how many steps the learning rate rises.
        steps: The number of steps.
        scales: A number to multiply each factor of the loss by, or None.
    """

    params: Any
    opt_state: Any
    batches: list
    knobs: Knobs = Knobs()
    ramp: int = 0
    steps: int = 12
    scales: jax.Array | None = None

    def knobs_at(self, number: int) -> Knobs:
        """Returns what to change in a step."""
        risen = min(1.0, (number + 1) / self.ramp) if self.ramp else 1.0
        return self.knobs._replace(update=self.knobs.update * risen)


class Trials:
    """Rehearses remedies; results are kept, so that none is tried twice.

    Attributes:
        probe: The programs of the model.
        params: The parameters to start from.
        opt_state: The optimizer state to start from.
        batches: The batches, without those that are unlike the others.
        begun: Whether the run has started.
        steps: The number of steps of a rehearsal.
    """

    def __init__(
        self,
        probe: Probe,
        params: Any,
        opt_state: Any,
        batches: list,
        begun: bool,
        steps: int = 12,
        known: Rehearsal | None = None,
    ):
        self.probe, self.params, self.opt_state = probe, params, opt_state
        self.batches, self.begun, self.steps = batches, begun, steps
        self._unchanged = known  # the rehearsal without a change, if it has been run
        self._known: dict[tuple, Rehearsal | None] = {}

    @functools.cached_property
    def scales(self) -> tuple[Scale, ...]:
        """The scale of each leaf of the batches."""
        return scales_of(self.batches)

    @functools.cached_property
    def _factors(self) -> Factors | None:
        try:
            return factors_of(self.probe.loss_fn, self.params, self.batches[0])
        except Exception:  # a program that can't be evaluated by operations
            return None

    @property
    def factors(self) -> tuple[Factor, ...]:
        """The factors of the loss."""
        return self._factors.found if self._factors else ()

    @functools.cached_property
    def _scaled(self) -> Probe:
        """The programs of the loss with factors, whose batches are (batch, scales)."""
        factors = self._factors
        assert factors is not None

        def loss_fn(params: Any, batch: Any) -> jax.Array:
            return factors.run(params, *batch)

        return self.probe.of(loss_fn)

    def of(self, *remedies: Remedy) -> Rehearsal | None:
        """Returns the rehearsal with remedies; None if one of them can't be tried."""
        if any(remedy.kind not in _CHANGES for remedy in remedies):
            return None
        key = tuple((r.kind, r.amount, r.where) for r in remedies)
        return self._once(key, lambda: self._attempt(remedies))

    @functools.cached_property
    def base(self) -> Rehearsal:
        """The rehearsal without any change."""
        if self._unchanged is not None:
            empty = _empty_loss(self.probe, self.params, self.batches)
            return dataclasses.replace(self._unchanged, empty_loss=empty)
        self.probe.show("rehearsals")
        return self._rehearse(self._setting())

    @property
    def long_steps(self) -> int:
        """The number of steps of a rehearsal with a warm-up."""
        return max(LONG, self.steps)

    @property
    def ramp(self) -> int:
        """The number of steps of the warm-up."""
        return 2 * self.long_steps // 3

    def long(self, part: float = 1.0) -> Rehearsal:
        """Returns a longer rehearsal at a part of the learning rate."""
        setting = self._setting()._replace(steps=self.long_steps, knobs=Knobs(part))
        return self._once(("long", part), lambda: self._rehearse(setting))

    def _setting(self) -> Setting:
        return Setting(self.params, self.opt_state, self.batches, steps=self.steps)

    def _attempt(self, remedies: Sequence[Remedy]) -> Rehearsal | None:
        self.probe.show(f"trying {' and '.join(r.kind for r in remedies)}")
        setting = self._setting()
        try:
            for remedy in remedies:
                setting = _CHANGES[remedy.kind](self, setting, remedy)
            return self._rehearse(setting)
        except Exception as error:  # the model may not accept a change
            # Said, so that a fault of a trial itself is not taken for a model's.
            self.probe.show(f"it can't be tried ({type(error).__name__}: {error})")
            return None

    def _rehearse(self, setting: Setting) -> Rehearsal:
        """Trains on the batches in order, and in the reverse order."""
        probe, batches = self.probe, setting.batches
        if setting.scales is not None:
            probe = self._scaled
            batches = [(batch, setting.scales) for batch in batches]
        numbers = [i % len(batches) for i in range(setting.steps)]
        runs = []
        for run in ([batches[i] for i in numbers], [batches[-1 - i] for i in numbers]):
            starts = [probe.loss(setting.params, batch) for batch in run[-4:]]
            losses, _ = probe.rehearse(
                setting.params, setting.opt_state, run, setting.knobs_at
            )
            runs.append(Run(starts, losses))
        return Rehearsal(tuple(runs), _empty_loss(probe, setting.params, batches))

    def _once(self, key: tuple, run: Callable[[], Rehearsal | None]) -> Any:
        if key not in self._known:
            self._known[key] = run()
        return self._known[key]


def _empty_loss(probe: Probe, params: Any, batches: list) -> float:
    """Returns the loss with all parameters at 0."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    return float(np.mean([probe.loss(zeros, batch) for batch in batches[:4]]))


def _scale_weights(trials: Trials, setting: Setting, remedy: Remedy) -> Setting:
    leaves, treedef = jax.tree.flatten(setting.params)
    pairs = zip(leaves, trials.probe.paths, strict=True)
    made = [
        (x * remedy.amount).astype(x.dtype) if path in remedy.where else x
        for x, path in pairs
    ]
    params = jax.tree.unflatten(treedef, made)
    if trials.begun:
        return setting._replace(params=params)
    opt_state = trials.probe.optimizer.init(params)
    return setting._replace(params=params, opt_state=opt_state)


def _standardize(trials: Trials, setting: Setting, remedy: Remedy) -> Setting:
    chosen = tuple(x for x in trials.scales if x.path in remedy.where)
    return setting._replace(batches=standardized(setting.batches, chosen))


def _divide_factor(trials: Trials, setting: Setting, remedy: Remedy) -> Setting:
    chosen = np.array([x.line in remedy.where for x in trials.factors])
    scales = np.where(chosen, 1 / _amount(remedy), 1.0)
    return setting._replace(scales=jnp.asarray(scales, jnp.float32))


def _scale_rate(trials: Trials, setting: Setting, remedy: Remedy) -> Setting:
    return _with_knobs(setting, update=setting.knobs.update * _amount(remedy))


def _divide_loss(trials: Trials, setting: Setting, remedy: Remedy) -> Setting:
    return _with_knobs(setting, loss=1 / _amount(remedy))


def _clip(trials: Trials, setting: Setting, remedy: Remedy) -> Setting:
    return _with_knobs(setting, bound=_amount(remedy))


def _warm_up(trials: Trials, setting: Setting, remedy: Remedy) -> Setting:
    return setting._replace(ramp=trials.ramp, steps=trials.long_steps)


def _with_knobs(setting: Setting, **changes: float) -> Setting:
    return setting._replace(knobs=setting.knobs._replace(**changes))


def _amount(remedy: Remedy) -> float:
    assert remedy.amount is not None, remedy
    return remedy.amount


_CHANGES: dict[str, Callable[[Trials, Setting, Remedy], Setting]] = {
    "scale_weights": _scale_weights,
    "scale_learning_rate": _scale_rate,
    "divide_loss": _divide_loss,
    "clip": _clip,
    "standardize": _standardize,
    "divide_factor": _divide_factor,
    "warm_up": _warm_up,
}
