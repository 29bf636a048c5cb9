"""Eight devices compared with one: every transformation, layout and mode.

The quick cases cover each layout, mode and kind of state once. The slow ones cover each
layout and mode once for every transformation. The rest are exhaustive.
"""

import warnings

import adaptive
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import registry
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optclip

SHAPES = {"bias": (16,), "blocks": (8, 8, 24), "kernel": (32, 40), "scale": ()}
LAYOUTS = {
    "replicated": {k: P() for k in SHAPES},
    "fsdp": {
        "bias": P("x"), "blocks": P(None, "x"), "kernel": P("x"), "scale": P(),
    },
    "tp": {
        "bias": P("x"), "blocks": P(None, None, "x"), "kernel": P(None, "x"),
        "scale": P(),
    },
    "fsdp-tp": {
        "bias": P("y"), "blocks": P(None, "x", "y"), "kernel": P("x", "y"),
        "scale": P(),
    },
    "stacked": {"bias": P(), "blocks": P("x"), "kernel": P(), "scale": P()},
}  # fmt: skip
MODES = ("auto", "explicit", "manual-auto", "manual-specs", "manual-unchecked", "pmap")
# These need unsharded matrices, so they do not reduce over mesh axes.
WHOLE = {"spectral_clip", "spectral_clip-soft", "spectral_clip-hardcap"}


def with_names(name):
    """Returns a function of ``axis_name`` that makes a transformation."""
    if name == "skip_steps":
        return lambda axis: optclip.skip_steps(
            optax.chain(optclip.zclip(axis_name=axis), optax.adam(1e-2)),
            when=1e3,
            axis_name=axis,
        )
    if name == "u_clip":
        return lambda axis: optclip.u_clip(
            optclip.clip_by_global_norm(1.0, axis_name=axis),
            max_carry=2.0,
            axis_name=axis,
        )
    if name in WHOLE:
        return lambda axis: adaptive.build(name)
    if name in adaptive.ADAPTIVE:
        return lambda axis: adaptive.build(name, axis_name=axis)
    return lambda axis: registry.CASES[name].make(1.0, axis_name=axis)


FIXED = ["clip", "clip-leaf", "clip-label", "clip_by_block_rms", "clip_by_value",
         "soft_clip", "normalize_by_norm", "record_norms"]  # fmt: skip
NAMES = [*FIXED, *adaptive.ADAPTIVE]
QUICK = {
    ("skip_steps", "fsdp-tp", "manual-auto"), ("skip_steps", "fsdp", "explicit"),
    ("zclip", "fsdp-tp", "manual-specs"), ("adagc", "tp", "manual-unchecked"),
    ("stabilize", "fsdp-tp", "auto"), ("spam_clip", "stacked", "manual-specs"),
    ("scale_by_stable_adam", "tp", "manual-auto"), ("u_clip", "fsdp", "manual-auto"),
    ("quantile_clip", "replicated", "pmap"), ("record_norms", "stacked", "pmap"),
}  # fmt: skip


def cases():
    for i, name in enumerate(NAMES):
        for j, layout in enumerate(LAYOUTS):
            for k, mode in enumerate(MODES):
                if name in WHOLE and mode not in ("auto",):
                    continue
                if mode == "pmap" and layout not in ("replicated", "stacked"):
                    continue
                quick = (name, layout, mode) in QUICK
                once = (j - k) % 5 == i % 5 or mode == "pmap"
                slow = pytest.mark.slow if once else pytest.mark.exhaustive
                marks = () if quick else slow
                yield pytest.param(name, layout, mode, marks=marks)


def trees(seed, size):
    rng = np.random.default_rng(seed)
    return {k: np.float32(size * rng.normal(size=shape)) for k, shape in SHAPES.items()}


def two_steps(tx):
    """Two updates: for typical gradients, and for ones whose squares overflow."""

    def run(first, second, state, params):
        _, state = tx.update(first, state, params)
        return tx.update(second, state, params)

    return run


