"""Finds the operation in which numbers that are not finite first appear."""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core, source_info_util

from optclip._engine.jaxprs import carried_out, closed, is_literal
from optclip.diagnosis._plan import scan_layout

__all__ = ["CALLS", "Origin", "line_of", "origin_of"]

# What makes a result non-finite although all operands are finite.
REASONS = {
    "log": "a logarithm of zero or of a negative number",
    "log1p": "a logarithm of zero or of a negative number",
    "div": "a division by zero, or a quotient that is too large",
    "sqrt": "a square root of a negative number",
    "rsqrt": "an inverse square root of zero or of a negative number",
    "exp": "an exponential that is too large",
    "exp2": "an exponential that is too large",
    "pow": "a power of zero or of a negative number, or one that is too large",
    "integer_pow": "a power that is too large, or a negative power of zero",
    "gather": "an index that is out of range",
    "acos": "an argument outside of [-1, 1]",
    "asin": "an argument outside of [-1, 1]",
    "atanh": "an argument outside of (-1, 1)",
    "lgamma": "an argument of zero or a negative integer",
}
# Programs that run once with the operands of their equation.
CALLS = {
    "checkpoint",
    "closed_call",
    "core_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
    "jit",
    "pjit",
    "remat",
    "remat2",
}
# How many operations inside each other are opened.
DEEPEST = 32


class Origin(NamedTuple):
    """The operation in which numbers that are not finite first appear.

    Attributes:
        primitive: The name of the JAX primitive.
        kind: "NaN" or "inf", whichever the result of the program is.
        backward: Whether it is part of the derivative of the loss; the loss is finite.
        line: Line, file and function, as in "12 of model.py (loss_fn)"; "" if unknown.
        code: The source code of this line; "" if it can't be read.
    """

    primitive: str
    kind: str
    backward: bool
    line: str = ""
    code: str = ""

    def __str__(self) -> str:
        """Describes the operation in a sentence without its end."""
        where = "the derivative of " if self.backward else ""
        place = f"{where}line {self.line}" if self.line else f"{where}the loss"
        code = f", `{self.code}`" if self.code else ""
        # The derivative of a square root at 0 divides by 0, for example.
        reason = REASONS.get(self.primitive, "")
        reason = f" ({reason})" if reason else ""
        return (
            f"the {self.kind} begins in {place}{code}, in the result of "
            f"`{self.primitive}`{reason}"
        )


class _Made(NamedTuple):
    """Where the non-finite numbers of a value come from.

    Attributes:
        at: Index of the equation that made them.
        nan: Whether they are NaN.
    """

    at: int
    nan: bool


def _flags(value: Any) -> jax.Array:
    """Returns whether there is a NaN, and whether there is an infinity."""
    if not jnp.issubdtype(jnp.result_type(value), jnp.inexact):
        return jnp.zeros(2, bool)
    value = jnp.asarray(value)
    return jnp.stack([jnp.any(jnp.isnan(value)), jnp.any(jnp.isinf(value))])


def _run(program: Any, args: Sequence[Any], stop: int) -> tuple[dict, list]:
    """Evaluates the first ``stop`` equations; returns all values, and their flags."""
    jaxpr = program.jaxpr
    env = dict(zip(jaxpr.constvars, program.consts, strict=True))
    env |= zip(jaxpr.invars, args, strict=True)
    flags = []
    for eqn in jaxpr.eqns[:stop]:
        values = [a.val if is_literal(a) else env[a] for a in eqn.invars]
        outs = carried_out(jaxpr, eqn, values)
        env.update(zip(eqn.outvars, outs, strict=True))
        flags.append([_flags(out) for out in outs])
    return env, flags


def _guilty(program: Any, args: Sequence[Any]) -> _Made | None:
    """Returns the equation that the first non-finite result goes back to."""
    jaxpr = program.jaxpr
    every = jax.jit(lambda *args: _run(program, args, len(jaxpr.eqns))[1])(*args)
    made: dict[Any, _Made | None] = {}
    for at, (eqn, flags) in enumerate(zip(jaxpr.eqns, every, strict=True)):
        operands = [made.get(a) for a in eqn.invars if not is_literal(a)]
        before = [m for m in operands if m is not None]
        for out, flag in zip(eqn.outvars, flags, strict=True):
            nan, inf = (bool(x) for x in np.asarray(flag))
            if not (nan or inf):
                continue
            # An infinity may be intended, as in a mask. It is to blame for the NaN
            # that it becomes.
            known = [m for m in before if m.nan == nan] or before
            made[out] = _Made(known[0].at if known else at, nan)
    for out in jaxpr.outvars:
        if not is_literal(out) and made.get(out) is not None:
            return made[out]
    return None


