"""Mistaken and unusual inputs of `optclip.diagnose`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optclip
from optclip.diagnosis import _rules, _signals
from optclip.diagnosis._probe import Batch

KEYS = jax.random.split(jax.random.key(0), 2)
PARAMS = {f"l{i}": 0.5 * jax.random.normal(k, (8, 8)) for i, k in enumerate(KEYS)}
X = np.random.default_rng(1).normal(size=(5, 8, 8)).astype(np.float32)
BATCHES = [(x, x) for x in X]


def loss_fn(params, batch, act=jnp.tanh):
    x, y = batch
    for w in params.values():
        x = act(x @ w)
    return jnp.mean((x - y) ** 2)


def relu_loss(params, batch):
    return loss_fn(params, batch, jax.nn.relu)


def ask(loss=loss_fn, params=PARAMS, batches=BATCHES, tx=None, **options):
    tx = tx or optax.sgd(0.01)
    return optclip.diagnose(
        loss, params, batches, optimizer=tx, progress=False, **options
    )


def causes(found):
    return [finding.cause for finding in found.findings]


def not_seen(found):
    return " ".join(found.not_seen)


@pytest.mark.parametrize("loss", [loss_fn, relu_loss])
def test_batches_of_different_shapes_are_measured_separately(loss):
    few, many = (x[:3] for x in BATCHES[0]), np.tile(X[0], (16, 1))
    batches = [*BATCHES, tuple(few), (many, many)]
    found = ask(loss, batches=batches)
    norm = optax.tree.norm
    expected = [float(norm(jax.grad(loss)(PARAMS, b))) for b in batches]
    np.testing.assert_allclose(found.signals["batch_norms"], expected, rtol=1e-4)
    assert found.healthy, str(found)


def test_error_in_the_loss_names_the_batch():
    def loss(params, batch):
        return loss_fn(params, (batch[0].reshape(8, 8), batch[1]))

    batches = [*BATCHES, (X[0][:3], X[0][:3])]
    with pytest.raises(TypeError, match="cannot reshape") as caught:
        ask(loss, batches=batches)
    assert any("batch 5" in note for note in caught.value.__notes__)


def test_loss_that_cannot_be_split_by_example_is_diagnosed():
    def loss(params, batch):  # a loss on a whole graph
        edges, nodes = batch
        return jnp.mean((edges @ nodes @ params["l0"]) ** 2)

    found = ask(loss, {"l0": PARAMS["l0"]}, [(x @ x.T / 8, x) for x in X])
    assert "whether the loss is a sum" in not_seen(found)


@pytest.mark.parametrize("rate", [1e6, 10.0])
def test_learning_rate_at_which_all_units_die_is_too_high(rate):
    assert causes(ask(relu_loss, tx=optax.adam(rate)))[:1] == ["learning_rate"]


def test_learning_rate_is_too_high_if_every_tried_step_fails():
    found = ask(tx=optax.adam(1e6))
    assert causes(found)[:1] == ["learning_rate"]
    assert "-" not in found.findings[0].evidence.split("In a rehearsal")[0]


@pytest.mark.parametrize(
    "tx",
    [
        optclip.clip_by_global_norm(1.0),
        optax.sgd(-0.1),
        optax.masked(optax.adam(1e-3), {"l0": True, "l1": False}),
    ],
    ids=["clip", "negative", "masked"],
)
def test_uphill_updates_are_distinguished_from_a_high_learning_rate(tx):
    found = ask(tx=tx)
    assert causes(found) == ["uphill"]
    assert "negative learning rate" in found.findings[0].remedy


def nan_like(tree):
    return jax.tree.map(lambda x: x * jnp.nan if x.dtype.kind == "f" else x, tree)


def test_initially_nonfinite_inputs_are_named():
    adam = optax.adam(1e-3)
    parameters = ask(params={**PARAMS, "l1": PARAMS["l1"] * jnp.nan})
    assert parameters.findings[0].where == ("l1",)
    assert "checkpoint" in parameters.findings[0].remedy
    state = ask(tx=adam, opt_state=nan_like(adam.init(PARAMS)))
    assert "optimizer's state" in state.findings[0].evidence
    data = ask(batches=[(x * np.nan, y) for x, y in BATCHES])
    assert "in the data itself" in data.findings[0].evidence
    empty = ask(batches=[(X[0][:0], X[0][:0])] * 4)
    assert "no examples" in empty.findings[0].evidence
    rate = ask(tx=optax.sgd(float("nan")))
    assert "updates are not" in rate.findings[0].evidence
    for found in (parameters, state, data, empty, rate):
        assert causes(found) == ["not_finite"]


def test_zero_gradient_is_reported():
    found = ask(lambda p, b: jax.lax.stop_gradient(loss_fn(p, b)))
    assert "it is 0 in all batches" in not_seen(found)
    zeros = {f"l{i}": jnp.zeros((8, 8)) for i in range(5)}
    found = ask(params=zeros)
    assert "exactly 0" in found.findings[0].evidence


def test_loss_without_matrix_products_is_reported_as_such():
    found = ask(lambda p, b: jnp.mean((b[0] + p["b"] - 2 * b[1]) ** 2), {"b": X[0]})
    assert "no matrix product" in not_seen(found)


@pytest.mark.parametrize(
    "tx",
    [
        optax.MultiSteps(optax.sgd(0.1), 20).gradient_transformation(),
        optax.adam(optax.warmup_cosine_decay_schedule(0.0, 0.1, 100, 1000)),
        optax.set_to_zero(),
    ],
    ids=["accumulating", "warming up", "none"],
)
def test_steps_that_do_not_change_parameters_are_reported(tx):
    assert "the next one changes nothing" in not_seen(ask(tx=tx))


@pytest.mark.parametrize(
    "tx",
    [
        optax.lbfgs(),
        optax.polyak_sgd(0.1),
        optax.chain(optax.adam(1e-3), optax.contrib.reduce_on_plateau()),
    ],
    ids=["lbfgs", "polyak", "plateau"],
)
def test_optimizers_receive_the_extra_arguments_they_need(tx):
    assert not any("could not be run" in words for words in ask(tx=tx).not_seen)


def test_optimizer_that_cannot_be_run_is_reported():
    def update(updates, state, params=None, *, curvature):
        return updates, state

    init = optax.identity().init
    tx = optax.GradientTransformationExtraArgs(init, update)
    assert "could not be run (TypeError" in not_seen(ask(tx=tx))


def test_updates_of_complex_parameters_go_downhill():
    def loss(params, batch):
        return jnp.mean(jnp.abs(batch @ params["w"] - 1j * batch) ** 2)

    found = ask(loss, {"w": jnp.zeros((8, 8), jnp.complex64)}, list(X))
    np.testing.assert_allclose(found.signals["trust"][1.0], 1.0, atol=0.1)


def test_python_scalars_are_accepted_as_parameters():
    def loss(params, batch):
        return loss_fn({"w": params["w"] * params["scale"]}, batch)

    taps = optclip.diagnosis.tap(loss, {"w": PARAMS["l0"], "scale": 0.7}, BATCHES[0])
    assert taps.total > 0
    found = ask(lambda p, b: p["a"] ** 2 * jnp.mean(b[0] ** 2), {"a": 3.0})
    assert found.signals["batch_norms"][0] > 0


def test_optimizer_states_of_equivalent_structure_are_accepted():
    tx = optax.adam(1e-3)
    mixed = {**PARAMS, "count": jnp.int32(3)}

    def loss(params, batch):
        return loss_fn({k: params[k] for k in ("l0", "l1")}, batch)

    assert ask(loss, mixed, tx=tx, opt_state=tx.init(mixed)).healthy
    model = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    held = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def nnx_loss(model, batch):
        return jnp.mean((model(batch[0]) - batch[1]) ** 2)

    assert ask(nnx_loss, model, tx=tx, opt_state=held.opt_state).healthy
    with pytest.raises(TypeError, match="pass its `tx`"):
        ask(nnx_loss, model, tx=held)
    layers = eqx.nn.MLP(8, 8, 8, 2, key=KEYS[0])

    def eqx_loss(model, batch):
        return jnp.mean((jax.vmap(model)(batch[0]) - batch[1]) ** 2)

    state = tx.init(eqx.filter(layers, eqx.is_array))
    assert ask(eqx_loss, layers, tx=tx, opt_state=state).healthy


def test_mismatched_optimizer_states_raise_an_error():
    adam, sgd = optax.adam(1e-3), optax.sgd(0.1, 0.9)
    small = {k: v[:4, :4] for k, v in PARAMS.items()}
    for state in (sgd.init(PARAMS), adam.init(small), (), "x"):
        with pytest.raises(ValueError, match="`opt_state` does not fit"):
            ask(tx=adam, opt_state=state)
    gone = adam.init(PARAMS)
    jax.tree.leaves(gone)[1].delete()
    with pytest.raises(ValueError, match=r"`opt_state` at .* was deleted"):
        ask(tx=adam, opt_state=gone)


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ({"x": X[0]}, TypeError, "is given as `\\[batch\\]`"),
        (None, TypeError, "iterable of batches, such as a list, got NoneType"),
        (lambda: X, TypeError, "got function"),
        (X[0, 0], TypeError, "one array of one axis"),
        ([{"x": X[0], "name": "abc"}], TypeError, "Batch 0 holds at 'name' what is no"),
        ([X[0], np.array([object()])], TypeError, "Batch 1 holds .*object"),
        (iter([]), ValueError, "is empty"),
    ],
)
def test_invalid_batches_raise_an_error(batches, error, message):
    with pytest.raises(error, match=message):
        ask(batches=batches)


@pytest.mark.parametrize("value", [None, {"loss": 1.0}, "a", [1.0, 2.0]])
def test_non_scalar_losses_raise_an_error(value):
    with pytest.raises(ValueError, match="`loss_fn` must return a real scalar, got"):
        ask(lambda p, b: value)


def test_non_callable_loss_and_calls_inside_jit_raise_an_error():
    with pytest.raises(TypeError, match="`loss_fn` must be a function, got NoneType"):
        optclip.diagnose(None, PARAMS, BATCHES, optimizer=optax.sgd(0.1))

    def inside(params):
        return ask(params=params).healthy

    with pytest.raises(ValueError, match="call it outside of jit"):
        jax.jit(inside)(PARAMS)
    with pytest.raises(ValueError, match=r"`tap` .* outside of jit"):
        jax.jit(lambda p: optclip.diagnosis.tap(loss_fn, p, BATCHES[0]).loss)(PARAMS)


def test_tap_without_jit():
    with jax.disable_jit():
        assert len(optclip.diagnosis.tap(loss_fn, PARAMS, BATCHES[0]).sites) == 2


def test_momentum_may_go_uphill_for_one_step():
    batch = Batch(1.0, 1.0, (), ())
    signals = _signals.Signals(
        (batch,) * 4, (), 0, [], None, None, {}, [], slope=0.1, begun=True,
        trust={1.0: 0.9}, rehearsals={1.0: [1.0] * 12, 0.1: [1.0] * 12},
        starts=[1.0] * 12,
    )  # fmt: skip
    assert _rules.judge(signals) == ()


def masked_loss(params, batch):
    x, y = batch
    kept = jnp.isfinite(y)
    out = jnp.where(params["mask"] == 0, x @ params["w"], 0.0)
    return jnp.mean(jnp.where(kept, out - jnp.where(kept, y, 0.0), 0.0) ** 2)


def test_intentional_infinities_are_not_a_finding():
    mask = jnp.where(jnp.eye(8) > 0, -jnp.inf, 0.0)
    holes = [(x, np.where(x > 1.5, np.nan, x)) for x in X]
    found = ask(masked_loss, {"w": PARAMS["l0"], "mask": mask}, holes)
    assert found.healthy, str(found)


@pytest.mark.parametrize("given", [False, True])
def test_infinity_in_the_optimizer_state_is_not_a_finding(given):
    tx = optax.chain(optax.adam(1e-3), optax.contrib.reduce_on_plateau())
    state = tx.init(PARAMS)
    assert any(np.isinf(x).any() for x in jax.tree.leaves(state))
    found = ask(tx=tx, opt_state=state if given else None)
    assert found.healthy, str(found)


def test_state_of_another_optimizer_with_equal_shapes_raises_an_error():
    theirs = optax.sgd(0.1, momentum=0.9)  # one array per parameter, as in scale_by_rms
    with pytest.raises(ValueError, match="`opt_state` does not fit"):
        ask(tx=optax.rmsprop(0.1), opt_state=theirs.init(PARAMS))


@pytest.mark.parametrize("adaptive", [False, True])
def test_remedies_suit_the_optimizer(adaptive):
    found = ask(tx=optax.adam(1e6) if adaptive else optax.sgd(1e6))
    assert causes(found)[0] == "learning_rate"
    # A user of Adam needs no advice to use Adam.
    assert ("AdamW" in found.findings[0].remedy) != adaptive
