"""Finds the constants and weights that a loss multiplies its values by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optclip._engine.jaxprs import carried_out, closed, is_literal
from optclip.diagnosis._origins import CALLS, line_of
from optclip.diagnosis._replay import magnitude

__all__ = ["Factor", "Factors", "factors_of"]

# Functions with a custom derivative keep it, so they are not opened.
OPENED = {name for name in CALLS if not name.startswith("custom")}


class Factor(NamedTuple):
    """A product with a value that does not depend on the parameters.

    Attributes:
        size: Root mean square of this value, or of its inverse if it is a divisor.
        line: Line, file and function, as in "12 of model.py (loss_fn)"; "" if unknown.
        code: The source code of this line; "" if it can't be read.
        weights: Whether it depends on the batch, as a weight of each example does.
    """

    size: float
    line: str
    code: str
    weights: bool

    def __str__(self) -> str:
        """Describes the product and its place."""
        kind = "weights with a root mean square of" if self.weights else "the factor"
        place = f" in line {self.line}" if self.line else ""
        code = f", `{self.code}`" if self.code else ""
        return f"{kind} {self.size:.3g}{place}{code}"


class Factors(NamedTuple):
    """The factors of a loss, in the order of execution.

    Attributes:
        found: The factors.
        run: ``(params, batch, scales) -> loss``, where the result of each product is
            multiplied by the number in ``scales``.
    """

    found: tuple[Factor, ...]
    run: Callable[[Any, Any, jax.Array], jax.Array]


class _From(NamedTuple):
    """What a value depends on."""

    params: bool = False
    batch: bool = False


def _joined(sources: Sequence[_From]) -> _From:
    return _From(any(s.params for s in sources), any(s.batch for s in sources))


def _factor_at(eqn: Any, sources: Sequence[_From]) -> int | None:
    """Returns which operand of a product is a factor, or None."""
    name = eqn.primitive.name
    if name not in ("mul", "div"):
        return None
    for at in (1, 0) if name == "mul" else (1,):
        factor, other = sources[at], sources[1 - at]
        # An input times a parameter is a layer, not a factor of the loss.
        layer = factor.batch and not other.batch
        if other.params and not factor.params and not layer:
            return at
    return None


class _Run:
    """One evaluation of a program; ``scales`` is None to measure the factors."""

    def __init__(self, scales: jax.Array | None):
        self.scales = scales
        self.sizes: list[jax.Array] = []
        self.eqns: list[tuple[Any, bool]] = []

    def product(self, eqn: Any, at: int, source: _From, values: list, out: Any) -> Any:
        """Records a factor; returns the scaled product."""
        number = len(self.sizes)
        size = magnitude(jnp.asarray(values[at]), mean=True)
        self.sizes.append(1 / size if eqn.primitive.name == "div" else size)
        self.eqns.append((eqn, source.batch))
        if self.scales is None:
            return out
        return (out * self.scales[number]).astype(out.dtype)

    def program(self, program: Any, args: Sequence[Any], sources: Sequence[_From]):
        """Evaluates a program; returns its results and what each depends on."""
        jaxpr = program.jaxpr
        env = dict(zip(jaxpr.constvars, program.consts, strict=True))
        env |= zip(jaxpr.invars, args, strict=True)
        origin = dict.fromkeys(jaxpr.constvars, _From())
        origin |= zip(jaxpr.invars, sources, strict=True)

        def value(atom: Any) -> Any:
            return atom.val if is_literal(atom) else env[atom]

        def source(atom: Any) -> _From:
            return _From() if is_literal(atom) else origin[atom]

        for eqn in jaxpr.eqns:
            values = [value(a) for a in eqn.invars]
            given = [source(a) for a in eqn.invars]
            inner = _inner(eqn)
            if inner is not None:
                outs, made = self.program(inner, values, given)
            else:
                outs = carried_out(jaxpr, eqn, values)
                made = [_joined(given)] * len(outs)
                at = _factor_at(eqn, given)
                if at is not None:
                    outs = [self.product(eqn, at, given[at], values, outs[0])]
            env.update(zip(eqn.outvars, outs, strict=True))
            origin.update(zip(eqn.outvars, made, strict=True))
        return [value(a) for a in jaxpr.outvars], [source(a) for a in jaxpr.outvars]


def _inner(eqn: Any) -> Any:
    """Returns the program that an equation calls once, or None."""
    if eqn.primitive.name not in OPENED:
        return None
    return closed(eqn.params.get("jaxpr", eqn.params.get("call_jaxpr")))


def factors_of(loss_fn: Callable[..., Any], params: Any, batch: Any) -> Factors:
    """Returns the factors of a loss, measured on one batch.

    The bodies of loops, of conditionals and of functions with a custom derivative are
    not searched.
    """
    program = jax.make_jaxpr(loss_fn)(params, batch)
    sources = [_From(params=True) for _ in jax.tree.leaves(params)]
    sources += [_From(batch=True) for _ in jax.tree.leaves(batch)]

    def run(params: Any, batch: Any, scales: jax.Array) -> jax.Array:
        given = jax.tree.leaves((params, batch))
        (loss,), _ = _Run(scales).program(program, given, sources)
        return loss

    eqns: list[tuple[Any, bool]] = []

    @jax.jit
    def measured(params: Any, batch: Any) -> jax.Array:
        once = _Run(None)
        once.program(program, jax.tree.leaves((params, batch)), sources)
        eqns.extend(once.eqns)
        return jnp.stack([*once.sizes, jnp.zeros([])])

    sizes = measured(params, batch)[:-1].tolist()
    places = [line_of(eqn) or ("", "") for eqn, _ in eqns]
    rows = zip(sizes, places, eqns, strict=True)
    found = [Factor(size, *place, weights) for size, place, (_, weights) in rows]
    return Factors(tuple(found), run)
