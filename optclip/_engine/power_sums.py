"""Sums of powers over the leaves of a pytree, right whatever the size of the entries.

The square of a float32 overflows from 2**64 on and is lost below 2**-63. So the sum of
squares is taken of the entries as they are, of the entries scaled down and of the
entries scaled up, and of each group the sum is used that can be trusted:

* On an accelerator all three are taken in one pass, without a condition: arithmetic
  costs nothing beside reading memory, and a condition makes the host wait.
* On a CPU the first is taken alone. Only where that one fails, entries are scaled and
  read once more: there it is the arithmetic that costs.

On an accelerator the same sums tell of non-finite entries. NaN comes through every sum
of squares, and what the sum of the entries scaled up does with an infinity is free to
choose, since that sum is never used where there is one: it keeps the sign.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optclip._engine import barriers, sharding
from optclip._engine.numerics import usable_unit
from optclip._engine.reading import (
    COLUMNS,
    CPU,
    GPU,
    TPU,
    Arrays,
    Form,
    Plan,
    laid_out,
    read,
    segments,
    wide_dtype,
)

__all__ = ["PowerSums", "counts", "power_sums"]


class PowerSums(NamedTuple):
    """The sums of powers of all groups: one vector if pooled, else an array a kind.

    Attributes:
        sums: The sum of |x / unit|**p over each group; for order inf, the maximum. Not
            finite where an entry is not, unless it is dropped, and nowhere else.
        units: A power of two, or for an order other than 1, 2 and inf, any number.
        kinds: bool[leaves, 3]. Whether each leaf holds NaN, +inf, -inf.
    """

    sums: Arrays
    units: Arrays
    kinds: jax.Array


class Range(NamedTuple):
    """Where sums of squares of a dtype can be trusted.

    Attributes:
        high: A sum of at least this may have overflowed.
        low: Below this sum, squares that matter may have been lost.
        down: What entries are scaled by where the sum is too large: 2**32 times the
            square of the largest number still fits.
        up: What entries are scaled by where the sum is too small.
        cap: The largest square of an entry times ``up`` where the sum is below ``low``.
            A sum of 2**60 of these still fits.
    """

    high: float
    low: float
    down: float
    up: float
    cap: float

    @property
    def small(self) -> float:
        """The magnitude of an entry whose square is ``cap`` once it is scaled up."""
        return self.cap**0.5 / self.up


SINGLE = Range(2.0**110, 2.0**-60, 2.0**-80, 2.0**64, 2.0**68)
DOUBLE = Range(2.0**900, 2.0**-900, 2.0**-600, 2.0**560, 2.0**220)


def range_of(dtype: Any) -> Range:
    """Returns the range of sums of squares in a dtype, float32 or float64."""
    return DOUBLE if dtype == jnp.float64 else SINGLE


def _signs(x: jax.Array) -> jax.Array:
    """Returns the infinities of ``x``, and 0 for all else.

    The sum is infinite where infinities of one sign are, and NaN where both are.
    """
    return jnp.where(jnp.abs(x) == jnp.inf, x, jnp.zeros_like(x))


def _scaled(x: jax.Array, scale: float) -> jax.Array:
    """Returns ``x`` times a power of two, so that its square is that of the product.

    XLA takes the square of a single number times a constant as x**2 times the square of
    the constant, of which one overflows and one underflows. A select between them keeps
    it from that; what it leaves out is not needed of that sum.
    """
    if x.size != 1:
        return x * scale
    left_out = jnp.abs(x) < 1 if scale < 1 else jnp.abs(x) >= 1
    return jnp.where(left_out, jnp.zeros_like(x), x * scale)


def _term(x: jax.Array, unit: Any, name: str, order: float, drop: bool) -> jax.Array:
    """Returns what is summed up for the sum called ``name``."""
    if name == "nans":
        return (x != x).astype(x.dtype)
    if name == "signs":
        return _signs(x)
    own = range_of(x.dtype)
    if drop:
        x = jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))
    if name == "up":
        square = jnp.square(_scaled(x, own.up))
        fits = square < own.cap if x.size != 1 else jnp.abs(x) < own.small
        # In the place of what is too large: infinities, and what can't sum up to one.
        large = jnp.zeros_like(x) if drop else jnp.where(x == x, x * own.down, 0.0)
        return jnp.where(fits, square, large)
    if unit is not None:
        x = x * unit
    if name == "down":
        x = _scaled(x, own.down)
    if order == 2.0:
        return jnp.square(x)
    x = jnp.abs(x)
    if order == 1.0:
        return x
    if order == np.inf:
        # Infinity stands for NaN, which an all-reduce of maxima drops.
        return jnp.where(jnp.isnan(x), jnp.inf, x)
    zero = x == 0  # the derivative of 0**p is no number that XLA can see for p < 2
    return jnp.where(zero, 0.0, jnp.where(zero, 1.0, x) ** order)


@functools.partial(jax.jit, static_argnums=(1, 3, 4))
def _sums(x: jax.Array, axes: tuple, factor: Any, names: tuple, how: tuple) -> list:
    """Returns the sums of these names over ``axes``; for order inf, the maximum."""
    order, drop, dtype = how
    x, found = x.astype(dtype or wide_dtype(x)), []
    for name in names:
        term = _term(x, factor, name, order, drop)
        if order == np.inf and name == "plain":
            found.append(jnp.max(term, axis=axes, initial=0.0))
        else:
            found.append(jnp.sum(term, axis=axes))
    return found


def _names(order: float, drop: bool) -> tuple[str, ...]:
    """Returns which sums are needed to be right at every size, and to see every kind.

    "plain" is the sum of |x|**p, "down" and "up" are the same of the entries scaled
    down and up. "up" tells of infinities, but where these are dropped; "signs" does so
    where it can't, and "nans" counts NaN where "plain" does not show it.
    """
    if order == 2.0:
        return ("plain", "down", "up", *(("signs", "nans") if drop else ()))
    scaled = ("down",) if order == 1.0 else ()
    return ("plain", *scaled, "signs", *(("nans",) if drop or order == np.inf else ()))


def _kernel(names: Sequence[str], leaves: Arrays, plan: Plan) -> Callable:
    dtype = None
    if plan.groups:  # one vector of sums
        dtype = functools.reduce(jnp.promote_types, map(wide_dtype, leaves))
    how = (plan.order, plan.drop, dtype)
    return functools.partial(_sums, names=tuple(names), how=how)


def _by_group(columns: Arrays, plan: Plan, most: bool = False) -> Arrays:
    """Returns the sums, or maxima, of all groups, of those of leaves."""
    groups = plan.groups
    if not groups or groups == tuple(range(len(groups))):
        return columns
    (x,) = columns
    if max(groups) == 0:
        return ((jnp.max if most else jnp.sum)(x, keepdims=True),)
    if len(set(groups)) == len(groups):
        return (x[np.argsort(groups)],)
    add = jax.ops.segment_max if most else jax.ops.segment_sum
    return (add(x, np.asarray(groups), max(groups) + 1),)


def _by_leaf(values: Arrays, plan: Plan) -> Arrays:
    """Returns what each leaf's group has, laid out like the sums of leaves."""
    groups = plan.groups
    if not groups or groups == tuple(range(len(groups))):
        return values
    (x,) = values
    if max(groups) == 0:
        return (jnp.broadcast_to(x, (len(groups),)),)
    return (x[np.asarray(groups)],)


