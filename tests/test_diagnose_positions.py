"""Growth over the positions of the inputs, for recurrences that can't be inspected."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip
from optclip.diagnosis import _probe, _rules, _signals
from optclip.diagnosis._growth import Growth
from optclip.diagnosis._positions import position_growth, sequences_of
from optclip.diagnosis.causes import recurrence
from optclip.diagnosis.taps import scalar_loss

RNG = np.random.default_rng(0)
STEPS, WIDTH = 64, 4
X = RNG.normal(size=(3, STEPS, WIDTH)).astype(np.float32)


def states(x, factor, reverse=False):
    """Returns the states of h = factor * h + x for x[examples, steps, features]."""
    steps = jnp.arange(x.shape[1])
    ages = steps[:, None] - steps[None]
    ages = -ages if reverse else ages
    weights = jnp.where(ages >= 0, factor[0] ** jnp.maximum(ages, 0), 0)
    return jnp.einsum("ts,nsd->ntd", weights, x)


def scanned(x, factor):
    """The same by an associative scan."""

    def combine(one, two):
        return one[0] * two[0], two[0] * one[1] + two[1]

    factors = jnp.broadcast_to(factor, x.shape)
    return jax.lax.associative_scan(combine, (factors, x), axis=1)[1]


def params_of(factor):
    return {"factor": jnp.full(WIDTH, factor), "head": jnp.eye(WIDTH)}


def last_state(p, x, run=states):
    return jnp.sum(run(x, p["factor"])[:, -1] @ p["head"])


def measured(loss_fn, params, batch):
    """Returns the growth over positions, and its norms, as `diagnose` measures them."""
    optimizer = optax.with_extra_args_support(optax.sgd(0.1))
    probe = _probe.Probe(scalar_loss(loss_fn, False), optimizer, lambda _: None)
    probe.read(params, batch)
    seen, _ = probe.batch(params, batch)
    return position_growth(seen.position_norms, seen.sites), seen.position_norms


def check(growth, factor, path):
    """Compares with h = factor * h + x: the derivative at step t is factor**(-t)."""
    assert growth.leaves == (path,)
    assert growth.count == STEPS
    # From the middle of the last 16 steps to that of the first 16, there are 48 steps.
    np.testing.assert_allclose(growth.back, 48 * np.log10(factor), rtol=1e-4)
    np.testing.assert_allclose(growth.each, factor, rtol=1e-4)
    np.testing.assert_allclose(growth.half, 24 * np.log10(factor), rtol=1e-4)


@pytest.mark.parametrize("run", [states, scanned])
def test_growth_of_a_linear_recurrence_is_its_factor(run):
    loss_fn = functools.partial(last_state, run=run)
    growth, norms = measured(loss_fn, params_of(1.1), X)
    check(growth, 1.1, "batch")
    wanted = 1.1 ** np.arange(STEPS)[::-1] * np.sqrt(3 * WIDTH)
    np.testing.assert_allclose(norms["batch"], wanted, rtol=1e-4)


def test_the_first_axis_is_that_of_the_positions_if_another_leaf_says_so():
    def loss_fn(p, batch):
        return last_state(p, batch["x"].swapaxes(0, 1))

    batch = {"x": X.swapaxes(0, 1), "y": np.zeros(3)}
    check(measured(loss_fn, params_of(1.1), batch)[0], 1.1, "batch/x")


def test_integer_inputs_are_followed_at_their_embedding():
    tokens = RNG.integers(0, 9, size=(3, STEPS))
    params = {"table": jnp.ones((9, WIDTH)), **params_of(1.1)}
    growth, norms = measured(
        lambda p, tokens: last_state(p, p["table"][tokens]), params, tokens
    )
    check(growth, 1.1, "table")
    assert norms == {}
    table, *_ = optclip.diagnosis.tap(
        lambda p, tokens: last_state(p, p["table"][tokens]), params, tokens
    ).sites
    wanted = 1.1 ** np.arange(STEPS)[::-1] * np.sqrt(3 * WIDTH)
    np.testing.assert_allclose(table.signal_positions, wanted, rtol=1e-4)
    assert table.signal_out == pytest.approx(np.linalg.norm(wanted), rel=1e-4)


@pytest.mark.parametrize(
    "shape", [(3, 64), (3, 64, 4, 1), (3, 7, 4), (), (64,)], ids=str
)
def test_other_leaves_are_not_sequences(shape):
    assert sequences_of({"x": np.zeros(shape, np.float32)}).leaves == []
    assert sequences_of({"x": np.zeros((3, 8, 1), int)}).leaves == []


def test_sequences_are_replaced_where_they_were():
    batch = {"a": np.zeros((2, 8, 1)), "b": np.ones(2), "c": np.zeros((2, 9, 1))}
    found = sequences_of(batch)
    assert found.paths == ("batch/a", "batch/c")
    assert found.axes == (1, 1)
    assert found.replaced([1, 2]) == {"a": 1, "b": batch["b"], "c": 2}


def with_callback(p, x):
    shape = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    x = jax.pure_callback(lambda x: 2 * np.asarray(x), shape, x)
    return last_state(p, x)


def test_inputs_without_a_derivative_are_not_followed():
    assert measured(with_callback, params_of(1.1), X) == (None, {})


def decays_from_the_first(p, x):
    """Reads the first position, to which the others contribute less and less."""
    return jnp.sum(states(x, p["factor"], reverse=True)[:, 0] @ p["head"])


def class_token(p, x):
    weights = jnp.where(jnp.arange(x.shape[1]) == 0, 1.0, 1e-9 * p["factor"][0])
    return jnp.sum(jnp.einsum("t,btd->bd", weights, x) @ p["head"])


def attention(p, x):
    scores = jnp.einsum("nqd,nkd->nqk", x @ p["head"], x)
    mask = jnp.tril(jnp.ones((x.shape[1],) * 2, bool))
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e9))
    return jnp.mean(jnp.square(weights @ x @ p["head"]))


@pytest.mark.parametrize(
    ("loss_fn", "factor"),
    [
        (last_state, 0.9),
        (last_state, 1.0),
        (decays_from_the_first, 0.9),
        (class_token, 1.0),
        (attention, 1.0),
    ],
)
@pytest.mark.parametrize("steps", [8, STEPS])
def test_healthy_models_do_not_grow_over_positions(loss_fn, factor, steps):
    growth, norms = measured(loss_fn, params_of(factor), X[:, :steps])
    assert set(norms) == {"batch"}
    assert growth is None or growth.back < 0.5


def test_a_signal_that_grows_toward_a_reversed_output_is_not_a_decay():
    """A reversed recurrence that explodes has its largest derivative at the end."""

    def loss_fn(p, x):
        return jnp.sum(states(x[:, ::-1], p["factor"])[:, -1] @ p["head"])

    growth, norms = measured(loss_fn, params_of(1.1), X)
    assert norms["batch"][-1] > 100 * norms["batch"][0]
    assert growth is None


def test_a_program_that_cannot_be_read_has_no_output_to_compare_with(monkeypatch):
    def fail(*_):
        raise AttributeError("no `eqns`")

    monkeypatch.setattr("optclip.diagnosis._probe.tapped", fail)
    growth, norms = measured(last_state, params_of(1.1), X)
    assert growth is None
    wanted = 1.1 ** np.arange(STEPS)[::-1] * np.sqrt(3 * WIDTH)
    np.testing.assert_allclose(norms["batch"], wanted, rtol=1e-4)


def signals_of(**changes):
    batch = _probe.Batch(1.0, 1.0, (), ())
    signals = _signals.Signals(
        (batch,) * 8,
        (),
        0,
        [],
        None,
        None,
        {},
        [],
        trust={1.0: 0.9},
        rehearsals={1.0: [1.0] * 12, 0.1: [1.0] * 12},
        starts=[1.0] * 12,
    )
    return dataclasses.replace(signals, **changes)


OVER = Growth(3.0, 0.0, 64, ("batch/x",), 1.15, 1.5)


def test_growth_over_positions_is_a_recurrence():
    (finding,) = _rules.judge(signals_of(positions=OVER))
    assert (finding.cause, finding.where) == ("recurrence", ("batch/x",))
    assert finding.evidence.endswith(
        "grows by 1e+03 from the last quarter of 64 positions to the first, "
        "x1.15 a position."
    )
    assert "state-space layer" in finding.remedy
    assert [remedy.kind for remedy in finding.remedies][:3] == [
        "clip",
        "advice",
        "gate",
    ]


@pytest.mark.parametrize("changes", [{"back": 1.9}, {"half": 0.4}])
def test_little_growth_over_positions_is_not_a_finding(changes):
    assert _rules.judge(signals_of(positions=OVER._replace(**changes))) == ()


def test_growth_that_was_found_in_the_program_comes_first():
    time = Growth(2.0, 0.0, 64, ("cell",), 1.1, 1.0)
    found = recurrence.recurrence(signals_of(positions=OVER, time=time))
    assert found.finding.where == ("cell",)
    mild = time._replace(back=0.5, half=0.1)
    found = recurrence.recurrence(signals_of(positions=OVER, time=mild))
    assert found.finding.where == ("batch/x",)


@jax.custom_vjp
def hidden(x, factor):
    """The recurrence in a function of the host, with its derivative."""

    def run(x, factor):
        x, h = np.array(x), 0.0
        for step in range(x.shape[1]):
            x[:, step] = h = np.asarray(factor) * h + x[:, step]
        return x

    return jax.pure_callback(run, jax.ShapeDtypeStruct(x.shape, x.dtype), x, factor)


hidden.defvjp(lambda *args: jax.vjp(states, *args), lambda back, g: back(g))


@functools.cache
def diagnosed(factor):
    def loss_fn(p, batch):
        x, y = batch
        return jnp.mean((hidden(x, p["factor"])[:, -1] @ p["head"] - y) ** 2)

    batches = [(x, x[:, -1]) for x in RNG.normal(size=(4, 3, STEPS, WIDTH))]
    return optclip.diagnose(
        loss_fn, params_of(factor), batches, optimizer=optax.sgd(1e-12), progress=False
    )


def test_diagnose_finds_a_recurrence_that_the_program_does_not_show():
    found = diagnosed(1.12)
    assert found.signals["uses"] == (1, 2)
    assert found.signals["time_growth"] is None
    growth = 48 * np.log10(1.12)
    assert found.signals["position_growth"] == pytest.approx(growth, 1e-3)
    finding = found.findings[0]
    assert (finding.cause, finding.where) == ("recurrence", ("batch/0",))


def test_diagnose_is_silent_on_a_stable_recurrence():
    found = diagnosed(0.9)
    assert "recurrence" not in [finding.cause for finding in found.findings]
