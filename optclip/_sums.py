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

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optclip import _trees
from optclip._numbers import usable_unit
from optclip._reads import (
    CPU,
    GPU,
    TPU,
    Arrays,
    Form,
    Plan,
    laid_out,
    read,
    wide_dtype,
)

__all__ = ["PowerSums", "power_sums"]


class PowerSums(NamedTuple):
    """The sums of powers of all groups, laid out as the plan says.

    Attributes:
        sums: The sum of |x / unit|**p over each group; for order inf, the maximum.
        units: A power of two, or for an order other than 1, 2 and inf, any number.
        kinds: bool[leaves, 3]. Whether each leaf holds NaN, +inf, -inf.
    """

    sums: Arrays
    units: Arrays
    kinds: jax.Array


class Range(NamedTuple):
    """Where sums of squares of a dtype can be trusted.

    Attributes:
        high: A sum of at least this may have overflowed, or may in a total of leaves.
        low: Below this sum, squares that matter may have been lost.
        down: What entries are scaled by where the sum is too large: 2**32 times the
            square of the largest number still fits.
        up: What entries are scaled by where the sum is too small.
        cap: The largest square of an entry times ``up`` where the sum is below ``low``.
    """

    high: float
    low: float
    down: float
    up: float
    cap: float


SINGLE = Range(2.0**110, 2.0**-60, 2.0**-80, 2.0**80, 2.0**100)
DOUBLE = Range(2.0**900, 2.0**-900, 2.0**-600, 2.0**560, 2.0**220)


def range_of(dtype: Any) -> Range:
    """Returns the range of sums of squares in a dtype, float32 or float64."""
    return DOUBLE if dtype == jnp.float64 else SINGLE


def _signs(x: jax.Array, finite: Any = 0.0) -> jax.Array:
    """Returns ``finite``, but the infinities of ``x`` as they are, and 0 for NaN.

    The sum is infinite where infinities of one sign are, and NaN where both are.
    """
    finite = jnp.where(x == x, finite, 0.0)
    return jnp.where(jnp.abs(x) == jnp.inf, x, finite).astype(x.dtype)


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
    own, original = range_of(x.dtype), x
    if drop:
        x = jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))
    if name == "up":
        small = jnp.minimum(jnp.square(_scaled(x, own.up)), own.cap)
        return small if drop else _signs(original, small)
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


@functools.partial(jax.jit, static_argnums=(1, 3, 4, 5))
def _sum(
    x: jax.Array, axes: tuple, factor: Any, name: str, order: float, drop: bool
) -> jax.Array:
    """Returns the sum called ``name`` over ``axes``; for order inf, the maximum."""
    term = _term(x.astype(wide_dtype(x)), factor, name, order, drop)
    if order == np.inf and name == "plain":
        return jnp.max(term, axis=axes, initial=0.0)
    return jnp.sum(term, axis=axes)


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


def _kernels(names: Sequence[str], plan: Plan) -> list:
    return [
        functools.partial(_sum, name=name, order=plan.order, drop=plan.drop)
        for name in names
    ]


def plain_sums(
    leaves: Arrays, plan: Plan, form: Form, factors: Arrays | None = None
) -> Arrays:
    """Returns the sums of |x * factor|**p, or maxima, as they come out."""
    most = [plan.order == np.inf]
    found = read(leaves, plan, form, _kernels(["plain"], plan), most, factors)
    return laid_out([columns[0] for columns in found], plan)


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


def careful_sums(leaves: Arrays, plan: Plan, form: Form) -> PowerSums:
    """Returns the sums of powers by one pass over the leaves, without a condition."""
    units = _units(leaves, plan, form)
    names = _names(plan.order, plan.drop)
    most = [plan.order == np.inf and name == "plain" for name in names]
    found = read(leaves, plan, form, _kernels(names, plan), most, _inverse(units))
    # Or XLA takes the sum of the sums as one more sum of all entries, in another pass.
    found = _trees.kept_apart(found)
    sums, chosen, kinds = [], [], []
    for k, columns in enumerate(found):
        column = dict(zip(names, columns, strict=True))
        plain, signs = column["plain"], column["signs" if "signs" in column else "up"]
        own = range_of(plain.dtype)
        nan = column["nans"] > 0 if "nans" in column else plain != plain
        total, unit = plain, jnp.ones_like(plain)
        if "down" in column:
            over = ~(plain < own.high)
            total = jnp.where(over, column["down"], plain)
            unit = jnp.where(over, 1 / own.down, 1.0)
        if plan.order == 2.0:
            under = plain < own.low
            total = jnp.where(under, column["up"], total)
            unit = jnp.where(under, 1 / own.up, unit)
        if plan.order == np.inf and not plan.drop:
            total = jnp.where(nan, jnp.nan, total)
        across = plan.across[plan.kinds[k][0]] if plan.across else ()
        sums.append(total)
        chosen.append(unit.astype(total.dtype))
        kinds.append(_kinds(nan, signs, across))
    units = laid_out(chosen, plan) if units is None else units
    return PowerSums(laid_out(sums, plan), units, jnp.concatenate(kinds))


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
        flags += [jnp.any(flag) for flag in _under(leaves, sums, plan)]
    flag = functools.reduce(jnp.logical_or, flags)
    names = tuple(sorted({a for n in plan.everywhere for a in n}))
    if names and not plan.groups:  # else every device has the same sums anyway
        flag = lax.pmax(flag.astype(jnp.int32), names) > 0
    return flag


