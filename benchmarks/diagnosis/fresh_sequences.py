"""Networks for sequences, graphs and dynamics of the split "fresh".

Each takes a key and knobs, and returns parameters and ``forward(params, x)``.
"""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.diagnosis.fresh_nets import from_haiku, from_linen
from benchmarks.diagnosis.plain import normed


def draw(key, n_in, n_out, gain=1.0):
    return gain * jax.random.normal(key, (n_in, n_out)) / np.sqrt(n_in)


def lstm(key, *, width=24, symbols=5, forget=1.0, detach=False):
    """An LSTM in one fused matrix; ``forget`` is the bias of the forget gates.

    If ``detach`` is true, no gradient flows from a step to the one before.
    """
    keys = jax.random.split(key, 3)
    params = {
        "read": jax.random.normal(keys[0], (symbols, 4 * width)),
        "w": draw(keys[1], width, 4 * width),
        "b": jnp.repeat(jnp.array([0.0, forget, 0.0, 0.0]), width),
        "out": draw(keys[2], width, symbols),
    }

    def forward(params, x):
        def step(state, one):
            h, c = lax.stop_gradient(state) if detach else state
            z = params["read"][one] + h @ params["w"] + params["b"]
            i, f, o, g = jnp.split(z, 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), None

        zero = jnp.zeros((len(x), width))
        (h, _), _ = lax.scan(step, (zero, zero), x.T)
        return h @ params["out"]

    return params, forward


class _Forecast(nn.Module):
    width: int = 20

    @nn.compact
    def __call__(self, x):
        x = nn.RNN(nn.GRUCell(self.width))(x)[:, -1]
        return nn.Dense(1)(nn.tanh(nn.Dense(self.width)(x)))


def forecast(key):
    """A GRU that predicts the next value."""
    return from_linen(_Forecast(), key, jnp.zeros((2, 24, 2)))


def independent(key, *, width=24, channels=2, low=0.6, high=0.95):
    """IndRNN: each unit has a single recurrent weight, between ``low`` and ``high``."""
    keys = jax.random.split(key, 3)
    params = {
        "w": draw(keys[0], channels, width),
        "u": jax.random.uniform(keys[1], (width,), minval=low, maxval=high),
        "b": jnp.zeros(width),
        "head": draw(keys[2], width, 1),
    }

    def forward(params, x):
        inputs = x @ params["w"] + params["b"]

        def step(t, h):
            return jax.nn.relu(inputs[:, t] + params["u"] * h)

        h = lax.fori_loop(0, x.shape[1], step, jnp.zeros((len(x), width)))
        return h @ params["head"]

    return params, forward


class _LRU(nn.Module):
    low: float
    high: float
    width: int = 16

    @nn.compact
    def __call__(self, x):
        def radii(key, shape):
            return jax.random.uniform(key, shape, minval=self.low, maxval=self.high)

        def turns(key, shape):
            return jax.random.uniform(key, shape, maxval=np.pi)

        radius = self.param("radius", radii, (self.width,))
        turn = self.param("turn", turns, (self.width,))
        u = nn.Dense(2 * self.width)(x)
        real, imaginary = jnp.split(u, 2, -1)
        a = jnp.broadcast_to(jnp.exp(1j * turn) * radius, real.shape)

        def join(one, two):
            return one[0] * two[0], two[0] * one[1] + two[1]

        _, h = lax.associative_scan(join, (a, real + 1j * imaginary), axis=1)
        y = nn.Dense(self.width)(jnp.concatenate([h.real, h.imag], -1))
        return nn.gelu(y)


class _StackedLRU(nn.Module):
    low: float
    high: float

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16)(x)
        for _ in range(2):
            x = x + _LRU(self.low, self.high)(nn.LayerNorm()(x))
        return nn.Dense(1)(x[:, -1])


def lru(key, *, low=0.5, high=0.95, length=24):
    """Two linear recurrent units with complex eigenvalues of these absolute values."""
    return from_linen(_StackedLRU(low, high), key, jnp.zeros((2, length, 2)))


def listener(key, *, depth=3, norm=True):
    """Dilated convolutions over the frames of a recording, for CTC."""

    def body(x):
        x = hk.Linear(24)(x)
        for i in range(depth):
            y = hk.LayerNorm(-1, True, True)(x) if norm else x
            x = x + jax.nn.silu(hk.Conv1D(24, 3, rate=2 ** (i % 3))(y))
        return hk.Linear(6)(x)

    return from_haiku(body, key, jnp.zeros((2, 20, 8)))


