"""The speed contract, checked on the compiled program rather than by timing.

A jitted, donated AdamW step with a clip is compared with the same step without one, on
8.4 million parameters in 20 leaves of repeated shapes.
"""

import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip

BLOCKS = 4
WIDTH = 1024
SHAPES = {"up": (WIDTH, WIDTH), "down": (WIDTH, WIDTH), "bias": (WIDTH,)}
SHAPES |= {"scale": (256,), "shift": (256,)}
# Layers stacked for `jax.lax.scan`: the same sizes, with four layers per array.
STACKED = SHAPES | {"up": (4, 256, 1024), "down": (4, 512, 512)}
# Unit scope allocates this many float32 per output unit. Relative to the gradients that
# decreases with the fan-in: for 1,024 and float32, 9 / 1024 = 0.9%.
FLOATS_PER_UNIT = 9

CLIPS = {
    "tree": (optclip.clip_by_global_norm, SHAPES),
    "leaf": (optclip.clip_by_leaf_norm, SHAPES),
    "layer": (
        functools.partial(optclip.clip_per_layer, stack_axes={"up|down": 1}),
        STACKED,
    ),
    "unit": (optclip.clip_by_unit_norm, SHAPES),
    "agc": (optclip.adaptive_grad_clip, SHAPES),
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
each_clip = pytest.mark.parametrize("name", CLIPS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def abstract(shapes, dtype=jnp.float32):
    return {
        f"block{i}": {k: jax.ShapeDtypeStruct(s, dtype) for k, s in shapes.items()}
        for i in range(BLOCKS)
    }


def nbytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def compiled_step(*clips, shapes, dtype, wrap=lambda optimizer: optimizer):
    """Compiles AdamW's step after ``clips``, for abstract gradients."""
    params, grads = abstract(shapes), abstract(shapes, DTYPES[dtype])
    optimizer = wrap(optax.chain(*clips, optax.adamw(1e-3)))

    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(optimizer.init, params)
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, grads)
    quick = "xla_cpu_use_fusion_emitters=false" in os.environ["XLA_FLAGS"]
    return lowered.compile({"xla_cpu_use_fusion_emitters": True} if quick else None)


@functools.lru_cache
def bare_costs(stacked, dtype):
    return costs(compiled_step(shapes=STACKED if stacked else SHAPES, dtype=dtype))


@functools.lru_cache
def clip_costs(name, dtype):
    clip, shapes = build(name, dtype)
    return costs(compiled_step(clip, shapes=shapes, dtype=dtype))


def costs(compiled):
    """Returns (temporary bytes, bytes accessed)."""
    cost = compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost  # older JAX returns a list
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    return temporaries, cost["bytes accessed"]


def build(name, dtype):
    make, shapes = CLIPS[name]
    wide = jnp.float32 if dtype == "bfloat16" else None
    return make(0.01, update_dtype=wide), shapes


def times_one_scale():
    """The simplest possible clip: multiplies each leaf by one number."""

    def update(updates, state, params=None):
        del params
        squares = sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(updates))
        scale = 0.01 / jnp.sqrt(squares)
        return jax.tree.map(lambda x: x * scale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


@pytest.fixture(scope="module")
def fusing_compiler():
    """Skips if XLA does not fuse scaling into the optimizer (JAX 0.6 on the CPU)."""
    compiled = compiled_step(times_one_scale(), shapes=SHAPES, dtype="float32")
    if costs(compiled)[0] > 0.02 * nbytes(abstract(SHAPES)):
        pytest.skip("this XLA writes out the product of leaves and a scale")


@pytest.fixture
def common_branch_only(monkeypatch):
    """Compiles only the branch that is taken if power sums do not overflow.

    The other branch makes another pass over the gradients on the rare steps whose
    squares overflow, and XLA's cost analysis adds up both branches.
    """
    jax.clear_caches()  # `measure` is jitted, and may have been traced with both

    def take_common_branch(predicate, careful, common, *operands, **options):
        del careful, options
        # The predicate stays in the program, as in the actual step.
        predicate, operands = jax.lax.optimization_barrier((predicate, operands))
        return common(*operands)

    monkeypatch.setattr(jax.lax, "cond", take_common_branch)
    yield
    jax.clear_caches()


@each_dtype
@each_clip
@pytest.mark.usefixtures("fusing_compiler")
def test_clip_needs_no_temporary_as_large_as_a_leaf(name, dtype):
    shapes = CLIPS[name][1]
    bare, _ = bare_costs(shapes is STACKED, dtype)
    ours, _ = clip_costs(name, dtype)
    allowed = 0.02 * nbytes(abstract(shapes, DTYPES[dtype]))
    assert ours - bare <= allowed, f"{ours - bare} bytes more, {allowed:.0f} allowed"


# Allowed copies of the gradients. `stabilize` writes out the update to measure it; on a
# CPU, XLA also writes out a part of it.
WRAPPERS = {"skip_steps": (optclip.skip_steps, 0), "stabilize": (optclip.stabilize, 2)}


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.usefixtures("fusing_compiler")
def test_wrappers_copy_no_moments(name):
    wrap, copies = WRAPPERS[name]
    bare, _ = bare_costs(False, "float32")
    ours, _ = costs(compiled_step(shapes=SHAPES, dtype="float32", wrap=wrap))
    assert ours - bare <= (copies + 0.02) * nbytes(abstract(SHAPES))


@each_dtype
@pytest.mark.parametrize("name", ["unit", "agc"])
@pytest.mark.usefixtures("fusing_compiler")
def test_unit_clip_allocates_a_few_floats_per_unit(name, dtype):
    bare, _ = bare_costs(False, dtype)
    ours, _ = clip_costs(name, dtype)
    floats = (ours - bare) / 4 / (2 * BLOCKS * WIDTH)
    assert floats <= FLOATS_PER_UNIT, floats


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float32") for name in CLIPS), ("tree", "bfloat16"), ("agc", "bfloat16")],
)
@pytest.mark.usefixtures("fusing_compiler", "common_branch_only")
def test_clip_adds_one_pass_over_the_gradients(name, dtype):
    """Accesses the bytes of AdamW plus one pass over the gradients, within 2%.

    A patch of `jax.lax.cond` removes the rarely taken branch of `optclip`'s sums,
    because XLA's analysis counts every branch as if it were taken. AGC may also read
    the parameters once more.
    """
    clip, shapes = build(name, dtype)
    _, bare = bare_costs(shapes is STACKED, dtype)
    _, ours = costs(compiled_step(clip, shapes=shapes, dtype=dtype))
    allowed = bare + nbytes(abstract(shapes, DTYPES[dtype]))
    if name == "agc":
        allowed += nbytes(abstract(shapes))
    assert ours <= 1.02 * allowed, f"{ours / bare:.3f} of bare, {ours / allowed:.3f}"