def plain_sums(
    leaves: Arrays, plan: Plan, form: Form, factors: Arrays | None = None
) -> Arrays:
    """Returns the sums over groups of |x * factor|**p, or maxima, as they come out."""
    most = plan.order == np.inf
    if factors is not None:
        # Or XLA writes out the one factor of a group in the shape of a leaf.
        factors = barriers.kept_apart(_by_leaf(factors, plan))
    kernel = _kernel(["plain"], leaves, plan)
    found = read(leaves, plan, form, kernel, [most], factors)
    # Or XLA takes the sum of the sums as one more sum of all entries.
    sums = barriers.kept_apart(laid_out([columns[0] for columns in found], plan))
    return _by_group(sums, plan, most)


def _units(leaves: Arrays, plan: Plan, form: Form) -> Arrays | None:
    """Returns the largest entry of each group, for the orders that need a unit."""
    if plan.order in (1.0, 2.0, np.inf):
        return None
    largest = plain_sums(leaves, plan._replace(order=np.inf), form)
    return tuple(map(usable_unit, largest))


def _inverse(units: Arrays | None) -> Arrays | None:
    return None if units is None else tuple(1 / u for u in units)


def _kinds(nan: jax.Array, signs: jax.Array, across: tuple[str, ...]) -> jax.Array:
    """Returns bool[rows, 3]: whether the groups of a row hold NaN, +inf, -inf."""
    both = signs != signs
    kinds = [nan, both | (signs == jnp.inf), both | (signs == -jnp.inf)]
    kinds = jnp.stack(kinds, axis=-1)
    kinds = jnp.any(kinds, axis=tuple(range(1, kinds.ndim - 1)))
    return _anywhere(kinds, across)