def ear(key, *, pool="mean", epsilon=0.0):
    """Convolutions over a sound; ``pool`` is "mean", or "both" with the deviation."""

    def body(x):
        x = jax.nn.gelu(hk.Conv1D(8, 9, 4)(x))
        x = jax.nn.gelu(hk.Conv1D(12, 5, 2)(x))
        mean = x.mean(1)
        if pool == "both":
            # A channel without any sound has a variance of zero.
            mean = jnp.concatenate([mean, jnp.sqrt(x.var(1) + epsilon)], -1)
        return hk.Linear(4)(mean)

    return from_haiku(body, key, jnp.zeros((2, 96, 1)))


class _Field(eqx.Module):
    first: eqx.nn.Linear
    last: eqx.nn.Linear
    act: str = eqx.field(static=True)

    def __call__(self, x):
        y = getattr(jax.nn, self.act)(jax.vmap(self.first)(x))
        return jax.vmap(self.last)(y)


def neural_ode(key, *, act="tanh", time=0.1, gain=0.5, steps=24):
    """A vector field, and the path along it by the method of Runge and Kutta."""
    one, two = jax.random.split(key)
    field = _Field(eqx.nn.Linear(2, 32, key=one), eqx.nn.Linear(32, 2, key=two), act)
    field = eqx.tree_at(lambda f: f.last.weight, field, replace_fn=lambda w: gain * w)
    params, static = eqx.partition(field, eqx.is_inexact_array)

    def forward(params, x):
        f = eqx.combine(params, static)

        def step(x, _):
            a = f(x)
            b = f(x + time / 2 * a)
            c = f(x + time / 2 * b)
            d = f(x + time * c)
            x = x + time / 6 * (a + 2 * b + 2 * c + d)
            return x, x

        return lax.scan(step, x, None, length=steps)[1]

    return params, forward


def pole(key, *, steps=20, drift=-0.1):
    """A controller and the cart it steers; ``drift`` is the growth rate of its motion.

    Returns the mean square of the cart's states and forces over the steps.
    """
    keys = jax.random.split(key, 2)
    params = {"w1": draw(keys[0], 4, 16), "w2": draw(keys[1], 16, 1, 0.1)}
    rotate = np.array([[0, 1, 0, 0], [-1, 0, 0.5, 0], [0, 0, 0, 1], [0.5, 0, -1, 0]])
    change = jnp.eye(4) + 0.1 * (jnp.array(rotate) + 10 * drift * jnp.eye(4))
    push = jnp.array([0.0, 0.1, 0.0, -0.2])

    def forward(params, x):
        cost = 0.0
        for _ in range(steps):
            force = jnp.tanh(x @ params["w1"]) @ params["w2"]
            x = x @ change + force * push
            cost = cost + jnp.square(x).sum(-1) + 0.01 * jnp.square(force).sum(-1)
        return cost / steps

    return params, forward


def gcn(key, *, width=16, depth=3, norm="degree", residual=True, layer_norm=True,
        gain=1.0):  # fmt: skip
    """Graph convolutions; ``norm`` is None if neighbors are added, not averaged."""
    keys = jax.random.split(key, depth + 2)
    params = {
        "in": draw(keys[0], 6, width),
        "mix": [draw(k, width, width, gain * np.sqrt(2)) for k in keys[1:-1]],
        "out": draw(keys[-1], width, 3),
    }

    def forward(params, inputs):
        x, links = inputs
        if norm == "degree":
            degree = links.sum(1)
            links = links / jnp.sqrt(degree[:, None] * degree)
        x = x @ params["in"]
        for w in params["mix"]:
            y = jax.nn.relu(links @ (normed(x) if layer_norm else x) @ w)
            x = x + y if residual else y
        return (normed(x) if layer_norm else x) @ params["out"]

    return params, forward


def equilibrium(key, *, width=16, rounds=30, gain=0.5):
    """Repeats one graph convolution, in the hope of a fixed point."""
    keys = jax.random.split(key, 3)
    params = {
        "in": draw(keys[0], 6, width),
        "w": gain * jax.nn.initializers.orthogonal()(keys[1], (width, width)),
        "out": draw(keys[2], width, 3),
    }

    def forward(params, inputs):
        x, links = inputs
        links = links / links.sum(1, keepdims=True)
        x = x @ params["in"]

        def again(_, z):
            return jax.nn.leaky_relu(0.5 * (z + links @ z) @ params["w"] + x, 0.3)

        z = lax.fori_loop(0, rounds, again, jnp.zeros_like(x))
        return z @ params["out"]

    return params, forward
