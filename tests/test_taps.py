"""`optclip.diagnosis.tap` compared with hand-written backward passes in NumPy."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import optclip
from optclip.diagnosis import taps as taps_module
from optclip.diagnosis._replay import Change, no_probes
from optclip.diagnosis.taps import tapped

CLOSE = {"rtol": 1e-5}


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def norm(x):
    return float(np.linalg.norm(np.asarray(x, np.float64).ravel()))


def rms(x):
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


def check(sites, wanted):
    """Compares sites with (leaf, data in, data out, signal in, signal out)."""
    assert [s.leaf for s in sites] == [w[0] for w in wanted]
    for site, (leaf, data_in, data_out, signal_in, signal_out) in zip(
        sites, wanted, strict=True
    ):
        got = site.rms_in, site.rms_out, site.signal_in, site.signal_out
        want = rms(data_in), rms(data_out), norm(signal_in), norm(signal_out)
        np.testing.assert_allclose(got, want, **CLOSE, err_msg=leaf)


def test_mlp_by_hand():
    w = {"a": draw(1, 3, 5), "b": draw(2, 5, 4), "c": draw(3, 4, 2)}
    x, bias = draw(0, 6, 3), draw(4, 1, 5)

    def loss_fn(w, x):
        h = jax.nn.relu(x @ w["a"] + bias)
        return jnp.sum(jnp.square(jnp.tanh(h @ w["b"]) @ w["c"]))

    a, b, c = (w[k].astype(np.float64) for k in "abc")
    z1 = x @ a
    h1 = np.maximum(z1 + bias, 0)
    z2 = h1 @ b
    h2 = np.tanh(z2)
    z3 = h2 @ c
    d3 = 2 * z3
    d2 = (d3 @ c.T) * (1 - h2**2)
    d1 = (d2 @ b.T) * (z1 + bias > 0)
    found = optclip.diagnosis.tap(loss_fn, w, x)
    check(
        found.sites,
        [
            ("a", x, z1, d1 @ a.T, d1),
            ("b", h1, z2, d2 @ b.T, d2),
            ("c", h2, z3, d3 @ c.T, d3),
        ],
    )
    assert [s.activation for s in found.sites] == [None, "relu", "tanh"]
    assert [s.source for s in found.sites] == [None, 0, 1]
    assert [(s.fan_in, s.fan_out) for s in found.sites] == [(3, 5), (5, 4), (4, 2)]
    weights = [s.rms_weight for s in found.sites]
    np.testing.assert_allclose(weights, list(map(rms, (a, b, c))), **CLOSE)
    assert found.total == 3
    assert not found.not_seen


def convolve(x, k):
    """Returns the valid convolution of x[n, h, w, i] with k[h, w, i, o]."""
    high, wide = x.shape[1] - k.shape[0] + 1, x.shape[2] - k.shape[1] + 1
    return sum(
        x[:, i : i + high, j : j + wide] @ k[i, j]
        for i in range(k.shape[0])
        for j in range(k.shape[1])
    )


def convolve_back(d, k, shape):
    """Returns the derivative with respect to x, given that of the result."""
    back = np.zeros(shape)
    for i in range(k.shape[0]):
        for j in range(k.shape[1]):
            back[:, i : i + d.shape[1], j : j + d.shape[2]] += d @ k[i, j].T
    return back


def test_convolutional_network_by_hand():
    w = {
        "conv1": draw(1, 3, 3, 2, 4),
        "conv2": draw(2, 2, 2, 4, 3),
        "out": draw(3, 3, 2),
    }
    x = draw(0, 2, 6, 6, 2)
    apply = functools.partial(
        jax.lax.conv_general_dilated, window_strides=(1, 1), padding="VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip

    def loss_fn(w, x):
        h = jax.nn.relu(apply(x, w["conv1"]))
        h = jnp.mean(jnp.tanh(apply(h, w["conv2"])), axis=(1, 2))
        return jnp.sum(h @ w["out"])

    k1, k2, k3 = (w[k].astype(np.float64) for k in w)
    z1 = convolve(x, k1)
    h1 = np.maximum(z1, 0)
    z2 = convolve(h1, k2)
    h2 = np.tanh(z2)
    pooled = h2.mean((1, 2))
    d3 = np.ones((2, 2))
    spread = np.broadcast_to((d3 @ k3.T)[:, None, None] / 9, z2.shape)
    d2 = spread * (1 - h2**2)
    into1 = convolve_back(d2, k2, h1.shape)
    d1 = into1 * (z1 > 0)
    found = optclip.diagnosis.tap(loss_fn, w, x)
    check(
        found.sites,
        [
            ("conv1", x, z1, convolve_back(d1, k1, x.shape), d1),
            ("conv2", h1, z2, into1, d2),
            ("out", pooled, pooled @ k3, d3 @ k3.T, d3),
        ],
    )
    assert [s.kind for s in found.sites] == ["conv", "conv", "matmul"]
    assert [(s.fan_in, s.fan_out) for s in found.sites[:2]] == [(18, 36), (16, 12)]


def recurrent(w, x):
    """Returns states and backward signals of h = tanh(x + h w), loss sum(last**2)."""
    h, zs, hs = np.zeros((2, 4)), [], [np.zeros((2, 4))]
    for row in x:
        zs.append(hs[-1] @ w)
        h = np.tanh(row + zs[-1])
        hs.append(h)
    signal, signals = 2 * h, []
    for h in hs[:0:-1]:
        signals.append(signal * (1 - h**2))
        signal = signals[-1] @ w.T
    return zs, hs, signals[::-1]


@pytest.mark.parametrize("scanned", [True, False])
def test_recurrent_network_by_hand(scanned):
    w, x = draw(1, 4, 4), draw(0, 7, 2, 4)

    def loss_fn(w, x):
        def step(h, row):
            return jnp.tanh(row + h @ w["r"]), None

        h = jnp.zeros((2, 4))
        if scanned:
            h, _ = jax.lax.scan(step, h, x)
        else:
            for row in x:
                h, _ = step(h, row)
        return jnp.sum(h**2)

    zs, hs, signals = recurrent(w.astype(np.float64), x)
    found = optclip.diagnosis.tap(loss_fn, {"r": w}, x)
    steps = len(found.sites)
    assert steps == (1 if scanned else 7)
    site = found.sites[0]
    if scanned:
        out, back = site.signal_out, site.signal_in
        assert not site.stacked
        np.testing.assert_allclose(site.rms_in, list(map(rms, hs[:-1])), **CLOSE)
        np.testing.assert_allclose(site.rms_out, list(map(rms, zs)), **CLOSE)
    else:
        out = [s.signal_out for s in found.sites]
        back = [s.signal_in for s in found.sites]
    np.testing.assert_allclose(out, list(map(norm, signals)), **CLOSE)
    wanted = [norm(s @ w.astype(np.float64).T) for s in signals]
    np.testing.assert_allclose(back, wanted, **CLOSE)


def test_transformer_block_by_hand():
    names = ["query", "key", "value", "project"]
    w = {n: draw(i, 4, 4) for i, n in enumerate(names)}
    w |= {"up": draw(5, 4, 8), "down": draw(6, 8, 4), "scale": 1 + draw(7, 1, 4)}
    x, readout = draw(8, 5, 4), draw(9, 5, 4)

    def loss_fn(w, x):
        x = x * w["scale"]
        q, k, v = x @ w["query"], x @ w["key"], x @ w["value"]
        x = x + jax.nn.softmax(q @ k.T / 2) @ v @ w["project"]
        x = x + jax.nn.relu(x @ w["up"]) @ w["down"]
        return jnp.sum(x * readout)

    W = {k: v.astype(np.float64) for k, v in w.items()}
    s = x * W["scale"]
    q, k, v = s @ W["query"], s @ W["key"], s @ W["value"]
    logits = q @ k.T / 2
    a = np.exp(logits - logits.max(-1, keepdims=True))
    a /= a.sum(-1, keepdims=True)
    mixed = a @ v
    y = s + mixed @ W["project"]
    up = y @ W["up"]
    hidden = np.maximum(up, 0)
    dd = readout.astype(np.float64)
    dup = (dd @ W["down"].T) * (up > 0)
    dy = dd + dup @ W["up"].T
    dmixed = dy @ W["project"].T
    da = dmixed @ v.T
    dlogits = a * (da - (da * a).sum(-1, keepdims=True)) / 2
    dq, dk, dv = dlogits @ k, dlogits.T @ q, a.T @ dmixed
    into = {n: d @ W[n].T for n, d in zip(names, (dq, dk, dv), strict=False)}
    ds = dy + sum(into.values())
    found = {site.leaf: site for site in optclip.diagnosis.tap(loss_fn, w, x).sites}
    check(
        [found[n] for n in ("scale", *names, "up", "down")],
        [
            ("scale", x, s, ds * W["scale"], ds),
            ("query", s, q, into["query"], dq),
            ("key", s, k, into["key"], dk),
            ("value", s, v, into["value"], dv),
            ("project", mixed, mixed @ W["project"], dmixed, dy),
            ("up", y, up, dup @ W["up"].T, dup),
            ("down", hidden, hidden @ W["down"], dd @ W["down"].T, dd),
        ],
    )
    assert found["down"].activation == "relu"
    assert found["up"].activation is None


W = {"w": draw(1, 4, 4) / 2, "v": draw(2, 4, 4)}
X = draw(0, 3, 4)


def block(w, x):
    return jnp.tanh(jnp.tanh(x @ w["w"]) @ w["v"])


def stacked(w, x):
    layers = jnp.stack([w["w"], w["v"]])
    return jax.lax.scan(lambda x, k: (jnp.tanh(x @ k), None), x, layers)[0]


SAME = {
    "jit": jax.jit(block),
    "checkpoint": jax.checkpoint(block),
    "vmap": jax.vmap(block, in_axes=(None, 0)),
    "jit of vmap of checkpoint": jax.jit(jax.vmap(jax.checkpoint(block), (None, 0))),
    "cond": lambda w, x: jax.lax.cond(x[0, 0] < 99, block, lambda w, x: x, w, x),
    "switch": lambda w, x: jax.lax.switch(1, [lambda w, x: x, block], w, x),
    "relu beside": lambda w, x: jax.nn.relu(block(w, x)) + jax.nn.silu(block(w, x)),
}


@pytest.mark.parametrize("name", SAME)
def test_tap_sees_through_transformations(name):
    def loss_fn(w, x):
        return jnp.sum(SAME[name](w, x) ** 2)

    plain = optclip.diagnosis.tap(lambda w, x: jnp.sum(block(w, x) ** 2), W, X).sites
    found = optclip.diagnosis.tap(loss_fn, W, X)
    assert found.total == len(found.sites)
    assert {s.leaf for s in found.sites} == {"w", "v"}
    if name != "relu beside":
        for site, other in zip(found.sites, plain, strict=True):
            np.testing.assert_allclose(site.signal_out, other.signal_out, **CLOSE)
            np.testing.assert_allclose(site.rms_in, other.rms_in, **CLOSE)


def test_scanned_layers_are_distinguished_from_recurrent_steps():
    found = optclip.diagnosis.tap(lambda w, x: jnp.sum(stacked(w, x) ** 2), W, X)
    plain = optclip.diagnosis.tap(lambda w, x: jnp.sum(block(w, x) ** 2), W, X).sites
    (site,) = found.sites
    assert site.stacked
    np.testing.assert_allclose(site.signal_out, [s.signal_out for s in plain], **CLOSE)


def test_nested_scan_gives_one_row_per_step():
    def loss_fn(w, x):
        def outer(h, _):
            return jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), None), h, None, 3)[
                0
            ], None

        return jnp.sum(jax.lax.scan(outer, x, None, 2)[0])

    (site,) = optclip.diagnosis.tap(loss_fn, W["w"], X).sites
    assert np.shape(site.signal_out) == (2, 3)


def test_untaken_branch_measures_nothing():
    def loss_fn(w, x):
        h = jax.lax.cond(x[0, 0] > 99, lambda: x @ w["w"], lambda: x @ w["v"])
        return jnp.sum(h**2)

    sites = {s.leaf: s for s in optclip.diagnosis.tap(loss_fn, W, X).sites}
    assert sites["w"].signal_out == 0
    assert sites["v"].signal_out > 0


@pytest.mark.parametrize("change", [Change(relu=True), Change(wide=True)])
def test_branches_with_different_numbers_of_uses_can_be_changed(change):
    def loss_fn(w, x):
        deep = lambda x: jnp.exp(x @ w["w"]) @ w["v"]  # noqa: E731
        return jnp.sum(jax.lax.cond(x[0, 0] < 99, deep, lambda x: x @ w["v"], x))

    seen = tapped(loss_fn, W, X)
    loss = jax.jit(lambda w: seen.run(w, (X,), (), change)[0])(W)
    inner = jax.nn.relu if change.relu else jnp.exp
    wanted = jnp.sum(inner(X @ W["w"]) @ W["v"])
    np.testing.assert_allclose(loss, wanted, rtol=1e-4)


def test_lookups_scales_and_concatenated_parameters():
    params = {"table": draw(1, 9, 4), "gain": draw(2, 1, 4)}
    params |= {"a": draw(3, 4, 2), "b": draw(4, 4, 3)}
    at = jnp.array([1, 5, 5])

    def loss_fn(p, at):
        h = p["table"][at] * p["gain"]
        return jnp.sum(h @ jnp.concatenate([p["a"], p["b"]], axis=1))

    table, gain, kernel = optclip.diagnosis.tap(loss_fn, params, at).sites
    assert (table.kind, gain.kind, kernel.kind) == ("embedding", "scale", "matmul")
    both = np.concatenate([params["a"], params["b"]], axis=1).astype(np.float64)
    signal = np.broadcast_to(both.sum(1), (3, 4))
    assert kernel.leaves == ("b", "a")
    np.testing.assert_allclose(gain.signal_out, norm(signal), **CLOSE)
    np.testing.assert_allclose(table.signal_out, norm(signal * params["gain"]), **CLOSE)


@jax.custom_vjp
def tripled(w, x):
    return x @ w


tripled.defvjp(
    lambda w, x: (x @ w, (w, x)), lambda r, d: (3 * r[1].T @ d, 3 * d @ r[0].T)
)


def test_custom_rule_is_preserved():
    def loss_fn(w, x):
        return jnp.sum(tripled(w["v"], jnp.tanh(x @ w["w"])))

    found = optclip.diagnosis.tap(loss_fn, W, X)
    site, inside = found.sites
    h = np.tanh(X @ W["w"].astype(np.float64))
    signal = 3 * np.ones((3, 4)) @ W["v"].T.astype(np.float64)
    np.testing.assert_allclose(inside.signal_in, norm(signal), **CLOSE)
    np.testing.assert_allclose(inside.signal_out, norm(np.ones((3, 4))), **CLOSE)
    np.testing.assert_allclose(site.signal_out, norm(signal * (1 - h**2)), **CLOSE)
    assert not found.not_seen
    assert "Seen 2 of 2 uses" in str(found)


def test_while_loop_is_reported_as_unmeasurable():
    def loss_fn(w, x):
        frozen = jax.lax.stop_gradient((w["v"], x))
        y = jax.lax.while_loop(
            lambda c: c[1].sum() < -1e9, lambda c: (c[0], c[1] @ c[0]), frozen
        )[1]
        return jnp.sum((y @ w["w"]) ** 2)

    found = optclip.diagnosis.tap(loss_fn, W, X)
    assert [s.leaf for s in found.sites] == ["w"]
    assert "while" in found.not_seen[0]


PROGRAMS = {
    **SAME,
    "stacked": stacked,
    "custom_vjp": lambda w, x: tripled(w["w"], x @ w["v"]),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_loss_and_gradients_match_the_plain_program(name):
    def loss_fn(w, x):
        return jnp.mean(PROGRAMS[name](w, x) ** 2)

    seen = tapped(loss_fn, W, X)

    def probed(w):
        return seen.run(w, (X,), no_probes(seen.plan))[0]

    loss, grads = jax.jit(jax.value_and_grad(probed))(W)
    wanted = jax.jit(jax.value_and_grad(loss_fn))(W, X)
    chex.assert_trees_all_close((loss, grads), wanted, rtol=1e-6, atol=1e-7)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6)(x)
        x = nn.LayerNorm()(nn.gelu(x))
        return nn.Dense(2)(x)


def test_linen_and_nnx():
    model = Linen()
    variables = model.init(jax.random.key(0), X)
    found = optclip.diagnosis.tap(
        lambda p, x: jnp.sum(model.apply(p, x) ** 2), variables, X
    )
    leaves = [s.leaf for s in found.sites if s.kind == "matmul"]
    assert leaves == ["params/Dense_0/kernel", "params/Dense_1/kernel"]
    net = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    found = optclip.diagnosis.tap(lambda net, x: jnp.sum(net(x) ** 2), net, X)
    assert [s.leaf for s in found.sites] == ["kernel"]


@pytest.mark.parametrize("name", ["relu", "gelu", "silu", "tanh", "softplus", "elu"])
def test_activations_are_named(name):
    function = getattr(jax.nn, name)
    found = optclip.diagnosis.tap(
        lambda w, x: jnp.sum(function(x @ w["w"]) @ w["v"]), W, X
    )
    assert found.sites[1].activation in (
        name,
        "logaddexp" if name == "softplus" else "",
    )


def test_signal_whose_square_overflows_is_measured_accurately():
    def loss_fn(w, x):
        return 1e25 * jnp.sum(x @ w)

    (site,) = optclip.diagnosis.tap(loss_fn, W["w"], X).sites
    np.testing.assert_allclose(site.signal_out, 1e25 * np.sqrt(12), **CLOSE)


def test_errors():
    with pytest.raises(ValueError, match="must return a real scalar, got float32 of"):
        optclip.diagnosis.tap(lambda w, x: x @ w, W["w"], X)
    with pytest.raises(ValueError, match="give `has_aux=True`"):
        optclip.diagnosis.tap(lambda w, x: (jnp.sum(x @ w), x), W["w"], X)
    with pytest.raises(ValueError, match="must return \\(loss, aux\\)"):
        optclip.diagnosis.tap(lambda w, x: jnp.sum(x @ w), W["w"], X, has_aux=True)
    found = optclip.diagnosis.tap(
        lambda w, x: (jnp.sum(x @ w), x), W["w"], X, has_aux=True
    )
    assert len(found.sites) == 1


def test_unsupported_jax_version_is_reported(monkeypatch):
    def plan_program(*_):
        raise AttributeError("no `eqns`")

    monkeypatch.setattr(taps_module, "plan_program", plan_program)
    with pytest.raises(NotImplementedError, match="can't read the programs of JAX"):
        optclip.diagnosis.tap(lambda w, x: jnp.sum(x @ w), W["w"], X)
