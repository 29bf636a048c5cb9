"""Finds the matmuls, convolutions, lookups and scales that use parameters.

A program is a jaxpr. Each of its values depends on constants, on parameters alone, or
on data. A site is an equation that combines data with parameters. Nothing is evaluated
here.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jax.extend import core

from optclip._engine.jaxprs import closed
from optclip.diagnosis._boundary import ends_of
from optclip.diagnosis._program import (
    CONSTANT,
    DATA,
    ELEMENTWISE,
    INLINED,
    LINEAR,
    LOST,
    OPENED,
    POSITIONS,
    RULED,
    Chain,
    Made,
    Plan,
    SiteSpec,
    Step,
    inner_programs,
    name_of,
    opaque_uses,
)

__all__ = ["plan_program", "scan_layout"]


class _Place(NamedTuple):
    first: int = 0  # index of the first site
    lengths: tuple[int, ...] = ()  # of the enclosing scans


def scan_layout(eqn: Any) -> tuple[int, int]:
    """Returns a scan's numbers of constants and carries, inferred from ranks."""
    inner = closed(eqn.params["jaxpr"]).jaxpr
    ranks = zip(eqn.outvars, inner.outvars, strict=True)
    carries = sum(len(a.aval.shape) == len(b.aval.shape) for a, b in ranks)
    pairs = zip(eqn.invars, inner.invars, strict=True)
    kept = sum(len(a.aval.shape) == len(b.aval.shape) for a, b in pairs)
    return kept - carries, carries


def _turns(mades: list[Made]) -> Mapping[int, int]:
    """Returns how often data has passed through each leaf on its way to the values."""
    distinct = {id(m.turns): m.turns for m in mades if m.turns}
    if len(distinct) < 2:
        return next(iter(distinct.values()), CONSTANT.turns)
    most: dict[int, int] = {}
    for turns in distinct.values():
        for leaf, count in turns.items():
            most[leaf] = max(count, most.get(leaf, 0))
    return most


# Operations that scale a sum by a number of its own size, or bound it.
SCALING = {
    "div",
    "dot_general",
    "erf",
    "exp",
    "log",
    "logistic",
    "mul",
    "pow",
    "rsqrt",
    "sqrt",
    "tanh",
}


def _addends(eqn: Any, mades: list[Made]) -> float:
    """Returns how many values each entry of the result is a sum of."""
    name = eqn.primitive.name
    if name in SCALING:
        return 1.0
    known = max((m.addends for m in mades if m.data), default=1.0)
    if name == "reduce_sum":
        shape = eqn.invars[0].aval.shape
        return known * math.prod(shape[axis] for axis in eqn.params["axes"])
    if name.startswith("scatter"):
        summed = name in ("scatter-add", "scatter_add")
        (out,), updates = eqn.outvars, eqn.invars[2]
        ratio = math.prod(updates.aval.shape) / max(math.prod(out.aval.shape), 1)
        return known * max(ratio, 1.0) if summed else known
    return known


def _together(mades: list[Made]) -> Made:
    """Returns the provenance of a value computed from all the given values."""
    if any(m.data for m in mades):
        return DATA._replace(turns=_turns(mades))
    leaves = frozenset().union(*(m.leaves for m in mades))
    return Made(leaves, stacked=any(m.stacked for m in mades))


def _is_elementwise(eqn: Any) -> bool:
    name = eqn.primitive.name
    if name in ELEMENTWISE:
        return True
    inner = eqn.params.get("call_jaxpr", eqn.params.get("jaxpr"))
    if inner is None or name not in INLINED | RULED:
        return False
    return all(_is_elementwise(e) for e in closed(inner).jaxpr.eqns)


def _chained(eqn: Any, mades: list[Made]) -> Chain | None:
    """Returns the chain of the result of an elementwise function."""
    data = [(v, m) for v, m in zip(eqn.invars, mades, strict=True) if m.data]
    chains = [m.chain for _, m in data]
    if not _is_elementwise(eqn) or any(c is None for c in chains):
        return None
    if len({c.site for c in chains if c}) != 1:
        return None
    functions = dict.fromkeys(f for c in chains if c for f in c.functions)
    before = next((c.before for c in chains if c and c.before is not None), None)
    name = eqn.primitive.name
    scaled = name in ("mul", "div") and len(data) == 1
    if name not in LINEAR and not (scaled and (name == "mul" or mades[0].data)):
        before = data[0][0] if before is None else before
        functions[name_of(eqn)] = None
    first = chains[0]
    return first and Chain(first.site, tuple(functions), before)


