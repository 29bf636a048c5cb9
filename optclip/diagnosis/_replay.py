"""Runs a planned program with probes at its sites or with a change."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from optclip._engine.jaxprs import carried_out
from optclip.diagnosis._plan import scan_layout
from optclip.diagnosis._program import LOST, Plan, Step

__all__ = ["Change", "magnitude", "no_probes", "replay"]

BEYOND = 1e9  # replaces a number that was too large for float16
LOW = (jnp.float16, jnp.bfloat16)


class Change(NamedTuple):
    """The changes to make in a program.

    Attributes:
        relu: Whether functions between two sites are replaced by relu.
        wide: Whether float16 and bfloat16 are replaced by float32.
    """

    relu: bool = False
    wide: bool = False


def magnitude(x: jax.Array, mean: bool = False) -> jax.Array:
    """Returns the norm or rms of all entries, even if their squares overflow."""
    if not x.size:
        return jnp.zeros([], jnp.float32)
    sizes = jnp.abs(x).astype(jnp.float32)
    top = jnp.max(sizes)
    typical = (top > 0) & jnp.isfinite(top)
    unit = jnp.where(typical, top, 1.0)
    squares = jnp.square(sizes / unit)
    return unit * jnp.sqrt(jnp.mean(squares) if mean else jnp.sum(squares))


@jax.custom_vjp
def _probed(x: jax.Array, probe: jax.Array) -> jax.Array:
    """Returns x; the derivative for ``probe`` is the norm of the backward signal.

    If ``probe`` is a vector, the norm at each position of a sequence follows.
    """
    del probe
    return x


def _probed_fwd(x, probe):
    return x, probe


def _probed_bwd(probe, signal):
    if signal.dtype == jax.dtypes.float0:
        return signal, jnp.zeros_like(probe)
    if not probe.ndim:
        return signal, magnitude(signal)
    each = jax.vmap(magnitude, in_axes=1)(signal)
    return signal, jnp.concatenate([magnitude(signal)[None], each])


_probed.defvjp(_probed_fwd, _probed_bwd)


def no_probes(plan: Plan) -> list[jax.Array]:
    """Returns zeros to differentiate with respect to, one per site input and output.

    For an embedding of sequences, one per position of the output follows.
    """
    return [jnp.zeros((*s.lengths, 2 + s.positions), jnp.float32) for s in plan.sites]


def _widened(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Evaluates one equation, using float32 instead of lower precision."""

    def wide(x):
        low = getattr(x, "dtype", None) in LOW
        return x.astype(jnp.float32) if low else x

    params = {
        k: jnp.dtype(jnp.float32) if _is_low(v) else v for k, v in eqn.params.items()
    }
    out = eqn.primitive.bind(*map(wide, values), **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def _is_low(value: Any) -> bool:
    try:
        return jnp.dtype(value) in LOW
    except TypeError:
        return False


def _site(
    jaxpr: Any, step: Step, values: list, probe: Any, plain: Any, change: Change
) -> tuple:
    """Evaluates a site; returns its result and its measurements."""
    spec = step.site
    assert spec is not None
    at, values = spec.data_at, list(values)
    if change.relu and plain is not None and plain.shape == values[at].shape:
        values[at] = jax.nn.relu(plain).astype(values[at].dtype)
    floats = jnp.issubdtype(values[at].dtype, jnp.inexact)
    if floats and probe is not None:
        values[at] = _probed(values[at], probe[0])
    (out,) = (
        _widened(step.eqn, values)
        if change.wide
        else carried_out(jaxpr, step.eqn, values)
    )
    if probe is None:
        return out, jnp.zeros(3, jnp.float32)
    out = _probed(out, probe[1:] if spec.positions else probe[1])
    before = magnitude(values[at], mean=True) if floats else jnp.zeros([], jnp.float32)
    weight = magnitude(values[1 - at], mean=True)
    seen = (before, magnitude(out, mean=True), weight)
    return out, lax.stop_gradient(jnp.stack(seen))


def _scan(step: Step, values: list, probes: list, change: Change) -> tuple:
    (plan,) = step.plans
    consts, carries = scan_layout(step.eqn)
    fixed, start, rows = (
        values[:consts],
        values[consts : consts + carries],
        values[consts + carries :],
    )

    def body(carry, row):
        slices, mine = row
        outs, seen = replay(plan, [*fixed, *carry, *slices], mine, change)
        carry = [o.astype(c.dtype) for o, c in zip(outs[:carries], carry, strict=True)]
        return carry, (outs[carries:], seen)

    if change.wide:  # the initial carry needs the dtype of the final one
        start = [
            x.astype(jnp.float32) if getattr(x, "dtype", None) in LOW else x
            for x in start
        ]
    params = step.eqn.params
    carry, (outs, seen) = lax.scan(
        body,
        start,
        (rows, probes),
        params["length"],
        params["reverse"],
        params.get("unroll", 1),
    )
    return [*carry, *outs], seen


def _cond(step: Step, values: list, probes: list, change: Change) -> tuple:
    """Evaluates a conditional; sites in branches not taken are not measured."""
    shapes = [jax.ShapeDtypeStruct((*p.shape[:-1], 3), jnp.float32) for p in probes]
    starts = [0]
    for plan in step.plans:
        starts.append(starts[-1] + len(plan.sites))

    def branch(plan, start, stop):
        def run(operands, probes):
            outs, seen = replay(plan, operands, probes[start:stop], change)
            every = [jnp.zeros(s.shape, s.dtype) for s in shapes]
            if every:  # all branches must return equally many statistics
                every[start:stop] = seen
            return outs, every

        return run

    spans = zip(step.plans, starts[:-1], starts[1:], strict=True)
    runs = [branch(*span) for span in spans]
    index = jnp.clip(values[0].astype(jnp.int32), 0, len(runs) - 1)
    return lax.switch(index, runs, values[1:], probes)


def _inlined(step: Step, values: list, probes: list, change: Change) -> tuple:
    (plan,) = step.plans
    run = lambda values, probes: replay(plan, values, probes, change)  # noqa: E731
    if step.eqn.primitive.name in ("checkpoint", "remat2"):
        params = step.eqn.params
        run = jax.checkpoint(
            run, policy=params["policy"], prevent_cse=bool(params["prevent_cse"])
        )
    return run(values, probes)


def _ruled(jaxpr: Any, step: Step, values: list, probes: list) -> tuple:
    """Evaluates a function with a custom derivative, and its body for the statistics.

    The result and the derivative are those of the function's rule. The probes measure
    the backward signal at its boundary.
    """
    (plan,), frozen, values = step.plans, lax.stop_gradient(values), list(values)
    for (at, _), probe in zip(step.ends, probes, strict=True):
        if at is not None:
            values[at] = _probed(values[at], probe[0])
    outs = carried_out(jaxpr, step.eqn, values)
    for (_, at), probe in zip(step.ends, probes, strict=True):
        if at is not None:
            outs[at] = _probed(outs[at], probe[1])
    _, seen = replay(plan, frozen, [jnp.zeros_like(p) for p in probes], Change())
    return outs, seen


def _opened(step: Step, change: Change) -> bool:
    if step.opened:
        return True
    return change.wide and bool(step.plans)


def replay(
    plan: Plan, values: Sequence[Any], probes: Sequence[Any], change: Change
) -> tuple[list[Any], list[jax.Array]]:
    """Runs the program of a plan.

    Args:
        plan: The plan.
        values: The arguments of the program.
        probes: Probes as returned by `no_probes`, or an empty sequence.
        change: The changes to make.

    Returns:
        The results, and for each site the rms of its input, output and parameters.
    """
    jaxpr = plan.jaxpr.jaxpr
    consts = plan.jaxpr.consts
    if change.wide:
        consts = [_wide_constant(x) for x in consts]
    env = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, values, strict=True))
    waiting: Iterator[Any] = iter(probes)
    seen: list[jax.Array] = []

    def read(atom: Any):
        if isinstance(atom, core.Literal):
            value = jnp.asarray(atom.val, jnp.result_type(atom.aval))
            return _wide_constant(value) if change.wide else value
        return env[atom]

    for step in plan.steps:
        eqn = step.eqn
        given = [read(v) for v in eqn.invars]
        if step.site is not None:
            before = step.site.before
            plain = None if before is None or before is LOST else read(before)
            probe = next(waiting, None)
            out, figures = _site(jaxpr, step, given, probe, plain, change)
            outs = [out]
            seen.append(figures)
        elif _opened(step, change):
            mine = list(itertools.islice(waiting, len(step.sites)))
            name = eqn.primitive.name
            run = {"scan": _scan, "cond": _cond}.get(name, _inlined)
            outs, figures = run(step, given, mine, change)
            seen.extend(figures)
        elif mine := list(itertools.islice(waiting, len(step.ends))):
            outs, statistics = _ruled(jaxpr, step, given, mine)
            seen.extend(statistics)
        elif change.wide and not _has_program(eqn):
            outs = _widened(eqn, given)
        else:
            if change.wide:
                pairs = zip(given, eqn.invars, strict=True)
                given = [_narrow(x, v.aval.dtype) for x, v in pairs]
            outs = carried_out(jaxpr, eqn, given)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars], seen


def _wide_constant(value: Any) -> Any:
    """Casts a constant to float32, replacing infinities by large finite numbers."""
    if getattr(value, "dtype", None) not in LOW:
        return value
    value = value.astype(jnp.float32)
    return jnp.where(jnp.isinf(value), jnp.copysign(BEYOND, value), value)


def _has_program(eqn: Any) -> bool:
    return any(hasattr(v, "eqns") or hasattr(v, "jaxpr") for v in eqn.params.values())


def _narrow(value: Any, dtype: Any) -> Any:
    low = dtype in LOW and value.dtype == jnp.float32
    return value.astype(dtype) if low else value
