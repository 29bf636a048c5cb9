"""Saved states round-trip bitwise and resume; mismatched states raise errors."""

import functools
import pickle

import adaptive
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import registry

import optclip
from optclip import rules, scopes

PARAMS = adaptive.params()
FIXED = list(registry.CASES)


def build(name):
    return registry.CASES[name].make(1.0) if name in FIXED else adaptive.build(name)


def by_pickle(state, template, path):
    del template, path
    return pickle.loads(pickle.dumps(jax.device_get(state)))


def by_msgpack(state, template, path):
    del path
    serialization = pytest.importorskip("flax.serialization")
    return serialization.from_bytes(template, serialization.to_bytes(state))


def by_orbax(state, template, path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    template = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), template
    )
    with checkpoint.StandardCheckpointer() as saver:
        saver.save(path / "state", state)
        saver.wait_until_finished()
        return saver.restore(path / "state", template)


WAYS = [by_pickle, by_msgpack, by_orbax]


def check_same(back, state):
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for got, wanted in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
        got, wanted = np.asarray(got), np.asarray(wanted)
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
        assert got.tobytes() == wanted.tobytes()


def any_values(state):
    """A state of the same layout with values that text or rounding would alter."""
    rng = np.random.default_rng(3)

    def values(x):
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jnp.asarray(rng.integers(-(2**31), 2**31, x.shape), x.dtype)
        odd = rng.choice([0.1, -0.0, np.nan, np.inf, 3e38, 1.2e-38], x.shape)
        return jnp.asarray(odd, x.dtype)

    return jax.tree.map(values, state)


@pytest.fixture(scope="module")
def every_state():
    states = {n: build(n).init(PARAMS) for n in [*FIXED, *adaptive.ADAPTIVE]}
    states["unrecorded"] = optclip.clip_by_value(1.0).init(PARAMS)
    return {name: any_values(state) for name, state in states.items()}


def test_every_public_state_is_covered(every_state):
    public = {
        getattr(optclip.states, n)
        for n in optclip.states.__all__
        if n.endswith("State")
    }
    assert {type(state) for state in every_state.values()} == public


@pytest.mark.parametrize("through", WAYS)
def test_every_state_round_trips_bitwise(every_state, through, tmp_path):
    template = jax.tree.map(jnp.zeros_like, every_state)
    check_same(through(every_state, template, tmp_path), every_state)


@pytest.mark.parametrize(
    "name",
    [*adaptive.ADAPTIVE, *(pytest.param(n, marks=pytest.mark.slow) for n in FIXED)],
)
def test_donated_run_resumed_from_a_file_is_bitwise_identical(name, tmp_path):
    tx = build(name)
    traces = []

    def update(updates, state):
        traces.append(None)
        return tx.update(updates, state, PARAMS)

    step = jax.jit(update, donate_argnums=1)

    def run(state, seeds):
        for seed in seeds:
            out, state = step(adaptive.gradients(seed, 10.0**seed), state)
        return jax.device_get((out, state))

    whole = run(tx.init(PARAMS), range(4))
    _, half = run(tx.init(PARAMS), range(2))
    for through in WAYS:
        back = through(half, tx.init(PARAMS), tmp_path)
        check_same(back, half)
        # Orbax commits arrays to a device, which would make JAX compile again.
        check_same(run(jax.device_get(back), (2, 3)), whole)
    assert len(traces) == 1


# All state layouts of clips without memory.
CHAIN = optax.chain(
    optclip.record_norms(),
    optclip.clip_by_value(1.0),
    optclip.clip_by_value(1.0, record=True),
    optclip.clip_by_unit_norm(1.0),
    optclip.clip_by_leaf_norm(1.0),
    optclip.clip_per_layer(0.5, registry.STACKED),
    optclip.clip_by_global_norm(0.5),
    optax.adam(1e-2),
)


@functools.cache
def chain_step():
    return jax.jit(CHAIN.update)


@pytest.mark.parametrize("through", WAYS)
def test_chain_continues_from_a_restored_state(through, tmp_path):
    _, half = chain_step()(adaptive.gradients(0), CHAIN.init(PARAMS), PARAMS)
    back = through(half, CHAIN.init(PARAMS), tmp_path)
    check_same(back, half)
    wanted = chain_step()(adaptive.gradients(1), half, PARAMS)
    check_same(chain_step()(adaptive.gradients(1), back, PARAMS), wanted)


