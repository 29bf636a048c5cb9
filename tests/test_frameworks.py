"""A clip in a jitted, donated train step of each framework.

Each framework is a function that returns a `Run`: the tests are the same for all.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip

STEPS = 12
START, END = 2.0, 0.05


@dataclasses.dataclass
class Run:
    """A model in training.

    Attributes:
        step: Takes a batch, trains in place, and returns the loss.
        read: Returns (opt_state, params), with the params passed to `tx.init`.
        names: The expected names of the leaves.
    """

    step: Callable[[tuple], jax.Array]
    read: Callable[[], tuple[Any, Any]]
    names: set[str]


def batch():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(32, 4)), jnp.float32)
    return x, jnp.sin(3 * x[:, :1]) + 2


def optimizer():
    threshold = optax.linear_schedule(START, END, STEPS - 1)
    clip = optclip.clip_by_leaf_norm(threshold, nonfinite="skip")
    return optax.chain(optclip.record_norms(), clip, optax.adam(0.03))


def mean_square(prediction, y):
    return jnp.mean((prediction - y) ** 2)


def nnx_run(traced):
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(4, 8, rngs=rngs)
            self.out = nnx.Linear(8, 1, rngs=rngs)

        def __call__(self, x):
            return self.out(jnp.tanh(self.hidden(x)))

    model = Net(nnx.Rngs(0))
    opt = nnx.Optimizer(model, optimizer(), wrt=nnx.Param)

    def update(model, opt, data):
        traced()
        x, y = data
        loss, grads = nnx.value_and_grad(lambda m: mean_square(m(x), y))(model)
        opt.update(model, grads)
        return loss

    jitted = nnx.jit(update, donate_argnums=(0, 1))
    names = {f"{layer}/{p}" for layer in ("hidden", "out") for p in ("kernel", "bias")}
    return Run(
        lambda data: jitted(model, opt, data),
        lambda: (opt.opt_state, nnx.state(model, nnx.Param)),
        names,
    )


def linen_run(traced):
    linen = pytest.importorskip("flax.linen")
    train_state = pytest.importorskip("flax.training.train_state")

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(1)(jnp.tanh(linen.Dense(8)(x)))

    net = Net()
    params = net.init(jax.random.key(0), batch()[0])["params"]
    kept = [
        train_state.TrainState.create(apply_fn=net.apply, params=params, tx=optimizer())
    ]

    def update(state, data):
        traced()
        x, y = data

        def loss_of(params):
            return mean_square(state.apply_fn({"params": params}, x), y)

        loss, grads = jax.value_and_grad(loss_of)(state.params)
        return state.apply_gradients(grads=grads), loss

    jitted = jax.jit(update, donate_argnums=0)

    def step(data):
        kept[0], loss = jitted(kept[0], data)
        return loss

    names = {f"Dense_{i}/{p}" for i in (0, 1) for p in ("kernel", "bias")}
    return Run(step, lambda: (kept[0].opt_state, kept[0].params), names)


def equinox_run(traced):
    eqx = pytest.importorskip("equinox")
    # The activation is a leaf of the model that is not an array.
    model = eqx.nn.MLP(4, 1, 8, 1, activation=jnp.tanh, key=jax.random.key(0))
    tx = optimizer()
    kept = [model, tx.init(eqx.filter(model, eqx.is_inexact_array))]

    @eqx.filter_jit(donate="all-except-first")
    def update(data, model, state):
        traced()
        x, y = data

        def loss_of(model):
            return mean_square(jax.vmap(model)(x), y)

        loss, grads = eqx.filter_value_and_grad(loss_of)(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = tx.update(grads, state, params)
        return eqx.apply_updates(model, updates), state, loss

    def step(data):
        kept[0], kept[1], loss = update(data, *kept)
        return loss

    names = {f"layers/{i}/{p}" for i in (0, 1) for p in ("weight", "bias")}
    return Run(
        step, lambda: (kept[1], eqx.filter(kept[0], eqx.is_inexact_array)), names
    )


def haiku_run(traced):
    hk = pytest.importorskip("haiku")
    net = hk.without_apply_rng(
        hk.transform(lambda x: hk.nets.MLP([8, 1], activation=jnp.tanh)(x))
    )
    params = net.init(jax.random.key(0), batch()[0])
    tx = optimizer()
    kept = [params, tx.init(params)]

    def update(params, state, data):
        traced()
        x, y = data
        loss, grads = jax.value_and_grad(lambda p: mean_square(net.apply(p, x), y))(
            params
        )
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    jitted = jax.jit(update, donate_argnums=(0, 1))

    def step(data):
        kept[0], kept[1], loss = jitted(*kept, data)
        return loss

    names = {f"mlp/~/linear_{i}/{p}" for i in (0, 1) for p in ("w", "b")}
    return Run(step, lambda: (kept[1], kept[0]), names)


BUILDERS = {
    "nnx": nnx_run,
    "linen": linen_run,
    "equinox": equinox_run,
    "haiku": haiku_run,
}


@pytest.fixture(scope="module", params=BUILDERS)
def trained(request):
    """A run after some steps, with the observations made during them."""
    traces = []
    run = BUILDERS[request.param](lambda: traces.append(None))
    before = [jax.tree.leaves(tree) for tree in run.read()]
    data, losses, thresholds = batch(), [], []
    for _ in range(STEPS):
        losses.append(float(run.step(data)))
        thresholds.append(float(optclip.metrics(run.read()[0])["clip/worst_threshold"]))
    return run, traces, before, losses, thresholds


def test_loss_falls(trained):
    _, _, _, losses, _ = trained
    assert losses[-1] < 0.8 * losses[0]


def test_schedule_changes_the_threshold_without_retracing(trained):
    _, traces, _, _, thresholds = trained
    assert len(traces) == 1
    clipped = np.isfinite(thresholds)
    expected = np.linspace(START, END, STEPS)
    np.testing.assert_allclose(
        np.asarray(thresholds)[clipped], expected[clipped], rtol=1e-5
    )
    assert clipped.sum() > STEPS / 2


def test_state_and_parameters_are_donated(trained):
    _, _, before, _, _ = trained
    state, params = before
    assert len(params) == 4
    assert all(x.is_deleted() for x in params)
    # jit drops inputs that a step overwrites without reading (norms, scales), so these
    # few bytes are not donated. Moments and counters are.
    left = [x for x in state if not x.is_deleted()]
    assert sum(x.nbytes for x in left) < 200
    assert all(x.dtype == jnp.float32 for x in left)


def test_metrics_are_read_from_the_state(trained):
    run, _, _, _, _ = trained
    metrics = jax.device_get(optclip.metrics(run.read()[0]))
    assert all(np.ndim(x) == 0 for x in metrics.values())
    assert metrics["clip/steps"] == metrics["norms/steps"] >= STEPS
    assert metrics["norms/global_norm"] == pytest.approx(metrics["clip/norm_before"])
    assert metrics["clip/norm_after"] <= metrics["clip/norm_before"]
    assert 0 < metrics["clip/clipped_steps"] <= metrics["clip/steps"]


def test_leaves_are_named_as_in_the_model(trained):
    run, _, _, _, _ = trained
    state, params = run.read()
    metrics = optclip.leaf_metrics(state, params)
    assert {key.rpartition("/")[0] for key in metrics} == run.names
    assert {key.rpartition("/")[2] for key in metrics} == {
        "norm", "norm_before", "threshold", "scale"
    }  # fmt: skip


def test_z_nonfinite_leaves_names_the_nonfinite_leaves(trained):
    # Runs last, because the bad batch stays in the counters of the run.
    run, traces, _, losses, _ = trained
    assert optclip.nonfinite_leaves(*run.read()) == []
    x, y = batch()
    run.step((x.at[0, 0].set(jnp.nan), y))
    found = optclip.nonfinite_leaves(*run.read())
    assert {leaf.path for leaf in found} == run.names
    assert all(leaf.step == STEPS and leaf.nan for leaf in found)
    assert int(optclip.metrics(run.read()[0])["clip/nonfinite_steps"]) == 1
    assert float(run.step(batch())) < losses[0]  # the bad step was skipped
    assert len(traces) == 1
