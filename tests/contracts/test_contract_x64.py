"""Contract 7: with `jax_enable_x64`, updates keep their dtypes and states stay float32.

`make test-x64` runs the other contracts with it as well. Here each transformation is
traced in a scan, which rejects a state that changes its dtype, and a few are run.
"""

import chex
import every
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optclip

pytestmark = pytest.mark.usefixtures("x64")

DTYPES = ["float32", "all", *(
    pytest.param(d, marks=pytest.mark.exhaustive) for d in ("bfloat16", "float64")
)]  # fmt: skip
# A tree with both float32 and float64 leaves requires promotion of norms.
PROMOTION = {"all": "standard"}
FIELDS = {"float32", "int32"}


def kinds(tree):
    return {x.dtype.name for x in jax.tree.leaves(tree)}


def described(tree):
    """Returns structure, shapes, dtypes and weak types, which determine retracing."""
    leaves, treedef = jax.tree.flatten(jax.tree.map(jax.typeof, tree))
    return treedef, [(x.shape, x.dtype, x.weak_type) for x in leaves]


def check(tx, params, out_dtypes_of=None, promotion="strict"):
    """Traces init, two updates in a scan, and metrics, without running them."""
    seen = {}

    def scanned(params, stacked):
        start = tx.init(params)

        def body(state, grads):
            out, after = tx.update(grads, state, params)
            seen.update(out=described(out), before=described(state),
                        after=described(after))  # fmt: skip
            return after, out

        state, _ = jax.lax.scan(body, start, stacked)
        seen["start"] = described(start)
        return state, optclip.metrics(state)

    stacked = jax.tree.map(lambda x: np.stack([x, x]), params)
    with jax.numpy_dtype_promotion(promotion):
        state, metrics = jax.eval_shape(scanned, params, stacked)
    wanted = params if out_dtypes_of is None else out_dtypes_of
    assert seen["out"] == described(wanted)
    assert seen["start"] == seen["before"] == seen["after"]
    inner = getattr(state, "optimizer_state", ())
    assert kinds(state) <= FIELDS | kinds(inner)
    assert kinds(metrics) <= FIELDS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", every.DISTINCT)
def test_updates_and_state_keep_their_dtypes(name, dtype):
    promotion = PROMOTION.get(dtype, "strict")
    check(every.EVERY[name](), every.numbers(dtype), promotion=promotion)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "all"])
@pytest.mark.parametrize("name", every.VARIANTS)
def test_options_keep_the_dtypes(name, dtype):
    params = every.numbers(dtype)
    wanted = params
    if name.endswith("update_dtype"):  # float32 or wider
        wanted = jax.tree.map(
            lambda x: x.astype(np.promote_types(x.dtype, "f4")), params
        )
    promotion = PROMOTION.get(dtype, "strict")
    check(every.VARIANTS[name](), params, wanted, promotion)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(np.float64, id="numpy"),
        pytest.param(jnp.float64, marks=pytest.mark.exhaustive, id="jax"),
    ],
)
@pytest.mark.parametrize("name", every.NUMERIC)
def test_float64_arguments_do_not_change_dtypes_of_updates_and_state(name, kind):
    tx = every.with_numbers(name, kind)
    check(tx, every.numbers("float32"), promotion="standard")


# Each keeps a different kind of memory.
RUN = ("autoclip-all", "clip_by_value", "scale_by_stable_adam", "skip_steps",
       "spectral_clip", "u_clip")  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in RUN else pytest.mark.exhaustive)
        for n in every.EVERY
    ],
)
def test_x64_traces_once_and_matches_float32(name):
    tx, params = every.EVERY[name](), every.numbers("float32", seed=9)
    grads = [every.numbers("float32", s, seed=i) for i, s in enumerate((1, 30, 1e-3))]

    def steps(update):
        state, outs = tx.init(params), []
        for g in grads:
            out, state = update(g, state, params)
            outs.append(out)
        return outs, state

    chex.clear_trace_counter()
    wide = steps(jax.jit(chex.assert_max_traces(tx.update, n=1)))
    with jax.enable_x64(False):
        narrow = steps(jax.jit(tx.update))
    chex.assert_trees_all_equal_dtypes(wide, narrow)
    chex.assert_trees_all_close(wide, narrow, rtol=1e-5, atol=1e-7)


def loss_fn(params, x):
    return sum(jnp.sum(p).astype(jnp.float32) for p in params.values()) * x


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "all"])
def test_functions_keep_the_dtypes(dtype):
    grads = every.numbers(dtype)
    norm = "float32" if dtype in ("float32", "bfloat16") else "float64"
    clipped, length = jax.eval_shape(lambda g: optclip.clip_grad_norm(g, 1.0), grads)
    assert (described(clipped), length.dtype) == (described(grads), norm)
    clipped = jax.eval_shape(lambda g: optclip.clip_grad_value(g, 1.0), grads)
    assert described(clipped) == described(grads)
    f = optclip.clipped_grad(loss_fn, 1.0, microbatch_size=2)
    means, stats = jax.eval_shape(f, grads, np.ones(3, np.float32))
    assert described(means) == described(grads)
    assert kinds(stats) <= FIELDS
    assert jax.eval_shape(optclip.norms.global_norm, grads).dtype == norm
