"""Evaluates jaxprs, the programs that JAX traces, one equation at a time.

`jax.extend` is imported inside the functions that use it, so that importing optclip
does not import it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["carried_out", "closed", "is_literal"]


def is_literal(atom: Any) -> bool:
    """Returns whether an operand of an equation is a literal constant."""
    from jax.extend import core

    return isinstance(atom, core.Literal)


def closed(jaxpr: Any, consts: Any = ()) -> Any:
    """Wraps a jaxpr without constants, as some primitives store, in a `ClosedJaxpr`."""
    if hasattr(jaxpr, "consts") and hasattr(jaxpr, "jaxpr"):
        return jaxpr
    from jax.extend import core

    return core.ClosedJaxpr(jaxpr, consts)  # pyright: ignore[reportPrivateImportUsage]


def carried_out(jaxpr: Any, eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Evaluates one equation of a jaxpr as JAX would, including custom rules."""
    from jax.extend import core

    given, invars, kept = [], [], {}
    for atom, value in zip(eqn.invars, values, strict=True):
        if not is_literal(atom) and atom not in kept:
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