def _fans(eqn: Any, weight_at: int) -> tuple[int, int]:
    """Returns fan_in and fan_out of a site."""
    shape = eqn.invars[weight_at].aval.shape
    name = eqn.primitive.name
    if name == "dot_general":
        contracted, batched = eqn.params["dimension_numbers"]
        fan_in = math.prod(shape[d] for d in contracted[weight_at])
        groups = math.prod(shape[d] for d in batched[weight_at])
        return fan_in, math.prod(shape) // max(fan_in * groups, 1)
    if name == "conv_general_dilated":
        spec = eqn.params["dimension_numbers"].rhs_spec
        fan_in = math.prod(shape) // max(shape[spec[0]], 1)
        return fan_in, math.prod(shape) // max(shape[spec[1]], 1)
    if name == "gather":
        return 1, math.prod(shape[1:])
    return 1, 1


def _positions(eqn: Any, place: _Place) -> int:
    """Returns the length of the sequences that a lookup returns; 0 if there are none.

    Sequences have three axes: examples, positions, features.
    """
    shape = eqn.outvars[0].aval.shape
    if eqn.primitive.name != "gather" or place.lengths or len(shape) != 3:
        return 0
    return shape[1] if shape[1] >= POSITIONS else 0


KINDS = {
    "dot_general": "matmul",
    "conv_general_dilated": "conv",
    "mul": "scale",
    "gather": "embedding",
}


def _site(eqn: Any, mades: list[Made], place: _Place) -> SiteSpec | None:
    """Returns the site for an equation, or None if it is not a site."""
    kind = KINDS.get(eqn.primitive.name)
    if kind is None:
        return None
    first, second = mades[:2]
    if kind == "embedding":
        # One row looked up by a loop counter is a layer's slice, not an embedding
        # lookup.
        many = math.prod(eqn.invars[1].aval.shape[:-1]) > 1
        if not (first.leaves and not first.data and many):
            return None
        at = 1
    elif first.leaves and not first.data and not second.leaves:
        at = 1
    elif second.leaves and not second.data and not first.leaves:
        at = 0
    else:
        return None
    weight, data = mades[1 - at], mades[at]
    if kind == "scale" and not data.data:
        return None
    chain = data.chain
    fan_in, fan_out = _fans(eqn, 1 - at)
    return SiteSpec(
        kind,
        weight.leaves,
        place.first,
        fan_in,
        fan_out,
        at,
        chain.functions if chain else (),
        chain.site if chain else None,
        chain.before if chain else None,
        place.lengths,
        weight.stacked,
        str(eqn.outvars[0].aval.dtype),
        positions=_positions(eqn, place),
        turn=1 + max(data.turns.get(leaf, 0) for leaf in weight.leaves),
        addends=data.addends,
    )


def _scan_plan(eqn: Any, mades: list[Made], place: _Place) -> Plan:
    """Plans the body of a scan, iterating until the provenance of carries is stable."""
    consts, carries = scan_layout(eqn)
    program = closed(eqn.params["jaxpr"])
    inside = place._replace(lengths=(*place.lengths, eqn.params["length"]))
    mades = [m.without_chain() for m in mades]
    for i, made in enumerate(mades):
        row = i >= consts + carries and bool(made.leaves)
        mades[i] = made._replace(stacked=row)
    while True:
        plan = _make_plan(program, mades, inside)
        changed = False
        for i in range(carries):
            before, after = mades[consts + i], plan.outs[i]
            joined = _together([before, after])
            if joined[:2] != before[:2]:
                mades[consts + i], changed = joined, True
        if not changed:
            return plan


def _crossing(made: Made) -> Made:
    """Returns the provenance of a value once it is passed into another program."""
    if made.chain is None or not made.chain.functions:
        return made
    return made._replace(chain=made.chain._replace(before=LOST))


# The names that users write for these primitives.
BETTER = {
    "while": "jax.lax.while_loop",
    "custom_vjp_call": "the custom derivative",
    "custom_jvp_call": "the custom derivative",
    "shard_map": "jax.shard_map",
    "pure_callback": "jax.pure_callback",
    "io_callback": "jax.experimental.io_callback",
    "pallas_call": "a Pallas kernel",
}


class _Beyond(NamedTuple):
    """The reason for each unreachable site, and the ones that appear in the program."""

    reasons: tuple[str, ...] = ()
    unseen: tuple[SiteSpec, ...] = ()


def _ruled_step(eqn: Any, plan: Plan, reason: str) -> tuple[Step, _Beyond]:
    """Plans a function with a custom derivative, whose rule stays in force.

    Its body is evaluated again for the forward signal. A backward signal is only known
    at the boundary of the call.
    """
    ends, sites = ends_of(plan), []
    if eqn.params.get("symbolic_zeros"):  # a probe would change what the rule is given
        ends = tuple(end._replace(entry=None) for end in ends)
    for site, end in zip(plan.sites, ends, strict=True):
        pairs = zip(("signal_in", "signal_out"), end, strict=True)
        unmeasured = tuple(name for name, index in pairs if index is None)
        inside = reason if unmeasured else ""
        site = site._replace(unmeasured=unmeasured, inside=inside, positions=0)
        sites.append(site)
    step = Step(eqn, None, (plan,), False, tuple(sites), ends)
    return step, _Beyond((reason,) * len(plan.hidden), plan.unseen)


