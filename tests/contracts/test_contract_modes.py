"""Contract 6: a jitted step and its metrics pass JAX's debugging modes.

The modes are strict dtype promotion, no rank promotion, `jax.transfer_guard`,
`jax.debug_nans`, `jax.debug_infs` and `jax.checking_leaks`. In all of them these must
work: ``init`` and ``update`` under `jax.jit`, for finite gradients of any size, and
`metrics`, `leaf_metrics` and `nonfinite_leaves` of the state, outside of jit.

Two modes do not support an ``update`` outside of jit. A transfer guard rejects every
constant there, including those of Optax's optimizers. `jax.debug_infs` checks each
operation, and an unknown threshold is infinite until it is stored.
"""

import contextlib

import every
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip

MODES = {
    "strict_promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
    "transfer_guard": lambda: jax.transfer_guard("disallow"),
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "leaks": jax.checking_leaks,
}
# Leak checking happens during tracing and doubles its time.
AT_ONCE = [mode for mode in MODES if mode != "leaks"]
EAGER = ("strict_promotion", "rank_promotion", "debug_nans")
# Typical gradients, and the hardest starts for a rule: a zero, huge or tiny first norm.
SIZES = (1.0, 1e30, 0.0, 1e-30, 1.0, 3e37)
HARD_STARTS = ((0.0, 0.0, 1.0), (1e30, 1.0, 0.0), (1e-30, 1e30, 1.0))


@contextlib.contextmanager
def switched_on(*modes):
    with contextlib.ExitStack() as stack:
        for mode in modes:
            stack.enter_context(MODES[mode]())
        yield


def read(state, params):
    """Returns all logged metrics of a state, including per-leaf ones if it has them."""
    logged = optclip.metrics(state)
    for reader in (optclip.leaf_metrics, optclip.nonfinite_leaves):
        try:
            found = reader(state, params)
        except ValueError as error:
            if "`opt_state` " not in str(error):  # other than "the state has none"
                raise
            continue
        if reader is optclip.leaf_metrics:
            logged |= found
    return logged


def run(tx, modes, dtype, starts=(SIZES,), wrap=jax.jit):
    params = every.on_device(dtype, seed=9)
    grads = {s: every.on_device(dtype, s, seed=1) for s in sum(starts, ())}
    init, update = wrap(tx.init), wrap(tx.update)
    with switched_on(*modes):
        for sizes in starts:
            state = init(params)
            for size in sizes:
                out, state = update(grads[size], state, params)
            logged = read(state, params)
    for tree in (out, logged):
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(tree)), tree


@pytest.mark.parametrize("name", every.DISTINCT)
def test_jitted_step_and_metrics_pass_all_modes_at_once(name):
    run(every.EVERY[name](), AT_ONCE, "mixed", (SIZES, *HARD_STARTS))


@pytest.mark.exhaustive
@pytest.mark.parametrize("mode", AT_ONCE)
@pytest.mark.parametrize("name", every.EVERY)
def test_jitted_step_passes_each_mode(name, mode):
    run(every.EVERY[name](), [mode], "mixed", (SIZES, *HARD_STARTS))


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", every.DISTINCT)
def test_one_dtype_passes_all_modes_at_once(name, dtype):
    run(every.EVERY[name](), AT_ONCE, dtype, (SIZES, *HARD_STARTS))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", every.VARIANTS)
def test_options_pass_all_modes_at_once(name):
    run(every.VARIANTS[name](), AT_ONCE, "mixed", (SIZES, *HARD_STARTS))


@pytest.mark.exhaustive
@pytest.mark.parametrize("mode", EAGER)
@pytest.mark.parametrize("name", every.EVERY)
def test_unjitted_step_passes_each_mode(name, mode):
    run(every.EVERY[name](), [mode], "mixed", wrap=lambda f: f)


# Each covers a different part of the library, or holds a function that is called once.
LEAKY = ("adaptive_grad_clip", "clip_by_value", "record_norms", "skip_steps",
         "stabilize",
         "scale_by_stable_adam", "spectral_clip-soft", "u_clip", "zclip")  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in LEAKY else pytest.mark.exhaustive)
        for n in (*every.EVERY, *every.VARIANTS)
    ],
)
def test_no_leaked_tracers_and_no_implicit_dtype_promotion(name):
    params = every.numbers("mixed")

    def traced(params):
        tx = (every.EVERY.get(name) or every.VARIANTS[name])()
        state = tx.init(params)
        out, state = tx.update(params, state, params)
        return out, state, optclip.metrics(state)

    with switched_on("strict_promotion", "rank_promotion", "leaks"):
        jax.eval_shape(traced, params)