def sharded_run(name, layout, mode, args):
    specs, make = LAYOUTS[layout], with_names(name)
    two = layout == "fsdp-tp"
    shape, axes = ((4, 2), ("x", "y")) if two else ((8,), ("x",))
    kind = getattr(jax.sharding.AxisType, "Explicit" if mode == "explicit" else "Auto")
    mesh = jax.make_mesh(shape, axes, axis_types=(kind,) * len(axes))

    def place(tree):
        return jax.tree.map(
            lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, specs
        )

    if mode in ("auto", "explicit"):
        tx = make(None)
        placed = [place(a) for a in args]
        enter = getattr(jax, "set_mesh", None) or jax.sharding.use_mesh
        if mode == "auto":
            return jax.jit(two_steps(tx))(*placed[:2], tx.init(placed[2]), placed[2])
        with enter(mesh):
            state = jax.jit(tx.init)(placed[2])
            return jax.jit(two_steps(tx))(*placed[:2], state, placed[2])
    names = {"manual-auto": "auto"}.get(mode, specs)
    tx = make(names)
    state = optclip.state_specs(make(None), args[2], specs)
    run = jax.shard_map(
        two_steps(tx), mesh=mesh, in_specs=(specs, specs, state, specs),
        out_specs=(specs, state), check_vma=mode != "manual-unchecked",
    )  # fmt: skip
    return jax.jit(run)(args[0], args[1], make(None).init(args[2]), args[2])


def pmapped_run(name, layout, args):
    """Under pmap a leaf is replicated, or split along its first axis."""
    cut = {"blocks"} if layout == "stacked" else set()
    tx = with_names(name)({k: "x" if k in cut else None for k in SHAPES})
    axes = {k: 0 if k in cut else None for k in SHAPES}
    state = with_names(name)(None).init(args[2])

    def lies(x):
        if x is None or not cut:
            return None
        return 0 if jnp.shape(x) == SHAPES["blocks"] else None

    state_axes = jax.tree.map(lies, state)

    def run(first, second, state, params, _):
        short = jax.tree.map(
            lambda x, a: x if a is None else x[None], (first, second, params),
            (axes,) * 3, is_leaf=lambda x: x is None,
        )  # fmt: skip
        first, second, params = short
        state = jax.tree.map(
            lambda x, a: x if a is None else x[None], state, state_axes,
            is_leaf=lambda x: x is None,
        )  # fmt: skip
        return two_steps(tx)(first, second, state, params)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out, after = jax.pmap(
            run, axis_name="x", in_axes=(axes, axes, state_axes, axes, 0), out_axes=0
        )(args[0], args[1], state, args[2], np.arange(8))

    def joined(x, a):
        if x is None:
            return None
        return x[0] if a is None else np.concatenate(list(x))

    is_none = {"is_leaf": lambda x: x is None}
    return (
        jax.tree.map(lambda a, x: joined(x, a), axes, out, **is_none),
        jax.tree.map(
            lambda s, x: joined(x, lies(s)), state, after, **is_none
        ),
    )  # fmt: skip


@pytest.mark.parametrize(("name", "layout", "mode"), [*cases()])
def test_eight_devices_match_one_device(name, layout, mode):
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    args = (trees(1, 3.0), trees(2, 1e20 if name not in WHOLE else 30.0), trees(3, 1.0))
    tx = with_names(name)(None)
    wanted = jax.jit(two_steps(tx))(*args[:2], tx.init(args[2]), args[2])
    if mode == "pmap":
        got = pmapped_run(name, layout, args)
    else:
        got = sharded_run(name, layout, mode, args)
    pairs = zip(
        jax.tree.leaves(jax.device_get(got)), jax.tree.leaves(jax.device_get(wanted)),
        strict=True,
    )  # fmt: skip
    for pair in pairs:
        a, b = (np.asarray(x, np.float64) for x in pair)
        unit = np.max(np.abs(np.where(np.isfinite(b), b, 0)), initial=1e-30)
        # An iteration on matrices amplifies the rounding error of its sums.
        near = 1e-4 if name in WHOLE else 1e-6
        chex.assert_trees_all_close(a / unit, b / unit, rtol=near, atol=near)