def _under(leaves: Arrays, sums: Arrays, plan: Plan) -> list[jax.Array]:
    """Returns where entries may have been lost, and matter to the total of a group."""
    low = [_lost_below(x) for x in leaves]
    if not plan.groups:
        firsts = [low[kind[0]] for kind in plan.kinds]
        return [s < f for s, f in zip(sums, firsts, strict=True)]
    (total,) = sums
    # Not an array of thresholds: under `lax.cond`, vmapped over an explicitly sharded
    # axis, JAX can't place one.
    if len(set(plan.groups)) == 1:
        return [jnp.sum(total) < max(low)]
    if len(set(plan.groups)) < len(plan.groups):
        at = np.asarray(plan.groups)
        total = jax.ops.segment_sum(total, at, at.max() + 1)[at]
    return [total < max(low)]


@functools.partial(jax.jit, static_argnums=(1,))
def _counts(x: jax.Array, axes: tuple[int, ...], factor: Any) -> jax.Array:
    """Returns float32[leaves, 3]: how many entries are NaN, +inf, -inf, in one read."""
    del axes, factor
    kinds = (x != x, x == jnp.inf, x == -jnp.inf)
    kinds = tuple(kind.astype(jnp.float32) for kind in kinds)
    # One reduction of three numbers: three reductions would each write out a mask.
    add = lambda a, b: tuple(p + q for p, q in zip(a, b, strict=True))  # noqa: E731
    zeros = (np.float32(0),) * 3
    return jnp.stack(lax.reduce(kinds, zeros, add, tuple(range(1, x.ndim))), axis=-1)


def _counted_kinds(leaves: Arrays, plan: Plan, form: Form) -> jax.Array:
    """Returns bool[leaves, 3]: whether each leaf holds NaN, +inf, -inf."""
    found = read(leaves, plan, form, [_counts])
    kinds = [
        _anywhere(counts > 0, plan.across[plan.kinds[k][0]] if plan.across else ())
        for k, (counts,) in enumerate(found)
    ]
    return jnp.concatenate(kinds)


def _with_nan(
    leaves: Arrays, sums: Arrays, kinds: jax.Array, plan: Plan, form: Form
) -> Arrays:
    """Returns the maxima of groups, NaN for those that hold a NaN."""
    if plan.groups:
        return (jnp.where(kinds[:, 0], jnp.nan, sums[0]),)
    counts = read(leaves, plan, form, _kernels(["nans"], plan))
    pairs = zip(counts, sums, strict=True)
    return tuple(jnp.where(count > 0, jnp.nan, s) for (count,), s in pairs)


def reread(
    leaves: Arrays, sums: Arrays, units: Arrays, plan: Plan, form: Form
) -> PowerSums:
    """Returns the sums of powers where plain ones fail: entries are scaled at need.

    Each sum reads the leaves by itself: XLA writes out on a CPU what several share,
    such as a leaf in a wider dtype.
    """
    leaves = _trees.kept_apart(leaves)
    if plan.drop:
        sums = plain_sums(leaves, plan, form, _inverse(units))
    kinds = _counted_kinds(_trees.kept_apart(leaves), plan, form)
    if plan.order not in (1.0, 2.0):
        if plan.order == np.inf and not plan.drop:
            sums = _with_nan(leaves, sums, kinds, plan, form)
        return PowerSums(sums, units, kinds)
    under = [jnp.zeros_like(s, bool) for s in sums]
    if plan.order == 2.0:
        under = _under(leaves, sums, plan)
    factors = []
    for s, small in zip(sums, under, strict=True):
        own = range_of(s.dtype)
        factor = jnp.where(s < own.high, jnp.where(small, own.up, 1.0), own.down)
        factors.append(factor.astype(s.dtype))
    sums = plain_sums(leaves, plan, form, tuple(factors))
    return PowerSums(sums, tuple(1 / f for f in factors), kinds)


def _apart(leaves: Arrays, plan: Plan) -> tuple[str, ...]:
    """Returns the mesh axes along which each device has sums of its own."""
    pairs = zip(leaves, plan.everywhere, strict=True)
    own = {n for x, names in pairs for n in _trees.varying(x) if n not in names}
    return tuple(sorted(own))


def quick_sums(leaves: Arrays, plan: Plan, form: Form) -> PowerSums:
    """Returns plain sums of powers, and those of `reread` where these fail."""
    units = _units(leaves, plan, form)
    seeing = plan._replace(drop=False)  # else nothing would tell of bad entries
    sums = plain_sums(leaves, seeing, form, _inverse(units))
    ones = lambda s: _trees.spread_over(jnp.ones_like(s), _trees.varying(s))  # noqa: E731
    used = lambda: units or tuple(map(ones, sums))  # noqa: E731

    def trusted():
        # Constants are made in the branch: under `jax.vmap` over an explicitly sharded
        # axis, JAX can't place those that a branch takes from outside.
        none = jnp.zeros((len(leaves), 3), bool)
        none = _trees.spread_over(none, _apart(leaves, plan))
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
    return lax.platform_dependent(
        leaves,
        cpu=functools.partial(quick_sums, plan=plan, form=CPU),
        tpu=functools.partial(careful_sums, plan=plan, form=TPU),
        default=functools.partial(careful_sums, plan=plan, form=GPU),
    )


@power_sums.defjvp
def _power_sums_jvp(plan, primals, tangents):
    (leaves,), (dots,) = primals, tangents
    found = power_sums(leaves, plan)
    summed = functools.partial(
        plain_sums, plan=plan, form=CPU, factors=_inverse(found.units)
    )
    _, sum_dots = jax.jvp(summed, (leaves,), (dots,))
    no_kinds: Any = np.zeros(found.kinds.shape, jax.dtypes.float0)
    return found, PowerSums(sum_dots, tuple(map(jnp.zeros_like, found.units)), no_kinds)
