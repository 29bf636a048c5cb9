"""Finds the sites whose signals can be measured at the boundary of a call.

The derivative of a function with a custom derivative is known only with respect to its
arguments and results. An argument that is used once, as the input of a site, has the
same derivative as this input, and a result that is the output of a site has the same
derivative as this output. Operations in between may only rearrange a signal, flip its
sign or add another one, which leaves the norm of the backward signal unchanged.
"""

import collections
from typing import Any

from jax.extend import core

from optclip.diagnosis._program import INLINED, Ends, Plan, Step

__all__ = ["ends_of"]

# Each of these passes its derivative through, except for its order and its sign.
PASSING = {
    "add",
    "add_any",
    "broadcast_in_dim",
    "copy",
    "copy_p",
    "expand_dims",
    "name",
    "neg",
    "reshape",
    "squeeze",
    "sub",
    "transpose",
}


def _uses(jaxpr: Any) -> collections.Counter:
    """Counts how often each variable is used, including as a result."""
    atoms = [atom for eqn in jaxpr.eqns for atom in eqn.invars] + list(jaxpr.outvars)
    return collections.Counter(a for a in atoms if not isinstance(a, core.Literal))


def _passed(eqn: Any, known: dict[Any, int]) -> int | None:
    """Returns what is known of the only operand that an equation passes through."""
    if eqn.primitive.name not in PASSING:
        return None
    size = eqn.outvars[0].aval.size
    operands = [a for a in eqn.invars if not isinstance(a, core.Literal)]
    found = [known[a] for a in operands if a in known and a.aval.size == size]
    return found[0] if len(found) == 1 else None


def _inner_ends(step: Step) -> list[tuple[Any, Any]]:
    """Returns, for each site of an equation, the variables at its input and output."""
    eqn = step.eqn
    if step.site is not None:
        return [(eqn.invars[step.site.data_at], eqn.outvars[0])]
    if not step.opened or eqn.primitive.name not in INLINED:
        return [(None, None)] * len(step.sites)
    return [
        (
            None if end.entry is None else eqn.invars[end.entry],
            None if end.exit is None else eqn.outvars[end.exit],
        )
        for end in ends_of(step.plans[0])
    ]


def ends_of(plan: Plan) -> tuple[Ends, ...]:
    """Returns where each site of a program can be measured at its boundary."""
    jaxpr = plan.jaxpr.jaxpr
    uses = _uses(jaxpr)
    arrived = {var: at for at, var in enumerate(jaxpr.invars) if uses[var] == 1}
    entries: list[int | None] = []
    left: dict[Any, int] = {}  # variables that equal the output of a site
    for step in plan.steps:
        for before, after in _inner_ends(step):
            entries.append(arrived.get(before))
            if after is not None and uses[after] == 1:
                left[after] = len(entries) - 1
        for known in (arrived, left):
            passed = _passed(step.eqn, known)
            if passed is not None and uses[step.eqn.outvars[0]] == 1:
                known[step.eqn.outvars[0]] = passed
    exits = {left[var]: at for at, var in enumerate(jaxpr.outvars) if var in left}
    return tuple(Ends(entry, exits.get(k)) for k, entry in enumerate(entries))