@each_dtype
def test_optax_exceeds_both_bounds(dtype):
    clip = optax.clip_by_global_norm(0.01)
    bare_temporaries, bare_bytes = bare_costs(False, dtype)
    temporaries, accessed = costs(compiled_step(clip, shapes=SHAPES, dtype=dtype))
    read = nbytes(abstract(SHAPES, DTYPES[dtype]))
    assert temporaries - bare_temporaries > 0.5 * read
    assert accessed > 1.1 * (bare_bytes + read)


def size_of(shape):
    return int(np.prod([int(n) for n in re.findall(r"\d+", shape)], initial=1))


def leaf_reductions(compiled):
    """Counts operations that reduce an array as large as a matrix to a few numbers."""
    text = compiled.as_text()
    entry = text[text.index("\nENTRY ") :].split("\n}")[0]
    pattern = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
    lines = [m.groups() for m in map(pattern.match, entry.splitlines()) if m]
    sizes = {
        name: sum(size_of(s) for s in re.findall(r"\[([\d,]*)\]", kind))
        for name, kind, _, _ in lines
    }
    matrix = size_of(str(SHAPES["up"]))
    found = 0
    for name, _, operation, rest in lines:
        if operation not in ("fusion", "reduce", "call", "custom-call", "dot"):
            continue
        operands = re.findall(r"%?([\w.-]+)", rest.split("), ")[0])
        reads = max((sizes.get(o, 0) for o in operands), default=0)
        found += reads >= matrix and sizes[name] < matrix // 100
    return found


def test_record_norms_next_to_a_clip_reduces_each_leaf_once():
    clip = optclip.clip_by_global_norm(1.0)
    count = functools.partial(compiled_step, shapes=SHAPES, dtype="float32")
    bare, alone = leaf_reductions(count()), leaf_reductions(count(clip))
    both = leaf_reductions(count(optclip.record_norms(), clip))
    assert bare == 0
    assert alone >= 2 * BLOCKS / 8  # leaves of equal shape may be reduced together
    assert both == alone


def test_second_pass_over_the_gradients_is_detected():
    """A norm of another order can't share a pass, so the count increases."""
    clip = optclip.clip_by_global_norm(1.0)
    count = functools.partial(compiled_step, shapes=SHAPES, dtype="float32")
    alone = leaf_reductions(count(clip))
    assert leaf_reductions(count(optclip.record_norms(ord=1), clip)) > alone


@each_dtype
def test_changing_the_threshold_compiles_nothing_new(dtype):
    traces = []

    @jax.jit
    def step(threshold, grads):
        traces.append(None)
        tx = optclip.clip_by_global_norm(threshold)
        return tx.update(grads, tx.init(grads))[0]

    grads = jnp.ones(4, DTYPES[dtype])
    for threshold in (1.0, 0.5, 0.25):
        clipped = step(threshold, grads)
        np.testing.assert_array_equal(clipped, grads * (threshold / 2))
    assert len(traces) == 1


def test_schedule_changes_the_threshold_in_one_trace():
    traces = []
    schedule = optax.linear_schedule(2.0, 1.0, 2)
    tx = optclip.clip_by_global_norm(schedule)

    @jax.jit
    def step(grads, state):
        traces.append(None)
        return tx.update(grads, state)[1]

    grads = jnp.ones(4)
    state, seen = tx.init(grads), []
    for _ in range(3):
        state = step(grads, state)
        seen.append(float(state.threshold))
    # At the first step the norm does not exceed the threshold, so nothing is clipped.
    assert seen[1:] == [1.5, 1.0]
    assert len(traces) == 1
