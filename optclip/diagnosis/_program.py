"""The data structures of a planned program: provenance, sites, steps."""

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
    "RULED",
    "Chain",
    "Made",
    "Plan",
    "SiteSpec",
    "Step",
    "inner_programs",
    "name_of",
    "opaque_uses",
]

# Elementwise functions that are linear in their one data argument, and copies.
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
OPENED = INLINED | {"scan", "cond"}
RULED = {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}
# The program does not show what these do with their operands, or not as a product.
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
    """The path of a value from a site's output through elementwise functions alone."""

    site: int
    functions: tuple[str, ...]
    before: Any  # the variable before the first nonlinear function


class Made(NamedTuple):
    """The provenance of a value: what it was computed from.

    Attributes:
        leaves: Indices of the parameter leaves, for a value computed from parameters
            alone.
        data: Whether data or a site went into it.
        chain: Its path from a site, or None.
        stacked: Whether it is a slice of a scanned leaf: the parameters of one layer.
    """

    leaves: frozenset = frozenset()
    data: bool = False
    chain: Chain | None = None
    stacked: bool = False

    def without_chain(self) -> "Made":
        """Returns the same provenance, to start another program with."""
        return self._replace(chain=None)


CONSTANT, DATA = Made(), Made(data=True)


class SiteSpec(NamedTuple):
    """One use of parameters.

    Attributes:
        kind: "matmul", "conv", "embedding" or "scale".
        leaves: Indices of the leaves used.
        number: Its index in the order of execution.
        fan_in: Inputs that one output sums over.
        fan_out: Outputs that one input goes into.
        data_at: Which operand is the data.
        functions: Nonlinear functions between the previous site and this one.
        source: Index of the previous site, or None.
        before: The variable that the first of these functions was applied to.
        lengths: Lengths of the enclosing scans, outermost first.
        stacked: Whether each step of the innermost scan has parameters of its own.
        dtype: The dtype of the result.
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


class Step(NamedTuple):
    """One equation: a site, a container of programs, or anything else.

    Attributes:
        eqn: The equation.
        site: The site that it is, or None.
        plans: The programs inside the equation.
        opened: Whether these have sites that can be reached.
    """

    eqn: Any
    site: SiteSpec | None = None
    plans: tuple["Plan", ...] = ()
    opened: bool = False


class Plan(NamedTuple):
    """A program with its sites.

    Attributes:
        jaxpr: The program, closed.
        steps: Its equations.
        sites: All sites, those of containers included, in the order of execution.
        hidden: Reasons for the sites that can't be reached, one for each.
        outs: The provenance of its results.
        unseen: The hidden sites that nevertheless appear in the program, for example in
            a function with a custom derivative.
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
    """Returns the programs in an equation, and the provenance of their arguments."""
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
    """Returns how many parameters meet data in an equation that can't be read."""
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
