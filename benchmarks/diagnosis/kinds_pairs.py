"""Pairs of models: one with a fault, and its healthy twin without it."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from benchmarks.diagnosis.healthy import healthy
from benchmarks.diagnosis.problem import Scenario, fault

NONE = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class Faulty(Scenario):
    """A scenario whose remedies have known amounts.

    Attributes:
        amounts: By remedy, the amount that fixes the model; None if it has no amount.
        judged: Whether `check_truth` judges it by the loss of the sound model, because
            its own loss has other terms or factors.
        units: How many times larger its loss is because of the units of its targets.
    """

    amounts: Mapping[str, float | None] = NONE
    judged: bool = False
    units: float = 1.0


def pair(name, twin, cause, recipe, *, mid=0, **how):
    """Yields the scenario of a fault and that of its healthy twin.

    The arguments other than ``twin``, the name of the twin, are those of `faulty`.
    """
    yield faulty(name, cause, recipe, mid=mid, **how)
    yield healthy(twin, recipe, after=mid)


def faulty(name, cause, recipe, *, fixes=NONE, mid=0, other=NONE, judged=False,
           units=1.0, **how):  # fmt: skip
    """Returns the scenario of a fault.

    Args:
        name: Its name.
        cause: Its cause.
        recipe: The recipe that trains.
        fixes: The remedies that undo the fault, and their amounts.
        mid: After how many good steps the fault begins.
        other: The recipes of remedies that train the model without undoing the fault.
        judged: See `Faulty`.
        units: See `Faulty`.
        **how: Fields of the recipe that make the fault; see `fault`.
    """
    made = fault(name, cause, recipe, mid=mid, **how)
    variants = dict.fromkeys(fixes, made.sound)
    for key, changed in other.items():
        variants[key] = changed.after(mid, recipe) if mid else changed
    fields = {f.name: getattr(made, f.name) for f in dataclasses.fields(Scenario)}
    amounts = {**fixes, **dict.fromkeys(other)}
    return Faulty(
        **{**fields, "variants": variants}, amounts=amounts, judged=judged, units=units
    )
