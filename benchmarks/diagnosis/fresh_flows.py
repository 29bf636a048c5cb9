"""Further networks of the split "fresh": flows, experts, towers and plain stacks.

Each takes a key and knobs, and returns parameters and ``forward(params, x)``.
"""

import itertools

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from benchmarks.diagnosis.fresh_nets import from_haiku, from_linen, from_nnx
from benchmarks.diagnosis.fresh_sequences import draw
from benchmarks.diagnosis.plain import normed


def real_nvp(key, *, layers=4, width=16, clamp=True, gain=1.0):
    """Affine couplings; returns the point before the flow and the log-determinant."""
    params = []
    for k in jax.random.split(key, layers):
        one, two = jax.random.split(k)
        params.append(
            {
                "w1": draw(one, 1, width),
                "b1": jnp.zeros(width),
                "w2": draw(two, width, 2, gain),
                "b2": jnp.zeros(2),
            }
        )

    def forward(params, x):
        total = 0.0
        for p in params:
            kept, moved = x[:, :1], x[:, 1:]
            out = jax.nn.relu(kept @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]
            scale = jnp.tanh(out[:, :1]) if clamp else out[:, :1]
            x = jnp.concatenate([moved * jnp.exp(scale) + out[:, 1:], kept], 1)
            total = total + scale[:, 0]
        return x, total

    return params, forward


def experts(key, *, count=4, width=24, inputs=9, outputs=1):
    """A mixture of experts, of which each example uses the best two."""
    keys = jax.random.split(key, 4)
    params = {
        "gate": 0.1 * draw(keys[0], inputs, count),
        "up": jax.vmap(lambda k: draw(k, inputs, width, np.sqrt(2)))(
            jax.random.split(keys[1], count)
        ),
        "down": jax.vmap(lambda k: draw(k, width, outputs))(
            jax.random.split(keys[2], count)
        ),
    }

    def forward(params, x):
        logits = x @ params["gate"]
        shares = jax.nn.softmax(logits)
        best, which = lax.top_k(shares, 2)
        used = jax.nn.one_hot(which, count)
        weights = (used * (best / best.sum(1, keepdims=True))[..., None]).sum(1)
        h = jax.nn.relu(jnp.einsum("bi,eiw->bew", x, params["up"]))
        y = jnp.einsum("bew,ewo,be->bo", h, params["down"], weights)
        # How unevenly the experts are used, and how large the logits are.
        uneven = count * (used.sum(1).mean(0) / 2) @ shares.mean(0)
        return y, uneven + jnp.square(jax.nn.logsumexp(logits, -1)).mean()

    return params, forward


class _Towers(nn.Module):
    temperature: float
    epsilon: float

    @nn.compact
    def __call__(self, image, words):
        image = nn.Dense(12)(nn.gelu(nn.Dense(32)(image)))
        text = nn.Embed(24, 16)(words).reshape(len(words), -1)
        text = nn.Dense(12)(nn.gelu(nn.Dense(32)(text)))
        start = nn.initializers.constant(np.log(self.temperature))
        scale = self.param("log_scale", start, ())
        return jnp.exp(scale) * self.unit(image) @ self.unit(text).T

    def unit(self, x):
        return x / jnp.sqrt(jnp.square(x).sum(-1, keepdims=True) + self.epsilon)


def towers(key, *, temperature=10.0, epsilon=1e-6):
    """Similarities of images and captions, multiplied by a trained factor."""
    net = _Towers(temperature, epsilon)
    return from_linen(net, key, jnp.zeros((2, 24)), jnp.zeros((2, 6), int))


def siren(key, *, outputs=1, inputs=2, width=32, frequency=3.0):
    """Sines of trained frequencies, in three layers."""
    keys = jax.random.split(key, 4)
    params = {
        "waves": frequency * jax.random.uniform(keys[0], (inputs, width), minval=-1),
        "shift": jax.random.uniform(keys[1], (width,), maxval=2 * np.pi),
        "middle": draw(keys[2], width, width, np.sqrt(2)),
        "out": draw(keys[3], width, outputs),
    }

    def forward(params, x):
        x = jnp.sin(x @ params["waves"] + params["shift"])
        return jnp.sin(x @ params["middle"]) @ params["out"]

    return params, forward


