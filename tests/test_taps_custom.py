"""`tap` and `diagnose` on functions with a custom derivative."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip
from optclip.diagnosis import _growth, _probe, _rules, _signals
from optclip.diagnosis._replay import no_probes
from optclip.diagnosis._signal_panels import signal_panels
from optclip.diagnosis.taps import tapped

CLOSE = {"rtol": 1e-5}
RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 4)).astype(np.float32)
W = {
    name: RNG.normal(size=(4, 4)).astype(np.float32)
    for name in ("first", "mid", "last")
}


def norm(x):
    return float(np.linalg.norm(np.asarray(x, np.float64).ravel()))


def tripled(fn, **options):
    """Wraps a function so that its derivative is three times the true one."""
    wrapped = jax.custom_vjp(lambda *args: fn(*args))

    def back(pullback, g):
        return jax.tree.map(lambda x: 3 * x, pullback(g))

    wrapped.defvjp(lambda *args: jax.vjp(fn, *args), back, **options)
    return wrapped


def tripled_jvp(fn):
    wrapped = jax.custom_jvp(lambda *args: fn(*args))

    @wrapped.defjvp
    def rule(primals, tangents):
        out, tangent = jax.jvp(fn, primals, tangents)
        return out, 3 * tangent

    return wrapped


def network(w, x):
    x = jnp.tanh(x @ w["first"])
    return jnp.tanh(x @ w["mid"]) @ w["last"]


def in_scan(wrap):
    cell = wrap(lambda w, x: jnp.tanh(x @ w["first"]) @ w["mid"])
    return lambda w, x: jax.lax.scan(lambda h, _: (cell(w, h), None), x, None, 3)[0]


def of_scan(wrap):
    def run(w, x):
        return jax.lax.scan(lambda h, _: (jnp.tanh(h @ w["first"]), None), x, None, 3)[
            0
        ]

    return wrap(run)


def in_two_layers(wrap):
    layer = wrap(lambda w, x: jax.nn.relu(x @ w))
    return lambda w, x: layer(w["last"], layer(w["first"], x))


def nested(wrap):
    inner = wrap(lambda w, x: jnp.tanh(x @ w))
    return wrap(lambda w, x: inner(w["mid"], x @ w["first"]) @ w["last"])


# Each takes a wrapper that adds a rule to a function.
PROGRAMS = {
    "network": lambda wrap: wrap(network),
    "jit inside": lambda wrap: wrap(jax.jit(network)),
    "jit": lambda wrap: jax.jit(wrap(network)),
    "checkpoint": lambda wrap: jax.checkpoint(wrap(network)),
    "vmap": lambda wrap: jax.vmap(wrap(network), in_axes=(None, 0)),
    "cell of a scan": in_scan,
    "scan": of_scan,
    "layers": in_two_layers,
    "nested": nested,
}


@pytest.mark.parametrize("wrap", [tripled, tripled_jvp])
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_rule_stays_in_force_and_the_forward_signal_is_measured(name, wrap):
    def loss_of(wrap):
        return lambda w, x: jnp.mean(PROGRAMS[name](wrap)(w, x) ** 2)

    seen = tapped(loss_of(wrap), W, X)

    def probed(w):
        return seen.run(w, (X,), no_probes(seen.plan))[0]

    found = jax.jit(jax.value_and_grad(probed))(W)
    wanted = jax.jit(jax.value_and_grad(loss_of(wrap)))(W, X)
    chex.assert_trees_all_close(found, wanted, rtol=1e-6, atol=1e-7)
    plain = optclip.diagnosis.tap(loss_of(lambda fn: fn), W, X).sites
    sites = optclip.diagnosis.tap(loss_of(wrap), W, X).sites
    assert any(site.unmeasured for site in sites)
    for site, other in zip(sites, plain, strict=True):
        assert (site.leaf, site.order) == (other.leaf, other.order)
        for field in ("rms_in", "rms_out", "rms_weight"):
            got, want = getattr(site, field), getattr(other, field)
            np.testing.assert_allclose(got, want, **CLOSE)
        assert np.shape(site.signal_out) == np.shape(other.signal_out)
        for field in ("signal_in", "signal_out"):
            missing = np.all(np.isnan(getattr(site, field)))
            assert missing == (field in site.unmeasured)


def test_the_backward_signal_is_measured_at_the_boundary():
    model = tripled(network)
    sites = optclip.diagnosis.tap(lambda w, x: jnp.sum(model(w, x)), W, X).sites
    first, _, last = sites
    w = {name: value.astype(np.float64) for name, value in W.items()}
    h = np.tanh(X @ w["first"])
    k = np.tanh(h @ w["mid"])
    g = np.ones((3, 4))
    into = (g @ w["last"].T * (1 - k**2)) @ w["mid"].T * (1 - h**2)
    np.testing.assert_allclose(last.signal_out, norm(g), **CLOSE)
    np.testing.assert_allclose(first.signal_in, norm(3 * into @ w["first"].T), **CLOSE)
    unmeasured = [site.unmeasured for site in sites]
    assert unmeasured == [("signal_out",), ("signal_in", "signal_out"), ("signal_in",)]
    assert [site.activation for site in sites] == [None, "tanh", "tanh"]


# For each body, the signals that can be measured.
BODIES = {
    "product": (lambda w, x: x @ w, "in out"),
    "bias": (lambda w, x: x @ w + 1, "in out"),
    "negative bias": (lambda w, x: jnp.ones((3, 4)) - x @ w, "in out"),
    "rearranged": (lambda w, x: (x.T.reshape(4, 3).T @ w).reshape(12), "in out"),
    "jit": (jax.jit(lambda w, x: jax.jit(jnp.matmul)(x, w) + 1), "in out"),
    "scaled": (lambda w, x: 2 * (x @ w), "in"),
    "input used twice": (lambda w, x: x @ w + x, "out"),
    "output used twice": (lambda w, x: (lambda y: y + jnp.tanh(y))(x @ w), "in"),
    "two results": (lambda w, x: (lambda y: (y, y.sum()))(x @ w), "in"),
    "broadcast": (lambda w, x: jnp.broadcast_to((x @ w)[None], (2, 3, 4)), "in"),
    "both used": (lambda w, x: jnp.tanh(jnp.tanh(x) @ w), ""),
    "cast": (lambda w, x: (x.astype("bfloat16") @ w.astype("bfloat16")) * 1.0, ""),
}


@pytest.mark.parametrize("name", BODIES)
def test_only_exact_signals_at_the_boundary_count_as_measured(name):
    body, wanted = BODIES[name]

    def loss_of(model):
        def loss_fn(w, x):
            outs = jax.tree.leaves(model(w["first"], jnp.sin(x)))
            return sum(jnp.sum(jnp.cos(out)) for out in outs)

        return loss_fn

    kept = jax.custom_vjp(lambda *args: body(*args))
    kept.defvjp(lambda *args: jax.vjp(body, *args), lambda back, g: back(g))
    (site,) = optclip.diagnosis.tap(loss_of(kept), W, X).sites
    (plain,) = optclip.diagnosis.tap(loss_of(body), W, X).sites
    for field in ("in", "out"):
        if field in wanted.split():
            got, want = (getattr(x, f"signal_{field}") for x in (site, plain))
            np.testing.assert_allclose(got, want, **CLOSE)
        else:
            assert f"signal_{field}" in site.unmeasured


def test_a_rule_that_asks_which_arguments_vary_is_given_the_same_answer():
    varied = []
    model = jax.custom_vjp(lambda w, x: x @ w)

    def forward(w, x):
        varied.append((w.perturbed, x.perturbed))
        return x.value @ w.value, (w.value, x.value)

    def backward(saved, g):
        return saved[1].T @ g, g @ saved[0].T

    model.defvjp(forward, backward, symbolic_zeros=True)
    seen = tapped(lambda w, x: jnp.sum(model(w, x)), W["mid"], X)

    def probed(w, probes):
        return seen.run(w, (X,), probes)[0]

    grad, _ = jax.grad(probed, (0, 1))(W["mid"], no_probes(seen.plan))
    np.testing.assert_allclose(grad, X.T @ np.ones((3, 4)), **CLOSE)
    assert set(varied) == {(True, False)}
    assert seen.plan.sites[0].unmeasured == ("signal_in",)


def test_a_body_with_side_effects_is_not_evaluated_again():
    def printed(w, x):
        jax.debug.callback(lambda: calls.append(1))
        return x @ w

    calls = []
    found = optclip.diagnosis.tap(
        lambda w, x: jnp.sum(tripled(printed)(w["mid"], x @ w["first"])), W, X
    )
    jax.effects_barrier()
    assert len(calls) == 1
    assert [site.leaf for site in found.sites] == ["first"]
    assert (found.total, len(found.not_seen)) == (2, 1)


def test_operations_inside_a_rule_that_cannot_be_inspected_stay_unseen():
    def body(w, x):
        y = x @ w["first"]
        return jax.lax.while_loop(lambda y: y[0, 0] > 1e9, lambda y: y @ w["mid"], y)

    model = jax.custom_vjp(lambda w, x: body(w, x))
    model.defvjp(lambda w, x: (body(w, x), w), lambda w, g: (w, g))
    found = optclip.diagnosis.tap(lambda w, x: jnp.sum(model(w, x)), W, X)
    assert [site.leaf for site in found.sites] == ["first"]
    assert len(found.not_seen) == 1
    assert "the custom derivative" in found.not_seen[0]


def test_the_table_shows_a_dash_for_a_signal_that_was_not_measured():
    model = tripled(network)
    found = optclip.diagnosis.tap(lambda w, x: jnp.sum(model(w, x)), W, X)
    rows = str(found).split("\n")
    assert [row.split()[1] for row in rows[1:4]] == ["-", "-", "3.46"]
    assert rows[4] == (
        "Seen 0 of 3 uses of parameters, and 3 only in the forward pass."
    )


# Eight layers that each double the signal. A linear network needs no activation, and
# the relu of a positive number is the number itself.
DOUBLE = {f"w{i}": 2 * np.eye(4, dtype=np.float32) for i in range(8)}


def doubled(w, x):
    layer = jax.custom_vjp(lambda w, x: jax.nn.relu(x @ w))
    body = lambda w, x: jax.nn.relu(x @ w)  # noqa: E731
    layer.defvjp(lambda *args: jax.vjp(body, *args), lambda back, g: back(g))
    return functools.reduce(lambda x, w: layer(w, x), w.values(), x)


def test_growth_is_measured_at_the_inputs_of_layers_with_a_rule():
    sites = optclip.diagnosis.tap(
        lambda w, x: jnp.sum(doubled(w, x)), DOUBLE, np.abs(X)
    ).sites
    layers = _growth.layers_of(sites)
    assert all(np.isnan(layer.back_out) for layer in layers)
    growth = _growth.depth_growth(layers)
    # From the first two of the eight layers to the last two, there are six layers.
    np.testing.assert_allclose(growth.back, 6 * np.log10(2), **CLOSE)
    np.testing.assert_allclose(growth.forward, 6 * np.log10(2), **CLOSE)
    assert _growth.activation_gains(layers) == []


def test_growth_over_steps_is_measured_at_the_input_of_a_cell_with_a_rule():
    cell = tripled(lambda w, h: jax.nn.relu(h @ w))  # the signal grows by 3 * 2

    def loss_fn(w, x):
        return jnp.sum(jax.lax.scan(lambda h, _: (cell(w, h), None), x, None, 8)[0])

    (site,) = optclip.diagnosis.tap(loss_fn, DOUBLE["w0"], np.abs(X)).sites
    assert site.unmeasured == ("signal_out",)
    growth = _growth.time_growth((site,))
    np.testing.assert_allclose(growth.back, 6 * np.log10(6), **CLOSE)
    unrolled = lambda w, x: functools.reduce(lambda h, _: cell(w, h), range(8), x)  # noqa: E731
    sites = optclip.diagnosis.tap(
        lambda w, x: jnp.sum(unrolled(w, x)), DOUBLE["w0"], np.abs(X)
    ).sites
    growth = _growth.time_growth(sites)
    np.testing.assert_allclose(growth.back, 6 * np.log10(6), **CLOSE)


def test_activations_with_a_missing_signal_have_no_gain():
    sites = optclip.diagnosis.tap(
        lambda w, x: jnp.sum(tripled(network)(w, x)), W, X
    ).sites
    layers = _growth.layers_of(sites)
    assert [layer.source for layer in layers] == [None, 0, 1]
    assert _growth.activation_gains(layers) == []


def test_a_missing_signal_is_not_an_overflow():
    def broken(w, x):
        return jnp.sum(tripled(network)(w, x))

    half = {name: jnp.asarray(w, jnp.float16) for name, w in W.items()}
    sites = optclip.diagnosis.tap(broken, half, jnp.asarray(X, jnp.float16)).sites
    mid = sites[1]
    assert np.isfinite(mid.rms_out)
    bad = _probe.Batch(np.inf, np.inf, (), (mid,))
    signals = _signals.Signals(
        (bad,), (), 0, [], None, None, {}, [], low=("float16",), wide_norm=1.0
    )
    (finding,) = _rules.judge(signals)
    assert (finding.cause, finding.where) == ("overflow", ())
    overflowed = dataclasses.replace(mid, unmeasured=("signal_in",))
    signals = dataclasses.replace(signals, batches=(bad._replace(sites=(overflowed,)),))
    (finding,) = _rules.judge(signals)
    assert finding.where == ("mid",)


def test_a_missing_signal_is_not_drawn():
    figure = pytest.importorskip("matplotlib.figure").Figure()

    def loss_fn(w, x):
        return jnp.sum(tripled(network)(w, network(w, x)))

    sites = optclip.diagnosis.tap(loss_fn, W, X).sites
    (panel,) = signal_panels(sites)
    panel.draw(figure)
    # Three uses outside the function, and the last one inside.
    drawn = figure.axes[0].lines[0].get_ydata()
    wanted = [site.signal_out for site in (*sites[:3], sites[5])]
    np.testing.assert_allclose(drawn, wanted, **CLOSE)


BATCHES = [RNG.normal(size=(4, 4)).astype(np.float32) for _ in range(4)]


def test_the_report_says_what_was_seen_only_in_the_forward_pass():
    model = tripled(network)
    small = jax.tree.map(lambda w: 0.3 * w, W)

    def loss_fn(w, x):
        return jnp.mean((model(w, jnp.tanh(x @ w["mid"])) - x) ** 2)

    found = optclip.diagnose(
        loss_fn, small, BATCHES, optimizer=optax.sgd(1e-3), progress=False
    )
    assert (found.signals["uses"], found.signals["forward_uses"]) == ((1, 4), 3)
    words = " ".join(str(found).split())
    assert words.startswith(
        "Could look inside only part of the model: 1 of 4 uses of parameters were "
        "seen, and 3 only in the forward pass. In these, and from outside"
    )
    assert "1 of 4 uses of parameters (3 only in the forward pass)." in words
    assert "Not seen: the backward signal of 3 of 4 uses of parameters: inside" in words


def test_the_body_is_evaluated_again_only_for_its_statistics():
    seen = tapped(lambda w, x: jnp.sum(tripled(network)(w, x)), W, X)

    def count(probes):
        program = jax.make_jaxpr(lambda w: seen.run(w, (X,), probes)[0])(W)
        return str(program).count("dot_general")

    assert count(no_probes(seen.plan)) == 2 * count(())
