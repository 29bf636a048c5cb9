"""What the structure of a program shows: sums, shared weights, chains, momentum."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip
from optclip.diagnosis import _growth, _signals
from optclip.diagnosis._memory import memory_of, rehearsal_length
from optclip.diagnosis._probe import Batch
from optclip.diagnosis._signals import Signals
from optclip.diagnosis.causes.initialization import initialization
from optclip.diagnosis.taps import tap

WIDTH, NODES, NEIGHBORS = 16, 24, 12
RNG = np.random.default_rng(0)
SQUARE = jnp.float32(RNG.normal(size=(WIDTH, WIDTH)) * math.sqrt(2 / WIDTH))
X = jnp.float32(RNG.normal(size=(NODES, WIDTH)))
# Each node sends a message to the next ones, so each receives NEIGHBORS of them.
SENDERS = jnp.repeat(jnp.arange(NODES), NEIGHBORS)
STEPS = jnp.tile(jnp.arange(NEIGHBORS), NODES)
RECEIVERS = (SENDERS + STEPS) % NODES


def turns_of(loss_fn, params=SQUARE, batch=X):
    return [site.turn for site in tap(loss_fn, params, batch).sites]


def unrolled(w, x):
    for _ in range(5):
        x = jnp.tanh(x @ w)
    return jnp.mean(x)


def unrolled_in_functions(w, x):
    cell = jax.jit(lambda w, x: jax.checkpoint(jnp.tanh)(x @ w))
    for _ in range(5):
        x = cell(w, x)
    return jnp.mean(x)


def branches(w, x):
    return jnp.mean(sum(jnp.tanh((x + i) @ w) for i in range(5)))


def tangent(w, x):
    y, slope = jax.jvp(lambda x: jnp.sin(x @ w), (x,), (jnp.ones_like(x),))
    return jnp.mean(y * slope)


@pytest.mark.parametrize(("loss_fn", "turns"), [
    (unrolled, [1, 2, 3, 4, 5]),
    (unrolled_in_functions, [1, 2, 3, 4, 5]),
    (branches, [1] * 5),
    (tangent, [1, 1]),
])  # fmt: skip
def test_uses_are_counted_along_the_longest_chain(loss_fn, turns):
    assert turns_of(loss_fn) == turns


def test_only_a_chain_of_uses_is_a_recurrence():
    assert _growth.repeated(tap(unrolled, SQUARE, X).sites) == {""}
    assert _growth.repeated(tap(branches, SQUARE, X).sites) == set()


def test_branches_with_shared_weights_count_once():
    layers = [SQUARE] * 3

    def loss_fn(params, x):
        ends = []
        for branch in (x, -x, 2 * x):
            for w in params:
                branch = jax.nn.relu(branch @ w)
            ends.append(branch)
        return jnp.mean((ends[0] - ends[1]) ** 2 + ends[2] ** 2)

    sites = tap(loss_fn, layers, X).sites
    assert len(sites) == 9
    found = _growth.layers_of(sites)
    assert [x.leaf for x in found] == ["0", "1", "2"]
    assert [x.source for x in found] == [None, 0, 1]


def received(x):
    return jax.ops.segment_sum(x[SENDERS], RECEIVERS, NODES)


@pytest.mark.parametrize(("inputs", "addends"), [
    (lambda x: x, 1),
    (received, NEIGHBORS),
    (lambda x: x + received(x), NEIGHBORS),
    (lambda x: jax.nn.relu(received(received(x))), NEIGHBORS**2),
    (lambda x: received(x) / NEIGHBORS, 1),
    (lambda x: jnp.tanh(received(x)), 1),
    (lambda x: x.reshape(4, 6, WIDTH).sum(1), 6),
    (lambda x: x.reshape(4, 6, WIDTH).mean(1), 1),
    (lambda x: x.reshape(4, 6, WIDTH).max(1), 1),
    (lambda x: x.reshape(2, 2, 6, WIDTH).sum((1, 2)), 12),
    (lambda x: x - jax.nn.logsumexp(x, -1, keepdims=True), 1),
    (lambda x: jax.nn.softmax(x @ x.T) @ x, 1),
])  # fmt: skip
def test_addends_of_a_sum_are_counted_until_it_is_divided(inputs, addends):
    (site,) = tap(lambda w, x: jnp.mean((inputs(x) @ w) ** 2), SQUARE, X).sites
    assert site.addends == addends
    (layer,) = _growth.layers_of((site,))
    weights = float(jnp.sqrt(jnp.mean(SQUARE**2)))
    np.testing.assert_allclose(
        layer.he, weights / math.sqrt(2 / (WIDTH * addends)), rtol=1e-5
    )


def graph(reduce):
    def loss_fn(params, batch):
        x = batch["x"]
        for w in params[:-1]:
            x = jax.nn.relu(reduce(x) @ w)
        return jnp.mean((x @ params[-1] - batch["y"]) ** 2)

    return loss_fn


def graphs(count=8):
    rng = np.random.default_rng(1)
    made = []
    for _ in range(count):
        x = rng.normal(size=(NODES, WIDTH))
        made.append({"x": jnp.float32(x), "y": jnp.float32(np.tanh(x[:, :3]))})
    return made


def weights_of(sizes, gain=1.0):
    rng = np.random.default_rng(2)
    return [
        jnp.float32(gain * rng.normal(size=pair) * math.sqrt(2 / pair[0]))
        for pair in itertools.pairwise(sizes)
    ]


def run(loss_fn, params, batches, rate):
    return optclip.diagnose(
        loss_fn, params, batches, optimizer=optax.sgd(rate), progress=False
    )


def test_sums_over_neighbors_are_named_with_their_number():
    params = weights_of((WIDTH, WIDTH, WIDTH, WIDTH, 3))
    found = run(graph(received), params, graphs(), 0.05)
    finding = found.findings[0]
    assert finding.cause == "initialization", str(found)
    assert f"a sum of up to {NEIGHBORS} values that nothing divides" in finding.evidence
    assert any("Average the inputs" in remedy.advice for remedy in finding.remedies)
    assert finding.remedies[0].kind == "scale_weights"
    assert finding.basis in ("works", "helps")


def test_averages_over_neighbors_are_healthy():
    params = weights_of((WIDTH, WIDTH, WIDTH, WIDTH, 3))
    assert run(graph(lambda x: received(x) / NEIGHBORS), params, graphs(), 0.05).healthy


@pytest.mark.parametrize(("he", "suspected"), [(3.0, True), (4.5, False)])
def test_weights_that_are_large_only_for_a_sum_are_suspected(he, suspected):
    layer = _growth.Layer("w", 1.0, 1.0, 1.0, 1.0, he, None, None, addends=9.0)
    batch = Batch(1.0, 100.0, (), ())
    measured = Signals(
        (batch,) * 8, (), 0, [layer], None, None, {"w": he}, [],
        scaled={"w": 1 / he}, scaled_norm=1.0, scaled_loss=1.0,
    )  # fmt: skip
    candidate = initialization(measured)
    assert candidate.suspected == suspected
    assert "a sum of up to 9 values" in candidate.finding.evidence


def test_growth_of_many_layers_is_not_blamed_on_two_of_them():
    params = weights_of((WIDTH, *[WIDTH] * 32, 3), gain=1.17)
    params[3] *= 1.1
    params[9] *= 1.1
    batches = [{**b, "y": b["y"][:, :3]} for b in graphs()]
    found = run(graph(lambda x: x), params, batches, 0.05)
    assert found.findings[0].cause == "depth", str(found)


def test_a_bad_batch_is_found_behind_weights_that_saturate():
    def loss_fn(params, batch):
        x = batch["x"]
        for w in params[:-1]:
            x = jnp.tanh(x @ w)
        return jnp.mean((x @ params[-1] - batch["y"]) ** 2)

    params = [20 * w for w in weights_of((WIDTH, WIDTH, WIDTH, WIDTH, 3))]
    params[-1] = params[-1] / 20
    batches = graphs()
    batches[5] = batches[5] | {"y": 3e3 * batches[5]["y"]}
    found = run(loss_fn, params, batches, 0.05)
    causes = {finding.cause: finding for finding in found.findings}
    assert causes["bad_batch"].where == ("batch 5",), str(found)


def test_a_hidden_bad_batch_does_not_represent_the_others(monkeypatch):
    calls = []

    def outliers_of(batches):
        calls.append(_signals._typical(batches, ()))
        return () if len(calls) == 1 else (calls[0],)  # it turns out to be bad

    monkeypatch.setattr(_signals, "outliers_of", outliers_of)
    params = weights_of((WIDTH, WIDTH, WIDTH, 3), gain=3.0)
    found = run(graph(lambda x: x), params, graphs(), 1e-6)
    assert len(calls) == 2
    assert found.signals["outlier_batches"] == (calls[0],)
    assert found.signals["typical_batch"] != calls[0]
    assert found.signals["sites"]


def pairs_of(reduce):
    def loss_fn(w, x):
        y = x @ w
        gaps = jnp.sum((y[:, None] - y[None] - 1) ** 2, -1)
        return reduce(gaps)

    return loss_fn


def test_a_sum_over_pairs_is_named():
    batches = [b["x"] for b in graphs()]
    finding = run(pairs_of(jnp.sum), SQUARE, batches, 0.05).findings[0]
    assert finding.cause == "loss_sum"
    (remedy,) = finding.remedies
    assert (remedy.kind, remedy.amount) == ("divide_loss", NODES * (NODES - 1))
    assert "the number of pairs of examples, 552 in a batch" in remedy.advice
    assert run(pairs_of(jnp.mean), SQUARE, batches, 0.01).healthy


def test_a_sum_over_positions_is_tried_if_the_length_is_fixed():
    rng = np.random.default_rng(3)
    shape, symbols = (8, 16), 11
    places = jnp.float32(rng.normal(size=(16, WIDTH)))
    params = {
        "table": jnp.float32(rng.normal(size=(symbols, WIDTH))),
        "out": jnp.float32(rng.normal(size=(WIDTH, symbols)) / 4),
    }

    def loss_fn(params, tokens):
        logits = (params["table"][tokens] + places[None]) @ params["out"]
        scores = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
        return jnp.sum(scores)

    batches = [jnp.asarray(rng.integers(0, symbols, shape)) for _ in range(8)]
    finding = run(loss_fn, params, batches, 5.0).findings[0]
    assert finding.cause == "loss_sum"
    assert finding.remedies[0].amount == math.prod(shape)
    assert finding.basis == "works"


def test_features_of_a_table_are_not_taken_for_positions():
    def loss_fn(w, batch):
        return jnp.sum((batch["x"] @ w[:, :3] - batch["y"]) ** 2)

    finding = run(loss_fn, SQUARE, graphs(), 1e-6).findings[0]
    assert finding.cause == "loss_sum"
    assert [remedy.amount for remedy in finding.remedies] == [NODES]


@pytest.mark.parametrize(("optimizer", "steps"), [
    (optax.sgd(0.1), 12),
    (optax.sgd(0.1, momentum=0.9), 12),
    (optax.sgd(0.1, momentum=0.95, nesterov=True), 12),
    (optax.sgd(0.1, momentum=0.98), 100),
    (optax.sgd(0.1, momentum=0.999), 200),
    (optax.sgd(optax.linear_schedule(0.0, 0.1, 100), momentum=0.98), 100),
    (optax.sgd(optax.linear_schedule(0.0, 0.1, 100), momentum=0.9), 12),
    (optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9)), 12),
    (optax.adam(0.1), 12),
    (optax.adam(0.1, b1=0.99), 12),
    (optax.lion(0.1), 12),
    (optax.lbfgs(), 12),
    (optax.MultiSteps(optax.sgd(0.1), 4), 12),
])  # fmt: skip
def test_a_rehearsal_is_as_long_as_the_momentum_requires(optimizer, steps):
    params = {"w": jnp.ones((3, 4)), "b": jnp.ones(5)}
    optimizer = optax.with_extra_args_support(optimizer)
    memory = memory_of(optimizer, params)
    assert rehearsal_length(memory, 12) == pytest.approx(steps, rel=0.02)


def test_a_momentum_that_is_too_large_is_found():
    def loss_fn(params, batch):
        x = jax.nn.relu(batch["x"] @ params[0])
        return jnp.mean((x @ params[1] - batch["y"]) ** 2)

    params, batches = weights_of((WIDTH, 32, 3)), graphs()

    def with_momentum(momentum, **options):
        optimizer = optax.sgd(0.05, momentum=momentum)
        return optclip.diagnose(
            loss_fn, params, batches, optimizer=optimizer, progress=False, **options
        )

    found = with_momentum(0.999)
    finding = found.findings[0]
    assert finding.cause == "learning_rate", str(found)
    assert any("Lower the momentum" in remedy.advice for remedy in finding.remedies)
    assert len(found.signals["rehearsals"][1.0]) > 12
    assert with_momentum(0.9).healthy


def test_a_rate_that_is_fine_is_not_lowered():
    params, batches = weights_of((WIDTH, WIDTH, 3)), graphs()
    found = run(graph(lambda x: x), params, batches, 0.05)
    assert found.healthy
    assert list(found.signals["rehearsals"]) == [1.0]
