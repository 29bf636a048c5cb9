"""Power sums, the basis of norms, in the form for each kind of device.

Every form is plain JAX, so all of them can be run on any device.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optclip._engine import grouping, power_sums
from optclip._engine.group_norms import root
from optclip._engine.power_sums import Plan

FORMS = {
    "cpu": functools.partial(power_sums.quick_sums, form=power_sums.CPU),
    "gpu": functools.partial(power_sums.careful_sums, form=power_sums.GPU),
    "tpu": functools.partial(power_sums.careful_sums, form=power_sums.TPU),
}
ORDERS = [1.0, 2.0, 3.0, np.inf]
# Stacks of one leaf, of several, of too many small leaves for one stack; an empty leaf.
SHAPES = [(4, 6), (4, 6), (5,), (), (0, 3), *[(3,)] * 20, (4, 6)]
KINDS = {"nan": np.nan, "+inf": np.inf, "-inf": -np.inf}


def leaves_of(scale, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [np.asarray(scale * rng.normal(size=s), dtype) for s in SHAPES]


def plan_of(leaves, order, *, pooled, drop=False):
    count = len(leaves)
    names = ((),) * count
    if pooled:
        axes = tuple(tuple(range(x.ndim)) for x in leaves)
        groups = grouping.WholeLeafGroups(tuple(range(count)))
        return Plan(order, axes, groups, names, drop)
    axes = tuple((0,) if x.ndim else () for x in leaves)
    buckets = grouping.shape_buckets(leaves, axes)
    return Plan(order, axes, buckets, names, drop, ((),) * count)


@functools.cache
def jitted(form, plan):
    return jax.jit(functools.partial(FORMS[form], plan=plan))


def measured(leaves, plan, form):
    """Returns the norm of each leaf's group in float64, and the non-finite kinds."""
    order = power_sums.bucket_order(leaves, plan)
    run = jitted(form, power_sums.reordered(plan, order))
    found = run(tuple(jnp.asarray(leaves[i]) for i in order))
    back = np.argsort(order)
    norms = [
        np.asarray(root(s, plan.order), np.float64) * np.asarray(u, np.float64)
        for s, u in zip(found.sums, found.units, strict=True)
    ]
    rows = [norms[array][row] for array, row in plan.groups.rows]
    return rows, np.asarray(found.kinds)[back]


def exact(x, order, axes, drop):
    x = np.abs(np.asarray(x, np.float64))
    x = np.where(np.isfinite(x), x, 0) if drop else x
    if order == np.inf:
        return np.max(x, axis=axes, initial=0)
    top = np.max(np.where(np.isfinite(x), x, 0), initial=0) or 1.0
    return np.sum((x / top) ** order, axis=axes) ** (1 / order) * top


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("pooled", [True, False], ids=["leaves", "slices"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_accurate_at_every_size(form, pooled, order):
    for scale in (1.0, 1e30, 1e-30, 3e37, 1e-36, 0.0):
        leaves = leaves_of(scale)
        plan = plan_of(leaves, order, pooled=pooled)
        got, kinds = measured(leaves, plan, form)
        for x, axes, norm in zip(leaves, plan.axes, got, strict=True):
            # Values below the smallest normal float32 are flushed to zero.
            np.testing.assert_allclose(norm, exact(x, order, axes, False), 2e-6, 4e-38)
        assert not kinds.any()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("drop", [False, True], ids=["seen", "dropped"])
@pytest.mark.parametrize("pooled", [True, False], ids=["leaves", "slices"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_reports_the_kinds_of_nonfinite_entries_per_leaf(
    form, pooled, drop, order
):
    leaves = leaves_of(1.0)
    wanted = np.zeros((len(leaves), 3), bool)
    leaves[4] = np.asarray(1.0, np.float32)  # a scalar, like leaf 3
    held = {
        0: ["nan"],
        1: ["+inf"],
        2: ["-inf"],
        3: ["nan"],
        4: ["-inf"],
        7: ["+inf", "-inf"],
        9: ["nan", "-inf"],
        11: ["nan", "+inf", "-inf"],
    }
    for i, names in held.items():
        for place, name in enumerate(names):
            leaves[i].reshape(-1)[place] = KINDS[name]
            wanted[i, [*KINDS].index(name)] = True
    plan = plan_of(leaves, order, pooled=pooled, drop=drop)
    got, kinds = measured(leaves, plan, form)
    np.testing.assert_array_equal(kinds, wanted)
    for x, axes, norm in zip(leaves, plan.axes, got, strict=True):
        expected = exact(x, order, axes, drop)
        finite = np.isfinite(expected)
        np.testing.assert_array_equal(np.isfinite(norm), finite)
        np.testing.assert_allclose(
            np.where(finite, norm, 0), np.where(finite, expected, 0), 2e-6
        )


@pytest.mark.parametrize("form", FORMS)
def test_large_and_small_entries_in_one_tree_are_both_accurate(form):
    leaves = [np.full(4, 1e30, np.float32), np.full(4, 1e-30, np.float32),
              np.full(4, np.nan, np.float32), np.ones(4, np.float32)]  # fmt: skip
    got, kinds = measured(leaves, plan_of(leaves, 2.0, pooled=True), form)
    np.testing.assert_allclose(got, [2e30, 2e-30, np.nan, 2], rtol=1e-6)
    assert kinds[:, 0].tolist() == [False, False, True, False]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, np.float64])
def test_every_form_accepts_every_dtype(form, dtype, x64):
    del x64
    scale = {np.float64: 1e300, jnp.float16: 1e4}.get(dtype, 1e30)
    leaves = leaves_of(scale, dtype)
    plan = plan_of(leaves, 2.0, pooled=True)
    got, _ = measured(leaves, plan, form)
    for x, axes, norm in zip(leaves, plan.axes, got, strict=True):
        np.testing.assert_allclose(norm, exact(x, 2.0, axes, False), rtol=2e-6)


def test_only_leaves_of_the_same_role_are_stacked():
    # Query and output kernels of equal shape are sharded differently.
    leaves = [np.ones((4, 4), np.float32)] * 6
    roles = ("q", "o", "q", "o", "q", "o")
    plan = plan_of(leaves, 2.0, pooled=True)._replace(roles=roles)
    order = power_sums.bucket_order(leaves, plan)
    assert [roles[i] for i in order] == ["q"] * 3 + ["o"] * 3
    plan = power_sums.reordered(plan, order)
    (segment,) = power_sums.segments(leaves, plan, power_sums.GPU)
    assert segment.chunks == [[0, 1, 2], [3, 4, 5]]
