"""Gradients for only a part of the parameters that `init` saw."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip
from optclip import scopes

# Like an Equinox model: the leaves include a Python float and a frozen array.
MODEL = {"eps": 1e-5, "frozen": jnp.ones(3), "w": jnp.ones(2), "b": jnp.ones(2)}
TRAINED = {"eps": None, "frozen": None, "w": MODEL["w"], "b": MODEL["b"]}


def gradients(size=1.0):
    w, b = jnp.array([3.0, 4.0]), jnp.array([0.0, 12.0])
    return {"eps": None, "frozen": None, "w": size * w, "b": size * b}


WHOLE = {
    "clip": lambda: optclip.clip_by_rule(6.5),
    "clip_by_value": lambda: optclip.clip_by_value(3.0, record=True),
    "clip_by_unit_norm": lambda: optclip.clip_by_unit_norm(3.0),
    "zclip": lambda: optclip.zclip(warmup_steps=1, max_grad_norm=None),
    "spectral_clip": lambda: optclip.spectral_clip(3.0),
    "normalize_by_norm": optclip.normalize_by_norm,
    "record_norms": optclip.record_norms,
    "skip_steps": lambda: optclip.skip_steps(
        optax.chain(optclip.clip_by_rule(6.5), optax.sgd(1.0))
    ),
}


def run(tx, state, steps=3):
    step = jax.jit(tx.update)
    for i in range(steps):
        out, state = step(gradients(1 + i), state, TRAINED)
    return out, state


@pytest.mark.parametrize("name", WHOLE)
def test_partial_gradients_are_treated_as_if_init_saw_only_that_part(name):
    tx = WHOLE[name]()
    out, state = run(tx, tx.init(MODEL))
    wanted, other = run(tx, tx.init(TRAINED))
    jax.tree.map(np.testing.assert_array_equal, out, wanted)
    mine, theirs = jax.device_get((optclip.metrics(state), optclip.metrics(other)))
    assert mine == theirs
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(MODEL))
    bad = gradients() | {"w": jnp.array([jnp.nan, jnp.inf])}
    _, state = jax.jit(tx.update)(bad, state, TRAINED)
    (leaf,) = optclip.nonfinite_leaves(state, MODEL)
    assert leaf[:5] == ("w", 3, 1, 1, 0)


def test_record_norms_of_partial_updates_assigns_norms_to_the_right_leaves():
    _, state = run(optclip.record_norms(), optclip.record_norms().init(MODEL), steps=1)
    rows = optclip.leaf_metrics(state, MODEL)
    assert rows == {"b/norm": 12, "eps/norm": 0, "frozen/norm": 0, "w/norm": 5}


def test_worst_leaf_of_a_spike_is_correct_with_partial_updates():
    tx = optclip.skip_steps(optax.sgd(1.0), when=20.0)
    state = tx.init(MODEL)
    _, state = jax.jit(tx.update)(gradients(10.0), state, TRAINED)
    (leaf,) = optclip.nonfinite_leaves(state, MODEL)
    assert (leaf.path, leaf.norm) == ("b", 130.0)


BY_LEAF = {
    "leaf": lambda: optclip.clip_by_leaf_norm(1.0),
    "label": lambda: optclip.clip_by_rule(1.0, scope=scopes.label(lambda path: path)),
    "layer": lambda: optclip.clip_per_layer(1.0, 0),
    "unit": lambda: optclip.zclip(scope=scopes.unit()),
    "element": lambda: optclip.spam_clip(),
    "u_clip": lambda: optclip.u_clip(optclip.clip_by_rule(1.0)),
    "stable_adam": lambda: optclip.scale_by_stable_adam(),
}


@pytest.mark.parametrize("name", BY_LEAF)
def test_per_leaf_memory_raises_an_error_that_explains_how_to_call_init(name):
    tx = BY_LEAF[name]()
    with pytest.raises(ValueError, match=r"eqx\.filter\(model, eqx\.is_inexact_array"):
        tx.update(gradients(), tx.init(MODEL), TRAINED)


@pytest.mark.parametrize("name", WHOLE)
def test_missing_leaf_is_still_an_error(name):
    tx = WHOLE[name]()
    state = tx.init({**TRAINED, "more": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"`init` saw 3 leaves .* updates have 2"):
        tx.update({"w": TRAINED["w"], "b": TRAINED["b"]}, state)


def test_more_leaves_than_init_saw_are_an_error():
    tx = optclip.clip_by_rule(1.0)
    with pytest.raises(ValueError, match=r"`init` saw 2 leaves .* updates have 4"):
        tx.update(MODEL, tx.init(TRAINED), MODEL)


def test_equinox_model_passed_whole_to_init_trains():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.Sequential(
        [eqx.nn.Linear(2, 3, key=jax.random.key(0)), eqx.nn.LayerNorm(3)]
    )
    tx = optax.chain(optclip.record_norms(), optclip.clip_by_rule(0.1), optax.sgd(0.1))
    other = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1))
    frozen = eqx.tree_at(lambda m: m.layers[1].weight, model, replace_fn=lambda x: None)
    ours, theirs = tx.init(model), other.init(model)

    def loss(trained, rest, x):
        return jnp.sum(eqx.combine(trained, rest)(x) ** 2)

    trained = eqx.filter(frozen, eqx.is_inexact_array)
    grads = eqx.filter_grad(loss)(trained, model, jnp.ones(2))
    got, ours = tx.update(grads, ours)
    wanted, _ = other.update(grads, theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, wanted)
    rows = optclip.leaf_metrics(ours, model)
    assert rows["layers/1/weight/norm"] == 0 < rows["layers/0/weight/norm"]


PAIR = optax.LookaheadParams.init_synced({"w": jnp.ones(2), "b": jnp.ones(2)})
FAST = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([0.0, 12.0])}
IN_FRONT = {
    "clip": lambda: optclip.clip_by_rule(6.5),
    "leaf": lambda: optclip.clip_by_leaf_norm(6.0),
    "label by tree": lambda: optclip.clip_by_rule(
        6.0, scope=scopes.label({"w": "x", "b": "y"})
    ),
    "layer": lambda: optclip.clip_per_layer(6.0, 0),
    "unit": lambda: optclip.adaptive_grad_clip(0.1),
    "element": lambda: optclip.spam_clip(),
    "spectral": lambda: optclip.spectral_clip(6.0),
    "u_clip": lambda: optclip.u_clip(optclip.clip_by_rule(6.5)),
    "stable_adam": lambda: optclip.scale_by_stable_adam(weight_decay=0.1),
    "cap_update": lambda: optclip.cap_update(0.1),
    "skip_steps": lambda: optclip.skip_steps(optclip.clip_by_rule(6.5)),
    "stabilize": lambda: optclip.stabilize(optax.sgd(1.0)),
}


SLOW = ("layer", "unit", "element", "spectral", "cap_update")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in IN_FRONT],
)
def test_clips_before_lookahead_use_the_fast_parameters(name):
    alone = IN_FRONT[name]()
    tx = optax.chain(
        optclip.record_norms(),
        IN_FRONT[name](),
        optax.lookahead(optax.sgd(0.1), 3, 0.5),
    )
    step = jax.jit(tx.update)
    updates, state = step(FAST, tx.init(PAIR), PAIR)
    wanted, _ = jax.jit(alone.update)(FAST, alone.init(PAIR.fast), PAIR.fast)
    for key, value in wanted.items():
        np.testing.assert_allclose(updates.fast[key], -0.1 * value, rtol=1e-6)
        np.testing.assert_array_equal(updates.slow[key], 0)
    _, bad = step(FAST | {"b": jnp.array([jnp.nan, 1.0])}, state, PAIR)
    for params in (PAIR, PAIR.fast):
        rows = optclip.leaf_metrics(state, params)
        assert (rows["w/norm"], rows["b/norm"]) == (5, 12)
        assert optclip.nonfinite_leaves(bad, params)[0].path == "b"


def test_skip_steps_around_lookahead_skips_fast_and_slow_updates():
    tx = optclip.skip_steps(optax.lookahead(optax.sgd(0.1), 1, 0.5))
    state = tx.init(PAIR)
    updates, state = jax.jit(tx.update)(FAST | {"b": jnp.full(2, jnp.nan)}, state, PAIR)
    assert not any(x.any() for x in jax.tree.leaves(updates))
    updates, state = jax.jit(tx.update)(FAST, state, PAIR)
    assert all(x.any() for x in jax.tree.leaves(updates))
    assert [c.path for c in optclip.nonfinite_leaves(state, PAIR)] == ["b"]


def test_slow_updates_pass_through_clips_after_lookahead():
    tx = optax.chain(optax.lookahead(optax.sgd(1.0), 1, 0.5), optclip.clip_by_rule(1.0))
    updates, state = tx.update(FAST, tx.init(PAIR), PAIR)
    np.testing.assert_allclose(optclip.norms.global_norm(updates.fast), 1, rtol=1e-6)
    plain, _ = tx.update(FAST, tx.init(PAIR), PAIR)
    np.testing.assert_allclose(plain.slow["w"], [-1.5, -2.0], rtol=1e-6)
    assert float(optclip.metrics(state)["clip/norm_before"]) == 6.5


def test_stabilize_around_lookahead_raises_an_error_that_says_where_to_put_it():
    tx = optclip.stabilize(optax.lookahead(optax.sgd(0.1), 3, 0.5))
    with pytest.raises(ValueError, match=r"optax\.lookahead\(optclip\.stabilize"):
        tx.update(FAST, tx.init(PAIR), PAIR)
