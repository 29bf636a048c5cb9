"""`diagnose` and `tap` on models whose operations they can't trace."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.ode import odeint
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir

import optclip
from optclip.diagnosis._contents import contents_of
from optclip.diagnosis.records import read_run

WIDTH = 8
RNG = np.random.default_rng(0)
HE = {
    f"w{i}": jnp.asarray(
        RNG.normal(size=(WIDTH, WIDTH)) * np.sqrt(2 / WIDTH), "float32"
    )
    for i in range(4)
}
BATCHES = [RNG.normal(size=(4, WIDTH)).astype(np.float32) for _ in range(6)]
TOO_LARGE = jax.tree.map(lambda w: 4 * w, HE)


def network(params, x):
    for w in params.values():
        x = jax.nn.relu(x @ w)
    return x


def with_vjp(fn):
    """Wraps a function in `jax.custom_vjp`, with its ordinary derivative."""
    wrapped = jax.custom_vjp(lambda *args: fn(*args))
    wrapped.defvjp(lambda *args: jax.vjp(fn, *args), lambda back, g: back(g))
    return wrapped


def with_jvp(fn):
    wrapped = jax.custom_jvp(lambda *args: fn(*args))
    wrapped.defjvp(lambda primals, tangents: jax.jvp(fn, primals, tangents))
    return wrapped


def on_the_host(params, x):
    """The network as a NumPy callback with a custom derivative."""

    def run(params, x):
        for w in params.values():
            x = np.maximum(np.asarray(x) @ np.asarray(w), 0)
        return x

    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    called = jax.custom_vjp(lambda p, x: jax.pure_callback(run, shape, p, x))
    called.defvjp(
        lambda p, x: (called(p, x), (p, x)),
        lambda given, g: jax.vjp(network, *given)[1](g),
    )
    return called(params, x)


def last_layer_hidden(params, x):
    first = {name: w for name, w in params.items() if name != "w3"}
    last = with_vjp(lambda w, x: jax.nn.relu(x @ w))
    return last(params["w3"], network(first, x))


MODELS = {
    "custom_vjp": (with_vjp(network), 0),
    "custom_jvp": (with_jvp(network), 0),
    "callback": (on_the_host, 0),
    "one layer": (last_layer_hidden, 3),
    "plain": (network, 4),
}


def loss_of(model):
    return lambda params, x: jnp.mean((model(params, x) - x[:, ::-1]) ** 2)


@functools.cache
def diagnosed(name, large):
    params, rate = (TOO_LARGE, 1e-9) if large else (HE, 0.01)
    return optclip.diagnose(
        loss_of(MODELS[name][0]), params, BATCHES, optimizer=optax.sgd(rate),
        progress=False,
    )  # fmt: skip


def head(found):
    return " ".join(str(found).split("\n\n")[0].split())


def test_opaque_model_is_not_called_healthy():
    found = diagnosed("callback", large=False)
    assert found.signals["uses"] == (0, 4)
    assert "Could not look inside the model: 0 of 4 uses" in head(found)
    assert not head(found).startswith("Nothing was found")
    assert "4 of 4 uses of parameters: inside the custom derivative" in str(found)


@pytest.mark.parametrize("name", ["custom_vjp", "custom_jvp"])
def test_model_with_a_custom_derivative_is_not_called_healthy(name):
    found = diagnosed(name, large=False)
    assert (found.signals["uses"], found.signals["forward_uses"]) == ((0, 4), 4)
    assert (
        "only part of the model: 0 of 4 uses of parameters were seen, and 4 only in "
        in (head(found))
    )
    words = "the backward signal of 4 of 4 uses of parameters: inside the custom"
    assert words in str(found)


def test_share_of_an_opaque_part_is_reported():
    found = diagnosed("one layer", large=False)
    assert found.signals["uses"] == (3, 4)
    assert "only part of the model: 3 of 4 uses of parameters" in head(found)


def test_transparent_model_keeps_its_headline():
    found = diagnosed("plain", large=False)
    assert head(found) == "Nothing was found that makes the gradients explode."
    assert "largest in" not in str(found)


def test_report_page_has_the_same_headline():
    run = read_run(np.ones(12))[0]
    for name in ("custom_vjp", "one layer", "plain"):
        found = diagnosed(name, large=False)
        (section,) = [
            s
            for s in contents_of(run, found, None).sections
            if s.heading == "Diagnosis"
        ]
        assert section.items[0].lead == head(found)


@pytest.mark.parametrize("name", ["custom_vjp", "one layer"])
def test_too_large_weights_are_found_in_opaque_models(name):
    (finding, *_) = diagnosed(name, large=True).findings
    assert finding.cause == "initialization"
    assert sorted(finding.where) == sorted(HE)
    (factor,) = [a.amount for a in finding.remedies if a.kind == "scale_weights"]
    np.testing.assert_allclose(factor, 0.25, rtol=0.2)


def test_gradient_norms_of_opaque_models_are_measured_from_outside():
    found = diagnosed("callback", large=True)
    grad = jax.jit(jax.grad(loss_of(network)))
    expected = [grad(TOO_LARGE, x) for x in BATCHES]
    for name in HE:
        sizes = [np.linalg.norm(g[name]) for g in expected]
        np.testing.assert_allclose(found.signals["leaf_norms"][name], sizes, rtol=1e-4)
    medians = {k: np.median(v) for k, v in found.signals["leaf_norms"].items()}
    assert f"largest in {max(medians, key=medians.get)}" in " ".join(str(found).split())
    assert len(found.signals["rehearsed_leaf_norms"]["w0"]) == 12


def test_headline_reports_a_failed_program_analysis_and_names_nonfinite_leaves(
    monkeypatch,
):
    def fail(*_):
        raise AttributeError("no `eqns`")

    monkeypatch.setattr("optclip.diagnosis._probe.tapped", fail)
    options = {"optimizer": optax.sgd(0.01), "progress": False}
    found = optclip.diagnose(loss_of(network), HE, BATCHES, **options)
    assert "its program could not be read" in head(found)

    def loss_fn(params, x):  # the derivative of one leaf is 0/0
        return jnp.sum(jnp.sqrt(params["a"] * 0)) + jnp.mean(params["b"][None] * x)

    params = {"a": jnp.ones(2), "b": jnp.ones(WIDTH)}
    found = optclip.diagnose(loss_fn, params, BATCHES, **options)
    assert found.findings[0].where == ("a",)


foreign_p = Primitive("product_of_another_library")
foreign_p.def_impl(lambda w, x: x @ w)
foreign_p.def_abstract_eval(lambda w, x: x)
mlir.register_lowering(foreign_p, mlir.lower_fun(lambda w, x: x @ w, False))
ad.defbilinear(foreign_p, lambda g, w, x: x.T @ g, lambda g, w, x: g @ w.T)


def solved_triangular(w, x):
    return jax.scipy.linalg.solve_triangular(w + 9 * jnp.eye(WIDTH), x.T)


def ragged(w, x):
    return jax.lax.ragged_dot(x, w[None], jnp.array([len(x)], jnp.int32))


OPAQUE = {
    "another library's": foreign_p.bind,
    "ragged_dot": ragged,
    "triangular solve": solved_triangular,
}


@pytest.mark.parametrize("name", OPAQUE)
def test_unmeasurable_products_are_counted(name):
    def loss_fn(params, x):
        return jnp.sum(OPAQUE[name](params["w0"], x @ params["w1"]))

    found = optclip.diagnosis.tap(loss_fn, HE, BATCHES[0])
    assert (len(found.sites), found.total) == (1, 2), found


def test_ode_solver_is_counted_as_unmeasurable():
    def field(y, _, params):
        return jnp.tanh(y @ params["w0"]) @ params["w1"]

    def loss_fn(params, x):
        return jnp.mean(odeint(field, x, jnp.array([0.0, 1.0]), params)[-1] ** 2)

    found = optclip.diagnosis.tap(loss_fn, HE, BATCHES[0])
    # The solver evaluates the field before its loop, too.
    assert all(len(site.unmeasured) == 2 for site in found.sites)
    assert len(found.not_seen) == 2
    assert "the custom derivative" in found.not_seen[0]


def test_callback_is_named_unless_it_only_takes_parameters():
    def loss_fn(params, x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        y = with_vjp(lambda w, x: jax.pure_callback(lambda w, x: x @ w, shape, w, x))
        w = jax.lax.stop_gradient(params["w0"])
        doubled = jax.pure_callback(lambda w: 2 * w, w, w)
        return jnp.sum(jax.lax.stop_gradient(y(w, x)) @ doubled @ params["w1"])

    found = optclip.diagnosis.tap(loss_fn, HE, BATCHES[0])
    assert [site.leaf for site in found.sites] == ["w0", "w1"]
    assert len(found.not_seen) == 1
