"""Every reader of a state, with every way to nest transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip
from optclip import NonfiniteLeaf, scopes

PARAMS = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
GRADS = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.0, 12.0])}  # norms 5, 12; 13


def bad(*names, value=np.nan):
    return {k: g.at[0].set(value) if k in names else g for k, g in GRADS.items()}


def watched():
    """`record_norms` and a clip: two states that see the same leaves."""
    return optax.chain(optclip.record_norms(), optclip.clip_by_leaf_norm(6.0))


def run(tx, steps, params=PARAMS, state=None):
    step = jax.jit(tx.update)
    state = tx.init(params) if state is None else state
    for grads in steps:
        _, state = step(grads, state, params)
    return state


def by_group(make):
    return optax.partition({"x": make(), "y": make()}, {"a": "x", "b": "y"})


def by_mask(make):
    return optax.chain(
        optax.masked(make(), {"a": True, "b": False}),
        optax.masked(make(), {"a": False, "b": True}),
    )


def skipping(inner=None, **options):
    inner = optax.chain(watched(), optax.sgd(0.1)) if inner is None else inner
    return optclip.skip_steps(inner, **options)


NESTINGS = {
    "chain": lambda: optax.chain(watched(), optax.adam(1e-3)),
    "chain in chain": lambda: optax.chain(optax.chain(watched()), optax.sgd(1.0)),
    "named_chain": lambda: optax.named_chain(("w", watched()), ("s", optax.sgd(1.0))),
    "inject_hyperparams": lambda: optax.inject_hyperparams(
        lambda rate: optax.chain(watched(), optax.sgd(rate))
    )(rate=0.1),
    "apply_if_finite": lambda: optax.chain(
        watched(), optax.apply_if_finite(optax.sgd(0.1), 3)
    ),
    "masked": lambda: optax.masked(watched(), {"a": True, "b": True}),
    "masked one by one": lambda: by_mask(watched),
    "partition": lambda: optax.partition({"all": watched()}, "all"),
    "partition in groups": lambda: by_group(watched),
    "partition in partition": lambda: optax.partition(
        {"out": optax.partition({"in": watched()}, "in")}, "out"
    ),
    "in skip_steps": skipping,
    "before skip_steps": lambda: optax.chain(watched(), skipping(optax.sgd(0.1))),
    "skip_steps in groups": lambda: by_group(skipping),
    "skip_steps in skip_steps": lambda: skipping(skipping()),
    "skip_steps around MultiSteps": lambda: skipping(
        optax.MultiSteps(watched(), 1).gradient_transformation()
    ),
    "stabilize": lambda: optax.chain(watched(), optclip.stabilize(optax.sgd(0.1))),
    "in stabilize": lambda: optclip.stabilize(optax.chain(watched(), optax.sgd(0.1))),
    "conditionally": lambda: optax.transforms.conditionally_transform(
        watched(), lambda step: step >= 0
    ),
}


def check_readers(state, params, steps):
    metrics = jax.device_get(optclip.metrics(state))
    assert all(np.ndim(x) == 0 and np.isfinite(x) for x in metrics.values())
    counted = {int(x) for key, x in metrics.items() if key.endswith("/steps")}
    # A state inside `skip_steps` or `stabilize` does not count skipped steps.
    assert counted <= {steps, steps - 1}
    assert max(counted) == steps
    rows = optclip.leaf_metrics(state, params)
    for name, norm in (("a", 5), ("b", 12)):
        assert rows[f"{name}/norm_before"] == pytest.approx(norm)
        assert rows[f"{name}/norm"] == pytest.approx(norm)
    found = optclip.nonfinite_leaves(state, params)
    assert [(c.path, c.step, c.nan) for c in found] == [("b", steps - 2, 1)]


@pytest.mark.parametrize("nesting", NESTINGS)
def test_readers_find_states_in_every_nesting(nesting):
    tx = NESTINGS[nesting]()
    params = jax.tree.map(lambda x: x + 30.0, PARAMS)  # above the cap of `stabilize`
    state = run(tx, [GRADS, bad("b"), GRADS], params)
    check_readers(state, params, 3)


def test_readers_find_states_in_multi_steps():
    # The mean in Optax's state stays NaN afterwards, so the bad step comes last.
    state = run(optax.MultiSteps(watched(), 2), [GRADS] * 5 + [bad("b")])
    assert optclip.metrics(state)["clip/steps"] == 3
    assert optclip.leaf_metrics(state, PARAMS)["a/norm"] == 5
    assert optclip.nonfinite_leaves(state, PARAMS) == [NonfiniteLeaf("b", 2, 1, 0, 0)]


def test_readers_find_states_in_a_train_state():
    train_state = pytest.importorskip("flax.training.train_state")
    state = train_state.TrainState.create(
        apply_fn=None, params=PARAMS, tx=optax.chain(by_group(watched), optax.sgd(0.1))
    )
    step = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))
    for grads in (GRADS, bad("b"), GRADS):
        state = step(state, grads)
    check_readers(state, state.params, 3)


@pytest.mark.parametrize("nesting", ["chain", "partition", "in skip_steps"])
def test_readers_find_states_in_an_nnx_optimizer(nesting):
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self):
            self.a, self.b = nnx.Param(PARAMS["a"]), nnx.Param(PARAMS["b"])

    model = Net()
    params = nnx.state(model, nnx.Param)
    optimizer = nnx.Optimizer(model, NESTINGS[nesting](), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, grads):
        structure = jax.tree.structure(nnx.state(model, nnx.Param))
        leaves = jax.tree.leaves(grads)
        optimizer.update(model, jax.tree.unflatten(structure, leaves))

    for grads in (GRADS, bad("b"), GRADS):
        step(model, optimizer, grads)
    check_readers(optimizer.opt_state, params, 3)


# Ten steps: the first group is non-finite at step 0, the second at steps 5 to 7.
LATER = [bad("a"), *[GRADS] * 4, *[bad("b")] * 3, *[GRADS] * 2]
ONE = {
    "clip": lambda: optclip.clip_by_rule(1.0),
    "record_norms": optclip.record_norms,
    "unit": lambda: optclip.clip_by_unit_norm(1.0, nonfinite="zero"),
    "spectral": lambda: optclip.spectral_clip(1.0),
}


@pytest.mark.parametrize("kind", ONE)
@pytest.mark.parametrize("nest", [by_group, by_mask])
def test_latest_nonfinite_step_over_all_states_is_reported(nest, kind):
    state = run(nest(ONE[kind]), LATER)
    assert optclip.nonfinite_leaves(state, PARAMS) == [NonfiniteLeaf("b", 7, 1, 0, 0)]


def test_all_leaves_nonfinite_at_the_last_step_are_named_once():
    state = run(by_group(watched), [bad("a"), bad("a", "b"), GRADS])
    worse = {"a": jnp.array([np.inf, np.nan]), "b": bad("b")["b"]}
    assert [c.path for c in optclip.nonfinite_leaves(state, PARAMS)] == ["a", "b"]
    state = run(by_group(watched), [worse], state=state)
    assert optclip.nonfinite_leaves(state, PARAMS) == [
        NonfiniteLeaf("a", 3, 1, 1, 0),
        NonfiniteLeaf("b", 3, 1, 0, 0),
    ]


def test_steps_skipped_by_a_group_are_listed_newest_first():
    state = run(by_group(lambda: skipping(optax.sgd(0.1))), LATER)
    found = [(c.path, c.step, c.nan) for c in optclip.nonfinite_leaves(state, PARAMS)]
    assert found == [("b", 7, 1), ("b", 6, 1), ("b", 5, 1), ("a", 0, 1)]


def test_information_from_skip_steps_takes_precedence():
    tx = optax.chain(optclip.record_norms(), skipping(optax.sgd(0.1)))
    state = run(tx, [bad("b", value=np.inf), GRADS])
    (culprit,) = optclip.nonfinite_leaves(state, PARAMS)
    assert culprit == NonfiniteLeaf("b", 0, 0, 1, 0, norm=np.inf, loss=0.0)


def test_step_seen_only_by_a_clip_is_listed_among_skipped_steps():
    # The clip drops non-finite entries, so `skip_steps` after it only sees spikes.
    tx = optax.chain(
        optclip.clip_by_rule(1e3, nonfinite="drop"), skipping(optax.sgd(0.1), when=20.0)
    )
    spike = jax.tree.map(lambda x: 10 * x, GRADS)
    state = run(tx, [spike, GRADS, bad("a"), GRADS, spike])
    found = [(c.path, c.step, c.nan) for c in optclip.nonfinite_leaves(state, PARAMS)]
    assert found == [("b", 4, 0), ("a", 2, 1), ("b", 0, 0)]


def test_states_with_different_step_counts_are_compared_by_age():
    inner = optax.MultiSteps(optclip.clip_by_rule(1.0), 2).gradient_transformation()
    tx = optax.chain(optclip.record_norms(), inner)
    state = run(tx, [GRADS, GRADS, GRADS, bad("b"), *[GRADS] * 4])
    assert optclip.nonfinite_leaves(state, PARAMS) == [NonfiniteLeaf("b", 3, 1, 0, 0)]


def test_partition_keys_contain_the_group_labels():
    tx = optax.chain(
        optclip.clip_by_rule(100.0),
        optax.partition(
            {
                "gen": optax.chain(
                    optclip.clip_by_rule(1.0), optclip.clip_by_leaf_norm(9.0)
                ),
                "disc": skipping(
                    optax.chain(optclip.clip_by_leaf_norm(9.0), optclip.record_norms())
                ),
            },
            {"a": "gen", "b": "disc"},
        ),
        optclip.clip_by_rule(50.0),
    )
    state = run(tx, [GRADS])
    got = {k: float(x) for k, x in optclip.metrics(state).items()}
    assert got["clip/norm_before"] == 13
    assert got["clip/gen/norm_before"] == 5
    assert got["clip_2/gen/worst_threshold"] == 9
    assert got["clip/disc/norm_before"] == 12
    assert got["skip/disc/norm"] == 12
    assert got["norms/disc/global_norm"] == 9
    assert got["clip_2/threshold"] == 50
    assert {key.rpartition("/")[0] for key in got} == {
        "clip", "clip_2", "clip/gen", "clip_2/gen", "clip/disc", "skip/disc",
        "norms/disc",
    }  # fmt: skip
    # Each leaf has one per-leaf clip, so no numbering is needed.
    assert set(optclip.leaf_metrics(state, PARAMS)) == {
        "a/norm_before", "a/threshold", "a/scale",
        "b/norm_before", "b/threshold", "b/scale", "b/norm",
    }  # fmt: skip


def test_metrics_of_two_optimizers_can_be_merged():
    tx = optax.chain(optclip.record_norms(), skipping(optclip.clip_by_rule(1.0)))
    states = {name: run(tx, [GRADS]) for name in ("actor", "critic")}
    merged: dict = {}
    for name, state in states.items():
        merged |= optclip.metrics(state, prefix=name)
    assert len(merged) == 2 * len(optclip.metrics(states["actor"]))
    assert {
        "critic/norm_before",
        "critic/skip/norm",
        "critic/norms/global_norm",
    } <= set(merged)
    rows: dict = {}
    for name, state in states.items():
        rows |= optclip.leaf_metrics(state, PARAMS, prefix=name)
    assert set(rows) == {f"{n}/{p}/norm" for n in states for p in PARAMS}


def test_metric_keys_are_unique_for_any_labels():
    tx = optax.partition({"skip": watched(), "y": skipping()}, {"a": "skip", "b": "y"})
    state = run(optax.chain(tx, skipping(optclip.clip_by_rule(1.0))), [GRADS])
    default = optclip.metrics(state)
    assert len(optclip.metrics(state, prefix="critic")) == len(default)


def test_leaf_metrics_are_fetched_in_one_transfer(monkeypatch):
    tx = optax.chain(
        optclip.record_norms(), optclip.clip_by_leaf_norm(1.0),
        optclip.clip_per_layer(1.0, 1), skipping(optclip.record_norms()),
    )  # fmt: skip
    state = run(tx, [bad("a")])
    calls = []
    fetch = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: calls.append(x) or fetch(x))
    rows = optclip.leaf_metrics(state, PARAMS)
    assert len(calls) == 1
    assert all(type(x) is np.float32 for x in rows.values())
    optclip.nonfinite_leaves(state, PARAMS)
    assert len(calls) == 2


@pytest.mark.parametrize("make", [lambda: by_group(skipping), watched])
def test_readers_transfer_nothing_implicitly_and_promote_nothing(make):
    state = run(make(), [bad("a"), GRADS])
    inside = jax.jit(optclip.metrics)
    with jax.transfer_guard("disallow"), jax.numpy_dtype_promotion("strict"):
        metrics = optclip.metrics(state)
        inside(state)
        optclip.leaf_metrics(state, PARAMS)
        optclip.nonfinite_leaves(state, PARAMS)
    assert all(isinstance(x, jax.Array) for x in metrics.values())


WARMUPS = {
    "zclip": lambda: optclip.zclip(warmup_steps=3, max_grad_norm=None),
    "by leaf": lambda: optclip.zclip(scope=scopes.leaf()),
    "no bound": lambda: optclip.clip_by_rule(np.inf),
    "by value": lambda: optclip.clip_by_value(np.inf, record=True),
    "spectral": lambda: optclip.spectral_clip(np.inf),
    "skip": lambda: skipping(optax.sgd(0.1)),
}


@pytest.mark.parametrize("name", WARMUPS)
def test_threshold_that_does_not_exist_yet_is_the_largest_float32(name):
    state = run(WARMUPS[name](), [GRADS])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(optclip.metrics(state)))
    metrics = jax.device_get(optclip.metrics(state))
    (key,) = (k for k in metrics if k.endswith(("/threshold", "/worst_threshold")))
    if name != "by leaf":
        assert metrics[key] == np.finfo(np.float32).max
    if name == "by leaf":
        assert all(np.isfinite(x) for x in optclip.leaf_metrics(state, PARAMS).values())


def test_nonfinite_norms_stay_nonfinite():
    for value in (np.nan, np.inf):
        state = run(watched(), [bad("b", value=value)])
        np.testing.assert_equal(
            float(optclip.metrics(state)["norms/global_norm"]), value
        )
        rows = optclip.leaf_metrics(state, PARAMS)
        np.testing.assert_equal(float(rows["b/norm_before"]), value)
