"""Programs as JAX traces them: equations carried out one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.extend import core

__all__ = ["carried_out", "closed"]


def closed(jaxpr: Any, consts: Any = ()) -> Any:
    """Returns a jaxpr with its constants, which some primitives leave out."""
    if hasattr(jaxpr, "consts") and hasattr(jaxpr, "jaxpr"):
        return jaxpr
    return core.ClosedJaxpr(jaxpr, consts)  # pyright: ignore[reportPrivateImportUsage]


def carried_out(jaxpr: Any, eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Carries one equation of a jaxpr out as JAX would, custom rules included."""
    given, invars, kept = [], [], {}
    for atom, value in zip(eqn.invars, values, strict=True):
        if not isinstance(atom, core.Literal) and atom not in kept:
            kept[atom] = True
            invars.append(atom)
            given.append(value)
    names = jaxpr.debug_info._replace(
        arg_names=("",) * len(invars), result_paths=("",) * len(eqn.outvars)
    )
    alone = jaxpr.replace(
        constvars=[],
        invars=invars,
        outvars=eqn.outvars,
        eqns=[eqn],
        effects=eqn.effects,
        debug_info=names,
    )
    return core.jaxpr_as_fun(closed(alone))(*given)