ONE_OF_EACH = ["clip-leaf", "record_norms", "skip_steps", "stabilize", "u_clip",
               "scale_by_stable_adam", "spectral_clip"]  # fmt: skip


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_states_of_numpy_arrays_work_outside_jit(name):
    tx = build(name)
    state = jax.device_get(tx.init(PARAMS))
    # Tracing is fast, and the state is not an argument, so it stays a NumPy array.
    out, after = jax.eval_shape(lambda: tx.update(PARAMS, state, PARAMS))
    chex.assert_trees_all_equal_shapes_and_dtypes(out, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_state_of_the_wrong_type_raises_an_error_naming_the_expected_type(name):
    tx = build(name)
    valid = tx.init(PARAMS)
    untyped = dict(valid._asdict())  # what Orbax restores without a target
    for state in (optax.EmptyState(), untyped, [valid], None):
        kinds = f"`{type(valid).__name__}` that `init` .* got `{type(state).__name__}`"
        with pytest.raises(TypeError, match=rf"`state` must be the {kinds}.*again"):
            jax.eval_shape(lambda s, tx=tx: tx.update(PARAMS, s, PARAMS), state)


def leaf_clip(**options):
    return optclip.stabilize(optax.sgd(0.1), scope=scopes.leaf(), **options)


def skipping(**options):
    return optclip.skip_steps(optax.sgd(0.1), **options)


WINDOW = optclip.autoclip(window=8)


@pytest.mark.parametrize(
    ("tx", "other", "message"),
    [
        (optclip.autoclip(window=16), WINDOW,
         r"`rule_state/0/recent_norms` must have shape \(16,\), got \(8,\)"),
        (optclip.zclip(), WINDOW, "it has no `rule_state/0/mean_norm`"),
        (optclip.clip_by_rule(1.0), WINDOW,
         "it has an unexpected `rule_state/0/recent_norms`"),
        (optclip.clip_by_rule(1.0), optclip.clip_by_leaf_norm(1.0),
         "it has an unexpected `groups/group_n"),
        (optclip.clip_by_leaf_norm(1.0), optclip.clip_by_rule(1.0),
         "it has no `groups/group"),
        (optclip.clip_by_unit_norm(1.0), optclip.clip_by_rule(1.0),
         "nested differently"),
        (optclip.spectral_clip(1.0), optclip.zclip(),
         "it has an unexpected `rule_state/0/mean_norm"),
        (leaf_clip(), optclip.stabilize(optax.sgd(0.1)),
         r"`rule_state/0/log_quantile` must have shape \(4,\), got \(\)"),
        (optclip.u_clip(optclip.zclip()), optclip.u_clip(optclip.clip_by_rule(1.0)),
         "it has no `rule_state/0/mean_norm`"),
        (skipping(), skipping(keep_last=4),
         r"`last_bad/bad_step` must have shape \(8,\), got \(4,"),
        (skipping(), skipping(when=1.0), "it has no `norm_rule_state/recent_norms`"),
        (skipping(when=rules.window_sigma(6.0, window=16)), skipping(),
         r"`norm_rule_state/recent_norms` must have shape \(16,\), got \(128,\)"),
    ],
)  # fmt: skip
def test_state_from_other_options_raises_an_error_naming_the_difference(
    tx, other, message
):
    state = other.init(PARAMS)
    with pytest.raises(ValueError, match=f"does not fit here: .*{message}") as error:
        jax.eval_shape(tx.update, PARAMS, state, PARAMS)
    assert "Call `init` again" in str(error.value)
    assert "eqx.filter" not in str(error.value)  # only suggested for other parameters


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_state_of_other_parameters_raises_an_error(name):
    tx = build(name)
    state = tx.init({**PARAMS, "more": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"`init` saw 5|`(carry|stable_mu)/more`"):
        jax.eval_shape(tx.update, PARAMS, state, PARAMS)


def test_missing_or_extra_field_of_an_older_layout_is_named():
    tx = optclip.clip_by_rule(1.0)
    state = tx.init(PARAMS)
    lacks = state.nonfinite._asdict()
    lacks.pop("nonfinite_steps")
    for seen, message in (
        (lacks, "it has no `nonfinite/nonfinite_steps`"),
        (
            {**state.nonfinite._asdict(), "more": 0.0},
            "it has an unexpected `nonfinite/more`",
        ),
        (state.nonfinite._asdict(), "its arrays are nested differently"),
    ):
        with pytest.raises(ValueError, match=message):
            tx.update(PARAMS, state._replace(nonfinite=seen), PARAMS)
