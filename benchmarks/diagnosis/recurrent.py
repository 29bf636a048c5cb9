"""Recurrent networks: plain JAX, scanned or unrolled, Haiku and Linen.

``growth`` multiplies a rotation, so that a linear recurrence grows by it each step.
"""

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.diagnosis.plain import ACTS, apply_dense, dense, normed


def rotation(key, width, growth=1.0):
    return growth * jax.nn.initializers.orthogonal()(key, (width, width))


def _gates(key, width):
    names = ("update", "reset", "candidate")
    keys = jax.random.split(key, 3)
    return {
        n: dense(k, 2 * width, width, 1.0) for n, k in zip(names, keys, strict=True)
    }


def _gru(p, h, x):
    both = jnp.concatenate([h, x], -1)
    update = jax.nn.sigmoid(apply_dense(p["update"], both))
    reset = jax.nn.sigmoid(apply_dense(p["reset"], both))
    new = jnp.concatenate([reset * h, x], -1)
    return update * h + (1 - update) * jnp.tanh(apply_dense(p["candidate"], new))


def elman(key, *, width=32, channels=4, cell="tanh", growth=1.0, unroll=False,
          norm=False, gain=1.0):  # fmt: skip
    """The plain recurrence h = act(h W + x U); ``cell`` names act, or is "gru"."""
    keys = jax.random.split(key, 3)
    params = {
        "read": dense(keys[0], channels, width, gain),
        "recur": _gates(keys[1], width)
        if cell == "gru"
        else {"kernel": rotation(keys[1], width, growth), "bias": jnp.zeros(width)},
        "head": dense(keys[2], width, 1, gain),
    }

    def step(params, h, x):
        if cell == "gru":
            return _gru(params["recur"], h, x)
        h = apply_dense(params["recur"], h) + x
        return ACTS[cell](normed(h) if norm else h)

    def forward(params, x):
        h = jnp.zeros((len(x), width))
        inputs = apply_dense(params["read"], x).swapaxes(0, 1)
        # The remedies are scanned: unrolled, they take minutes to compile.
        if unroll and not (norm or cell == "gru"):
            for one in inputs:
                h = step(params, h, one)
        else:
            h, _ = jax.lax.scan(lambda h, x: (step(params, h, x), None), h, inputs)
        return apply_dense(params["head"], h)

    return params, forward


def diagonal(key, *, width=32, channels=4, growth=1.0, cell="", norm=False):
    """A state-space model: each step multiplies each unit by a separate factor."""
    if cell == "gru":
        return elman(key, width=width, channels=channels, cell="gru")
    keys = jax.random.split(key, 3)
    params = {
        "read": dense(keys[0], channels, width, 1.0),
        "decay": growth * jax.random.uniform(keys[1], (width,), minval=0.9, maxval=1.0),
        "head": dense(keys[2], width, 1, 1.0),
    }

    def step(params, h, x):
        h = h * params["decay"] + x
        return normed(h) if norm else h

    def forward(params, x):
        inputs = apply_dense(params["read"], x).swapaxes(0, 1)
        h = jnp.zeros((len(x), width))
        h, _ = jax.lax.scan(lambda h, x: (step(params, h, x), None), h, inputs)
        return apply_dense(params["head"], h)

    return params, forward


def haiku_rnn(key, *, width=32, cell="vanilla", growth=1.0, length=100, norm=False):
    """Haiku's cells; time is the first axis. The vanilla cell uses relu."""
    del norm

    def body(x):
        if cell == "vanilla":
            core = hk.VanillaRNN(width)
        else:
            core = hk.LSTM(width) if cell == "lstm" else hk.GRU(width)
        out, _ = hk.dynamic_unroll(core, x, core.initial_state(x.shape[1]))
        return hk.Linear(1)(out[-1])

    net = hk.without_apply_rng(hk.transform(body))
    params = net.init(key, jnp.zeros((length, 2, 4)))
    if cell == "vanilla":
        weights = params["vanilla_rnn/linear_1"]["w"]
        # He initialization keeps the scale of a relu layer; `growth` is applied on top.
        he = np.sqrt(2 / width) * jax.random.normal(key, weights.shape)
        params["vanilla_rnn/linear_1"]["w"] = growth * he
    return params, net.apply


class _Linen(nn.Module):
    cell: str
    growth: float
    width: int = 32

    @nn.compact
    def __call__(self, x):
        if self.cell == "simple":
            scale = nn.initializers.orthogonal(self.growth)
            cell = nn.SimpleCell(self.width, recurrent_kernel_init=scale)
        else:
            made = {"gru": nn.GRUCell, "lstm": nn.OptimizedLSTMCell}
            cell = made[self.cell](self.width)
        return nn.Dense(1)(nn.RNN(cell)(x)[:, -1])


def linen_rnn(key, *, cell="simple", growth=1.0, norm=False, length=100):
    del norm
    net = _Linen(cell, growth)
    params = net.init(key, jnp.zeros((2, length, 4)))["params"]
    return params, lambda params, x: net.apply({"params": params}, x)