def _step(eqn: Any, made: list[Made], place: _Place) -> tuple[Step, _Beyond]:
    """Plans the programs in an equation; also returns the unreachable sites."""
    name, plans = eqn.primitive.name, []
    if name == "scan":
        plans = [_scan_plan(eqn, made, place)]
    else:
        for inner, given in inner_programs(eqn, made):
            cross = _crossing if name in INLINED else Made.without_chain
            plans.append(_make_plan(inner, list(map(cross, given)), place))
            place = place._replace(first=place.first + len(plans[-1].sites))
    if name in OPENED:
        sites = tuple(site for p in plans for site in p.sites)
        step = Step(eqn, None, tuple(plans), bool(sites), sites)
        reasons = tuple(words for p in plans for words in p.hidden)
        return step, _Beyond(reasons, tuple(x for p in plans for x in p.unseen))
    called = name_of(eqn)
    reason = f"inside {BETTER.get(name, name)}"
    reason += f" {called}" if called != name else ""
    if name in RULED and plans and not plans[0].jaxpr.jaxpr.effects:
        return _ruled_step(eqn, plans[0], reason)
    count = sum(len(p.sites) + len(p.hidden) for p in plans)
    if not count:
        count = opaque_uses(eqn, made)
    step = Step(eqn, None, tuple(plans) if name in RULED else ())
    return step, _Beyond(
        (reason,) * count, tuple(x for p in plans for x in (*p.sites, *p.unseen))
    )


def _outs_of(step: Step) -> list[Made]:
    """Returns the provenance of each result of an opened equation."""
    if len(step.plans) == 1 and step.eqn.primitive.name in INLINED:
        return [_crossing(m) for m in step.plans[0].outs]
    return [_together(list(o)) for o in zip(*(p.outs for p in step.plans), strict=True)]


def _result(eqn: Any, made: list[Made], used: bool, inner: list[Made]) -> Made:
    """Returns the provenance of the result of an equation that is not opened."""
    if eqn.primitive.name in ("dynamic_slice", "gather") and made[0].leaves:
        return made[0]  # a layer's own slice, wherever the index comes from
    whole = _together([*made, DATA] if used else made)
    if not whole.data:
        return whole
    chain, addends = _chained(eqn, made), _addends(eqn, made)
    turns = _turns([whole, *inner])
    return whole._replace(chain=chain, turns=turns, addends=addends)


def _make_plan(program: Any, mades: list[Made], place: _Place) -> Plan:
    """Finds the sites of a program, given the provenance of its arguments."""
    jaxpr = program.jaxpr
    env: dict[Any, Made] = dict.fromkeys(jaxpr.constvars, CONSTANT)
    env.update(zip(jaxpr.invars, mades, strict=True))
    steps: list[Step] = []
    sites: list[SiteSpec] = []
    hidden: list[str] = []
    unseen: list[SiteSpec] = []

    def look(atom):
        return CONSTANT if isinstance(atom, core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        made = [look(v) for v in eqn.invars]
        here = place._replace(first=place.first + len(sites))
        site = _site(eqn, made, here)
        if site is not None:
            steps.append(Step(eqn, site))
            sites.append(site)
            turns = {**_turns(made), **dict.fromkeys(site.leaves, site.turn)}
            chain = Chain(site.number, (), None)
            env[eqn.outvars[0]] = DATA._replace(chain=chain, turns=turns)
            continue
        step, beyond = _step(eqn, made, here)
        steps.append(step)
        hidden.extend(beyond.reasons)
        unseen.extend(beyond.unseen)
        sites.extend(step.sites)
        if step.opened:
            outs = _outs_of(step)
        else:
            used = bool(beyond.reasons or step.sites)
            inner = [out for p in step.plans for out in p.outs]
            outs = [_result(eqn, made, used, inner)] * len(eqn.outvars)
        env.update(zip(eqn.outvars, outs, strict=True))
    outs = tuple(look(v) for v in jaxpr.outvars)
    return Plan(program, tuple(steps), tuple(sites), tuple(hidden), outs, tuple(unseen))


def plan_program(program: Any, params: int) -> Plan:
    """Plans a program whose first ``params`` arguments are parameter leaves."""
    given = [
        Made(frozenset([i])) if i < params else DATA
        for i in range(len(program.jaxpr.invars))
    ]
    return _make_plan(program, given, _Place())
