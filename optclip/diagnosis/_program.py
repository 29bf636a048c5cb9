"""Data structures of a planned program: provenance, sites and steps."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp

from optclip._engine.jaxprs import closed

__all__ = [
    "CONSTANT",
    "DATA",
    "ELEMENTWISE",
    "INLINED",
    "LINEAR",
    "LOST",
    "OPAQUE",
    "OPENED",
    "POSITIONS",
    "RULED",
    "Chain",
    "Ends",
    "Made",
    "Plan",
    "SiteSpec",
    "Step",
    "inner_programs",
    "name_of",
    "opaque_uses",
]

# Copies, and elementwise functions that are linear in their one data argument.
LINEAR = {
    "add",
    "add_any",
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "copy_p",
    "expand_dims",
    "name",
    "neg",
    "optimization_barrier",
    "pad",
    "pvary",
    "reduce_precision",
    "reshape",
    "sharding_constraint",
    "squeeze",
    "sub",
    "transpose",
}
ELEMENTWISE = LINEAR | {
    "abs",
    "acos",
    "acosh",
    "and",
    "asin",
    "asinh",
    "atan",
    "atan2",
    "atanh",
    "cbrt",
    "clamp",
    "cos",
    "cosh",
    "div",
    "eq",
    "erf",
    "erf_inv",
    "erfc",
    "exp",
    "exp2",
    "expm1",
    "ge",
    "gt",
    "integer_pow",
    "is_finite",
    "le",
    "log",
    "log1p",
    "logistic",
    "lt",
    "max",
    "min",
    "mul",
    "ne",
    "not",
    "or",
    "pow",
    "rsqrt",
    "select_n",
    "sign",
    "sin",
    "sinh",
    "sqrt",
    "square",
    "stop_gradient",
    "tan",
    "tanh",
    "xor",
}
LOST = "in another program"
INLINED = {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint"}
POSITIONS = 8  # the fewest positions of a sequence at which a signal is measured
OPENED = INLINED | {"scan", "cond"}
RULED = {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}
# Primitives whose use of their operands the program does not show as a product.
OPAQUE = {
    "custom_linear_solve",
    "ffi_call",
    "io_callback",
    "pallas_call",
    "pure_callback",
    "ragged_dot",
    "ragged_dot_general",
    "triangular_solve",
}


class Chain(NamedTuple):
    """The path from a site's output to a value through elementwise functions alone."""

    site: int
    functions: tuple[str, ...]
    before: Any  # the variable before the first nonlinear function


class Made(NamedTuple):
    """The provenance of a value, that is, the inputs from which it was computed.

    Attributes:
        leaves: Indices of the parameter leaves, if the value was computed from
            parameters alone.
        data: Whether the value depends on data or on the output of a site.
        chain: The path from a site to the value, or None.
        stacked: Whether the value is a slice of a scanned leaf, as for one layer.
        turns: How often data has passed through each leaf, one use after the other, on
            its way to the value.
        addends: The number of values that each entry is a sum of, since it was last
            divided or multiplied; 1 if it is not a sum.
    """

    leaves: frozenset = frozenset()
    data: bool = False
    chain: Chain | None = None
    stacked: bool = False
    turns: Mapping[int, int] = MappingProxyType({})
    addends: float = 1.0

    def without_chain(self) -> "Made":
        """Returns the same provenance without its chain, for use in another program."""
        return self._replace(chain=None)


CONSTANT, DATA = Made(), Made(data=True)