# Under strict promotion, arguments must be float32, or become so without float64.
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(np.float32, marks=pytest.mark.slow, id="numpy"),
        pytest.param(np.float64, marks=pytest.mark.slow, id="numpy-wide"),
        pytest.param(jnp.float32, id="jax"),
    ],
)
@pytest.mark.parametrize("name", every.NUMERIC)
def test_array_arguments_cause_no_implicit_dtype_promotion(name, kind):
    params = every.numbers("mixed")
    with switched_on("strict_promotion", "rank_promotion"):
        tx = every.with_numbers(name, kind)
        jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), params)


def loss_fn(params, x):
    parts = jax.tree.map(lambda p: jnp.sum(p.astype(jnp.float32)), params)
    return jnp.tanh(sum(jax.tree.leaves(parts)) * x)


FUNCTIONS = {
    "clip_grad_norm": lambda g: optclip.clip_grad_norm(g, 1.0),
    "clip_grad_norm-inf": lambda g: optclip.clip_grad_norm(g, 1.0, float("inf")),
    "clip_grad_value": lambda g: optclip.clip_grad_value(g, 1.0),
    "clipped_grad": lambda g: optclip.clipped_grad(loss_fn, 1.0)(
        g, g["blocks"].reshape(-1)
    ),
    "clipped_grad-microbatch": lambda g: optclip.clipped_grad(
        loss_fn, 1.0, microbatch_size=5
    )(g, g["blocks"].reshape(-1)),
    "global_norm": optclip.norms.global_norm,
    "leaf_norms": optclip.norms.leaf_norms,
    "unit_norms": optclip.norms.unit_norms,
    "global_norm-1": lambda g: optclip.norms.global_norm(g, ord=1),
    "global_norm-inf": lambda g: optclip.norms.global_norm(g, ord=np.inf),
    "leaf_norms-rms": lambda g: optclip.norms.leaf_norms(g, ord="rms"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_pass_all_modes_at_once(name):
    function, first = jax.jit(FUNCTIONS[name]), every.on_device("mixed")
    for size in (1.0, 0.0, 1e30, 1e-30, 3e37):
        grads = every.on_device("mixed", size)
        with switched_on(*AT_ONCE):
            out = function(grads)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(out))
    with switched_on(*MODES):  # leak checking keeps no trace
        jax.eval_shape(FUNCTIONS[name], first)


def test_suggest_threshold_from_a_state_passes_all_modes_at_once():
    tx = optclip.autoclip(window=16)
    params = every.on_device("mixed")
    grads = [every.on_device("mixed", 1.0 + i / 16, seed=i) for i in range(16)]
    update = jax.jit(tx.update)
    with switched_on(*AT_ONCE):
        state = jax.jit(tx.init)(params)
        for g in grads:
            _, state = update(g, state, params)
        suggestion = optclip.diagnosis.suggest_threshold(state)
    assert suggestion.samples > 0


@contextlib.contextmanager
def explicit_fetches(monkeypatch):
    """Allows only `jax.device_get` to fetch arrays, like a transfer guard on a GPU.

    On a CPU, JAX's guard allows every fetch because it is free.
    """
    inside, fetch = [], jax.device_get

    def device_get(x):
        inside.append(x)
        try:
            return fetch(x)
        finally:
            inside.pop()

    def guarded(function):
        def call(x, *args, **options):
            assert inside or not isinstance(x, jax.Array), "fetched without saying so"
            return function(x, *args, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_get", device_get)
        for name in ("asarray", "array"):
            patch.setattr(np, name, guarded(getattr(np, name)))
        array = type(jnp.zeros(()))
        for name in ("__float__", "__int__", "__bool__", "item", "tolist"):
            patch.setattr(array, name, guarded(getattr(array, name)))
        yield


READ = ("clip-leaf", "clip-layer", "record_norms", "skip_steps", "stabilize")


@pytest.mark.parametrize("name", READ)
def test_readers_fetch_the_state_explicitly(name, monkeypatch):
    tx, params = every.EVERY[name](), every.on_device("mixed")
    bad = params | {"kernel": params["kernel"] * jnp.nan}
    update, state = jax.jit(tx.update), jax.jit(tx.init)(params)
    for grads in (params, bad):
        _, state = update(grads, state, params)
    with explicit_fetches(monkeypatch):
        read(state, params)
        found = optclip.nonfinite_leaves(state, params)
    assert [c.path for c in found] == ["kernel"]


CHAINS = {
    "chain": lambda tx: optax.chain(tx, optax.sgd(0.1)),
    "partition": lambda tx: optax.partition(
        {"a": tx, "b": optax.sgd(0.1)},
        {"blocks": "a", "kernel": "a", "bias": "b", "scale": "b"},
    ),
    "masked": lambda tx: optax.masked(tx, {k: k != "bias" for k in every.SHAPES}),
}


@pytest.mark.parametrize("wrapper", CHAINS)
def test_optax_wrappers_pass_under_a_transfer_guard(wrapper):
    tx = CHAINS[wrapper](optclip.clip_by_leaf_norm(1.0, nonfinite="skip"))
    run(tx, ["transfer_guard", "debug_nans", "debug_infs"], "mixed")