def bars_vae(key, *, gain=1.0):
    """Encodes and decodes images; ``x`` is the images and the latent noise."""

    def body(x, noise):
        weights = hk.initializers.VarianceScaling(gain**2)
        h = jax.nn.relu(hk.Linear(48, w_init=weights)(x))
        mean, log_var = jnp.split(hk.Linear(12, w_init=weights)(h), 2, -1)
        z = mean + jnp.exp(log_var / 2) * noise
        h = jax.nn.relu(hk.Linear(48, w_init=weights)(z))
        return hk.Linear(64)(h), mean, log_var

    return from_haiku(body, key, jnp.zeros((2, 64)), jnp.zeros((2, 6)))


class _Chebyshev(nnx.Module):
    """A layer of trained polynomials, one for each pair of input and output."""

    def __init__(self, n_in, n_out, degree, squash, rngs):
        shape = (n_in, n_out, degree + 1)
        std = 1 / (n_in * (degree + 1)) ** 0.5
        self.weights = nnx.Param(std * jax.random.normal(rngs.params(), shape))
        self.degree, self.squash = degree, squash

    def __call__(self, x):
        # On [-1, 1] the polynomials are bounded; beyond, they grow quickly.
        x = jnp.tanh(x) if self.squash else x
        terms = [jnp.ones_like(x), x]
        for _ in range(self.degree - 1):
            terms.append(2 * x * terms[-1] - terms[-2])
        return jnp.einsum("bid,iod->bo", jnp.stack(terms, -1), self.weights[...])


class _Kan(nnx.Module):
    def __init__(self, squash, degree, rngs):
        sizes = (9, 12, 12, 12, 1)
        self.layers = nnx.List(
            _Chebyshev(i, o, degree, squash, rngs) for i, o in itertools.pairwise(sizes)
        )

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def kan(key, *, squash=True, degree=2):
    return from_nnx(_Kan(squash, degree, nnx.Rngs(key)))


class _Gated(nn.Module):
    depth: int
    gate: str
    norm: bool
    outputs: int
    width: int = 24

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width)(x)
        for _ in range(self.depth):
            value, gate = jnp.split(nn.Dense(2 * self.width)(x), 2, -1)
            y = value * {"square": jnp.square, "sigmoid": nn.sigmoid}[self.gate](gate)
            x = nn.LayerNorm()(y) if self.norm else y
        return nn.Dense(self.outputs)(x)


def gated(key, *, depth=5, gate="sigmoid", norm=False, inputs=9, outputs=1):
    """Layers that multiply a value by a gate."""
    net = _Gated(depth, gate, norm, outputs)
    return from_linen(net, key, jnp.zeros((2, inputs)))


def maxout(key, *, depth=4, pieces=4, width=16, inputs=9, norm=False):
    """The largest of several linear functions per unit, with He's weights."""
    keys = jax.random.split(key, depth + 1)
    sizes = [inputs] + [width] * depth
    params = {
        "layers": [
            draw(keys[i], sizes[i], pieces * width, np.sqrt(2)) for i in range(depth)
        ],
        "out": draw(keys[-1], width, 1),
    }

    def forward(params, x):
        for w in params["layers"]:
            x = (x @ w).reshape(len(x), width, pieces).max(-1)
            x = normed(x) if norm else x
        return x @ params["out"]

    return params, forward


def head_net(key, *, inputs=10, outputs=1, width=32, weights=None, bias=0.0, depth=2,
             act="relu"):  # fmt: skip
    """A Haiku MLP; ``weights`` is its initializer, ``bias`` that of its layers."""

    def body(x):
        for _ in range(depth):
            x = hk.Linear(width, w_init=weights, b_init=hk.initializers.Constant(bias))(
                x
            )
            x = getattr(jax.nn, act)(x)
        return hk.Linear(outputs, w_init=weights)(x)

    return from_haiku(body, key, jnp.zeros((2, inputs)))


def topics(key, *, words=40, width=10, spread=0.3):
    """The two tables of word2vec."""
    one, two = jax.random.split(key)
    params = {
        "word": spread * jax.random.normal(one, (words, width)),
        "near": spread * jax.random.normal(two, (words, width)),
    }

    def forward(params, word, other):
        return jnp.sum(params["word"][word] * params["near"][other], -1)

    return params, forward