class SiteSpec(NamedTuple):
    """One use of parameters.

    Attributes:
        kind: "matmul", "conv", "embedding" or "scale".
        leaves: Indices of the leaves used.
        number: Index of the site in the order of execution.
        fan_in: Number of inputs that each output sums over.
        fan_out: Number of outputs to which each input contributes.
        data_at: Index of the data operand.
        functions: Nonlinear functions between the previous site and this one.
        source: Index of the previous site, or None.
        before: The variable to which the first of ``functions`` is applied.
        lengths: Lengths of the enclosing scans, outermost first.
        stacked: Whether each step of the innermost scan has its own parameters.
        dtype: The dtype of the result.
        unmeasured: The backward signals that can't be measured, of "signal_in" and
            "signal_out".
        inside: The reason why they can't be measured; "" if all can.
        positions: For an embedding of sequences, their length; otherwise 0.
        turn: Number of this use in the longest chain of uses of the same leaf of which
            each depends on the one before; the first is 1.
        addends: The number of values that each entry of the input is a sum of; 1 if
            it is not a sum, or the sum was divided since, as in a mean.
    """

    kind: str
    leaves: frozenset
    number: int
    fan_in: int
    fan_out: int
    data_at: int
    functions: tuple[str, ...]
    source: int | None
    before: Any
    lengths: tuple[int, ...]
    stacked: bool
    dtype: str
    unmeasured: tuple[str, ...] = ()
    inside: str = ""
    positions: int = 0
    turn: int = 1
    addends: float = 1.0


class Ends(NamedTuple):
    """Where the signals of a site can be measured at the boundary of a call.

    Attributes:
        entry: Index of the argument of the call that reaches the site's input
            unchanged, or None.
        exit: Index of the result of the call to which the site's output passes
            unchanged, or None.
    """

    entry: int | None = None
    exit: int | None = None


class Step(NamedTuple):
    """One equation: a site, a container of other programs, or neither.

    Attributes:
        eqn: The equation.
        site: The site, or None if the equation is not a site.
        plans: The programs inside the equation.
        opened: Whether these programs contain reachable sites.
        sites: The sites in these programs that are measured.
        ends: For a function with a custom derivative, the ends of each of ``sites``.
    """

    eqn: Any
    site: SiteSpec | None = None
    plans: tuple["Plan", ...] = ()
    opened: bool = False
    sites: tuple[SiteSpec, ...] = ()
    ends: tuple[Ends, ...] = ()


class Plan(NamedTuple):
    """A program and its sites.

    Attributes:
        jaxpr: The program, as a closed jaxpr.
        steps: The equations of the program.
        sites: All sites in the order of execution, including sites in containers.
        hidden: For each unreachable site, the reason.
        outs: The provenance of the results.
        unseen: The hidden sites that nevertheless appear in the program, for example in
            a `jax.lax.while_loop`.
    """

    jaxpr: Any
    steps: tuple[Step, ...]
    sites: tuple[SiteSpec, ...]
    hidden: tuple[str, ...]
    outs: tuple[Made, ...]
    unseen: tuple[SiteSpec, ...] = ()


def name_of(eqn: Any) -> str:
    inner = eqn.params.get("call_jaxpr")
    info = getattr(getattr(inner, "jaxpr", inner), "debug_info", None)
    called = str(eqn.params.get("name") or getattr(info, "func_name", "") or "")
    return called or eqn.primitive.name


def inner_programs(eqn: Any, mades: list[Made]) -> list[tuple[Any, list[Made]]]:
    """Returns the programs in an equation and the provenance of their arguments."""
    name, params = eqn.primitive.name, eqn.params
    if name == "while":
        start = params["cond_nconsts"]
        return [(closed(params["body_jaxpr"]), mades[start:])]
    if name == "cond":
        return [(closed(b), mades[1:]) for b in params["branches"]]
    found = []
    for key in ("call_jaxpr", "jaxpr", "fun_jaxpr"):
        inner = params.get(key)
        if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
            inner = closed(inner)
            if len(inner.jaxpr.invars) == len(mades):
                found.append((inner, mades))
    return found[:1]


def opaque_uses(eqn: Any, made: list[Made]) -> int:
    """Counts the parameters that meet data in an equation that can't be read."""
    impl = getattr(eqn.primitive, "impl", None)
    module = getattr(getattr(impl, "func", impl), "__module__", None) or "jax"
    # Primitives of other libraries may do anything with their operands.
    if eqn.primitive.name not in OPAQUE and module.split(".")[0] == "jax":
        return 0
    if not any(m.data for m in made):
        return 0
    pairs = zip(eqn.invars, made, strict=True)
    floats = [m for v, m in pairs if jnp.issubdtype(v.aval.dtype, jnp.inexact)]
    return sum(bool(m.leaves) and not m.data for m in floats)