def _operands(program: Any, args: Sequence[Any], at: int) -> list:
    """Returns the operands of an equation of a program."""
    eqn = program.jaxpr.eqns[at]
    named = [atom for atom in eqn.invars if not is_literal(atom)]

    def values_of(*args):
        env, _ = _run(program, args, at)
        return [env[atom] for atom in named]

    values = iter(jax.jit(values_of)(*args))
    return [atom.val if is_literal(atom) else next(values) for atom in eqn.invars]


def _inside(eqn: Any, values: list) -> tuple[Any, list] | None:
    """Returns a program inside an equation and its arguments, or None."""
    name, params = eqn.primitive.name, eqn.params
    if name in CALLS:
        for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
            if key in params:
                return closed(params[key]), values
    if name == "cond":
        return closed(params["branches"][int(values[0])]), values[1:]
    if name == "scan":
        return _step_of(eqn, values)
    return None


def _step_of(eqn: Any, values: list) -> tuple[Any, list] | None:
    """Returns the body of a scan, with the arguments of the first bad step."""
    params = eqn.params
    program, (consts, carries) = closed(params["jaxpr"]), scan_layout(eqn)
    fixed, carry = values[:consts], values[consts : consts + carries]
    rows = values[consts + carries :]
    body = core.jaxpr_as_fun(program)

    def step(state, row):
        outs = body(*fixed, *state, *row)
        bad = sum(jnp.sum(_flags(out)) for out in outs)
        # The state before the step is stacked, so that the bad step can be repeated.
        return tuple(outs[:carries]), (bad, state)

    if params["reverse"]:
        rows = [jnp.flip(x, 0) for x in rows]
    _, (bad, states) = jax.jit(
        lambda carry, rows: lax.scan(step, tuple(carry), rows, params["length"])
    )(carry, rows)
    found = np.flatnonzero(np.asarray(bad))
    if not len(found):
        return None
    first = int(found[0])
    return program, [*fixed, *(x[first] for x in states), *(x[first] for x in rows)]


def line_of(eqn: Any) -> tuple[str, str] | None:
    """Returns the innermost line outside of installed packages, and its code."""
    rows = source_info_util.summarize(eqn.source_info, num_frames=64).split("\n")
    for row in reversed(rows):
        match = re.fullmatch(r"(.*?):(\d+)(?::\d+)? \((.*)\)", row)
        if match and "site-packages" not in row:
            file, number, function = match.groups()
            name = re.split(r"[/\\]", file)[-1]
            code = linecache.getline(file, int(number)).strip()
            return f"{number} of {name} ({function})", code
    return None


def _search(fn: Callable[..., Any], args: tuple, backward: bool) -> Origin | None:
    program = jax.make_jaxpr(fn)(*args)
    values: list = jax.tree.leaves(args)
    found, place = None, ("", "")
    for _ in range(DEEPEST):
        made = _guilty(program, values)
        if made is None:
            break
        eqn = program.jaxpr.eqns[made.at]
        found = eqn.primitive.name, "NaN" if made.nan else "inf"
        # Programs that JAX has traced before, such as those of `jax.numpy`, do not name
        # the line that calls them.
        place = line_of(eqn) or place
        operands = _operands(program, values, made.at)
        inner = _inside(eqn, operands)
        if inner is None:
            break
        program, values = inner
    return None if found is None else Origin(*found, backward, *place)


def origin_of(loss_fn: Callable[..., Any], params: Any, batch: Any) -> Origin | None:
    """Returns the operation in which a loss or its gradient stops being finite.

    The program is compiled once with a flag for each operation. Operations that contain
    a program, such as a scan, are then opened one after the other.

    Args:
        loss_fn: Function of (params, batch) that returns a scalar.
        params: Parameters, all of them finite.
        batch: A batch, all of whose numbers are finite.

    Returns:
        The origin; None if all numbers are finite.
    """
    given = (params, batch)
    forward = _search(loss_fn, given, backward=False)
    return forward or _search(jax.value_and_grad(loss_fn), given, backward=True)