def _anywhere(flags: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """Returns which flags are set on any device along these mesh axes."""
    return lax.pmax(flags.astype(jnp.int32), names) > 0 if names else flags


def _seen(column: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Returns where NaN is, and a sum that is not finite where infinities are."""
    nan = column["nans"] > 0 if "nans" in column else column["plain"] != column["plain"]
    return nan, column["signs" if "signs" in column else "up"]


def _chosen(column: dict[str, jax.Array], order: float) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of each group that can be trusted, and its unit."""
    total = plain = column["plain"]
    unit, own = jnp.ones_like(plain), range_of(plain.dtype)
    if "down" in column:
        over = ~(plain < own.high)
        total = jnp.where(over, column["down"], total)
        unit = jnp.where(over, 1 / own.down, unit)
    if order == 2.0:
        under = plain < own.low
        total = jnp.where(under, column["up"], total)
        unit = jnp.where(under, 1 / own.up, unit)
    return total, unit.astype(plain.dtype)


def careful_sums(leaves: Arrays, plan: Plan, form: Form) -> PowerSums:
    """Returns the sums of powers by one pass over the leaves, without a condition."""
    units = _units(leaves, plan, form)
    names = _names(plan.order, plan.drop)
    maxima = [plan.order == np.inf and name == "plain" for name in names]
    factors = None if units is None else _by_leaf(tuple(1 / u for u in units), plan)
    kernel = _kernel(names, leaves, plan)
    found = read(leaves, plan, form, kernel, maxima, factors)
    columns = [laid_out(list(each), plan) for each in zip(*found, strict=True)]
    pairs = zip(columns, maxima, strict=True)
    groups = [_by_group(column, plan, most) for column, most in pairs]
    sums, chosen, kinds = [], [], []
    for k in range(len(columns[0])):
        column = {name: c[k] for name, c in zip(names, columns, strict=True)}
        group = {name: c[k] for name, c in zip(names, groups, strict=True)}
        total, unit = _chosen(group, plan.order)
        if plan.order == np.inf and not plan.drop:
            total = jnp.where(_seen(group)[0], jnp.nan, total)
        across = plan.across[plan.kinds[k][0]] if plan.across else ()
        sums.append(total)
        chosen.append(unit)
        kinds.append(_kinds(*_seen(column), across))
    units = tuple(chosen) if units is None else units
    return PowerSums(tuple(sums), units, jnp.concatenate(kinds))


@functools.partial(jax.jit, static_argnums=(1,))
def counts(x: jax.Array, axes: tuple[int, ...], factor: Any) -> list[jax.Array]:
    """Returns float32[leaves, 3]: how many entries are NaN, +inf, -inf, in one read."""
    del axes, factor
    kinds = (x != x, x == jnp.inf, x == -jnp.inf)
    kinds = tuple(kind.astype(jnp.float32) for kind in kinds)
    # One reduction of three numbers: three reductions would each write out a mask.
    add = lambda a, b: tuple(p + q for p, q in zip(a, b, strict=True))  # noqa: E731
    zeros = (np.float32(0),) * 3
    counts = lax.reduce(kinds, zeros, add, tuple(range(1, x.ndim)))
    return [jnp.stack(counts, axis=-1)]


def _counted_kinds(leaves: Arrays, plan: Plan, form: Form) -> jax.Array:
    """Returns bool[leaves, 3]: whether each leaf holds NaN, +inf, -inf."""
    found = read(leaves, plan, form, counts)
    kinds = [
        _anywhere(counts > 0, plan.across[plan.kinds[k][0]] if plan.across else ())
        for k, (counts,) in enumerate(found)
    ]
    return jnp.concatenate(kinds)


def _nan_groups(leaves: Arrays, plan: Plan, form: Form) -> Arrays:
    """Returns whether each group holds a NaN."""
    kernel = _kernel(["nans"], leaves, plan)
    found = read(leaves, plan, form, kernel)
    counts = _by_group(laid_out([columns[0] for columns in found], plan), plan)
    return tuple(count > 0 for count in counts)


def reread(
    leaves: Arrays, sums: Arrays, units: Arrays, plan: Plan, form: Form
) -> PowerSums:
    """Returns the sums of powers where plain ones fail: entries are scaled at need.

    Each sum reads the leaves by itself: XLA writes out on a CPU what several share,
    such as a leaf in a wider dtype.
    """
    leaves = barriers.kept_apart(leaves)
    if plan.drop:
        sums = plain_sums(leaves, plan, form, _inverse(units))
    kinds = _counted_kinds(barriers.kept_apart(leaves), plan, form)
    if plan.order == np.inf and not plan.drop:
        nan = _nan_groups(barriers.kept_apart(leaves), plan, form)
        sums = tuple(jnp.where(n, jnp.nan, s) for n, s in zip(nan, sums, strict=True))
    elif plan.order in (1.0, 2.0):
        factors = []
        for s, lost in zip(sums, _lowest(leaves, plan), strict=True):
            own = range_of(s.dtype)
            factor = jnp.where(s < lost, own.up, jnp.where(s < own.high, 1.0, own.down))
            factors.append(factor.astype(s.dtype))
        sums = plain_sums(leaves, plan, form, tuple(factors))
        units = tuple(1 / f for f in factors)
    return PowerSums(sums, units, kinds)


def _lost_below(x: jax.Array) -> float:
    """Returns the sum below which squares of entries of ``x`` may have been lost."""
    low = range_of(wide_dtype(x)).low
    # The square of the smallest float16 or float8 is a normal float32.
    return low if float(jnp.finfo(x.dtype).tiny) < low else 0.0


def _fails(leaves: Arrays, sums: Arrays, plan: Plan) -> jax.Array:
    """Returns whether a plain sum can't be trusted, on any device that takes part."""
    high = [
        range_of(s.dtype).high if plan.order in (1.0, 2.0) else jnp.inf for s in sums
    ]
    flags = [jnp.any(~(s < h)) for s, h in zip(sums, high, strict=True)]
    if plan.order == 2.0:
        pairs = zip(sums, _lowest(leaves, plan), strict=True)
        flags += [jnp.any(s < low) for s, low in pairs]
    flag = functools.reduce(jnp.logical_or, flags)
    names = tuple(sorted({a for n in plan.everywhere for a in n}))
    # Else every device has the same sums anyway.
    return _anywhere(flag, () if plan.groups else names)


def _lowest(leaves: Arrays, plan: Plan) -> list[float]:
    """Returns, for each array of sums, that below which entries may have been lost."""
    if plan.order != 2.0:
        return [0.0] * len(plan.kinds or (0,))
    low = [_lost_below(x) for x in leaves]
    # Not an array of them: under `lax.cond`, vmapped over an explicitly sharded axis,
    # JAX can't place one.
    return [max(low[i] for i in kind) for kind in plan.kinds or (range(len(low)),)]


def _apart(leaves: Arrays, plan: Plan) -> tuple[str, ...]:
    """Returns the mesh axes along which each device has sums of its own."""
    pairs = zip(leaves, plan.everywhere, strict=True)
    own = {n for x, names in pairs for n in sharding.varying(x) if n not in names}
    return tuple(sorted(own))


def quick_sums(leaves: Arrays, plan: Plan, form: Form) -> PowerSums:
    """Returns plain sums of powers, and those of `reread` where these fail."""
    units = _units(leaves, plan, form)
    seeing = plan._replace(drop=False)  # else nothing would tell of bad entries
    sums = plain_sums(leaves, seeing, form, _inverse(units))
    ones = lambda s: sharding.spread_over(jnp.ones_like(s), sharding.varying(s))  # noqa: E731
    used = lambda: units or tuple(map(ones, sums))  # noqa: E731

    def trusted():
        # Constants are made in the branch: under `jax.vmap` over an explicitly sharded
        # axis, JAX can't place those that a branch takes from outside.
        none = jnp.zeros((len(leaves), 3), bool)
        none = sharding.spread_over(none, _apart(leaves, plan))
        return PowerSums(sums, used(), none)

    return lax.cond(
        _fails(leaves, sums, plan),
        lambda: reread(leaves, sums, used(), plan, form),
        trusted,
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def power_sums(leaves: Arrays, plan: Plan) -> PowerSums:
    """Returns sums of p-th powers of groups of leaves, in the form for the device.

    The norm is ``sum ** (1 / p) * unit``; with order inf, ``sum`` is the maximum. A sum
    is non-finite only where a leaf is, and derivatives flow through the sums alone.
    """
    gpu = functools.partial(careful_sums, plan=plan, form=GPU)
    if not plan.trailing(leaves):
        # XLA takes no more than two sums over columns in one pass. So the plain sum is
        # taken alone, although the host has to wait for the condition.
        gpu = functools.partial(quick_sums, plan=plan, form=COLUMNS)
    others = {"tpu": functools.partial(careful_sums, plan=plan, form=TPU)}
    if plan.trailing(leaves) and segments(leaves, plan, GPU) == segments(
        leaves, plan, TPU
    ):
        others = {}  # no leaves to stack: a GPU reads them as a TPU does
    cpu = functools.partial(quick_sums, plan=plan, form=CPU)
    return lax.platform_dependent(leaves, cpu=cpu, **others, default=gpu)


@power_sums.defjvp
def _power_sums_jvp(plan, primals, tangents):
    (leaves,), (dots,) = primals, tangents
    found = power_sums(leaves, plan)
    summed = functools.partial(
        plain_sums, plan=plan, form=CPU, factors=_inverse(found.units)
    )
    _, sum_dots = jax.jvp(summed, (leaves,), (dots,))
    no_kinds: Any = np.zeros(found.kinds.shape, jax.dtypes.float0)
    no_units = tuple(map(jnp.zeros_like, found.units))
    return found, PowerSums(sum_dots, no_units, no_kinds)
