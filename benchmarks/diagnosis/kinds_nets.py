"""Networks of the split "tune_kinds"; the knobs are those of `plain`."""

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.diagnosis.kinds_tasks import NODES
from benchmarks.diagnosis.plain import ACTS as KNOWN
from benchmarks.diagnosis.plain import apply_dense, dense, mlp, normed

# A root of both signs (the value rescaling of R2D2), as it should be written, and with
# an untaken branch: its slope is NaN beyond 1, and `jnp.where` multiplies it by zero.
ACTS = {
    **KNOWN,
    "root": lambda x: jnp.sign(x) * (jnp.sqrt(1 + jnp.abs(x)) - 1),
    "root_where": lambda x: jnp.where(x > 0, jnp.sqrt(1 + x) - 1, 1 - jnp.sqrt(1 - x)),
}


class _CNN(nn.Module):
    outputs: int
    pool: bool

    @nn.compact
    def __call__(self, x):
        for channels in (4, 6, 6):
            x = nn.relu(nn.Conv(channels, (3, 3))(x))
        return nn.Dense(self.outputs)(x.reshape(len(x), -1) if self.pool else x)


def linen_cnn(key, *, outputs=6, colors=3, pool=True):
    """Three convolutions; ``pool`` is false if each pixel has a class."""
    net = _CNN(outputs, pool)
    params = net.init(key, jnp.zeros((2, 8, 8, colors)))["params"]
    return params, lambda params, x: net.apply({"params": params}, x)


class _NnxCNN(nnx.Module):
    def __init__(self, act, norm, rngs):
        init = nnx.initializers.he_normal()
        self.layers = nnx.List(
            nnx.Conv(n, 6, (3, 3), kernel_init=init, rngs=rngs) for n in (3, 6, 6, 6, 6)
        )
        self.head = nnx.Linear(6 * 64, 6, rngs=rngs)
        self.act, self.norm = act, norm

    def __call__(self, x):
        for layer in self.layers:
            y = layer(x)
            x = ACTS[self.act](normed(y) if self.norm else y)
        return self.head(x.reshape(len(x), -1))


def nnx_cnn(key, *, act="relu", norm=False):
    graph, params = nnx.split(_NnxCNN(act, norm, nnx.Rngs(key)), nnx.Param)
    return params, lambda params, x: nnx.merge(graph, params)(x)


def lora(key, *, inputs=20, width=32, outputs=8, alpha=8.0, rank=4):
    """Low-rank changes of a frozen network; ``alpha`` / ``rank`` multiplies them."""
    base, low = jax.random.split(key)
    frozen, _ = mlp(base, inputs=inputs, width=width, depth=3, outputs=outputs)
    keys = jax.random.split(low, len(frozen))
    params = {}
    for k, (name, layer) in zip(keys, frozen.items(), strict=True):
        n_in, n_out = layer["kernel"].shape
        params[name] = {
            "a": jax.random.normal(k, (n_in, rank)) / np.sqrt(n_in),
            "b": jnp.zeros((rank, n_out)),
        }

    def forward(params, x):
        for name, layer in frozen.items():
            change = (x @ params[name]["a"]) @ params[name]["b"]
            x = apply_dense(layer, x) + alpha / rank * change
            x = x if name == "head" else jax.nn.relu(x)
        return x

    return params, forward


def residual(key, *, inputs=20, width=24, depth=40, outputs=8, norm=True, gain=1.0):
    """Residual blocks of two layers each, scanned; He's weights in both layers."""
    keys = jax.random.split(key, 4)

    def many(key):
        made = jax.vmap(lambda k: dense(k, width, width, gain * np.sqrt(2)))
        return made(jax.random.split(key, depth))

    params = {
        "first": dense(keys[0], inputs, width, 1.0),
        "blocks": {"up": many(keys[1]), "down": many(keys[2])},
        "head": dense(keys[3], width, outputs, 1.0),
    }

    def block(x, p):
        y = jax.nn.relu(apply_dense(p["up"], normed(x) if norm else x))
        return x + apply_dense(p["down"], y), None

    def forward(params, x):
        x = apply_dense(params["first"], x)
        x, _ = jax.lax.scan(block, x, params["blocks"])
        return apply_dense(params["head"], normed(x) if norm else x)

    return params, forward


def state_space(key, *, width=24, channels=4, low=0.8, high=0.98):
    """A linear recurrence with one factor per unit, by an associative scan."""
    keys = jax.random.split(key, 3)
    params = {
        "read": dense(keys[0], channels, width, 0.5),
        "factors": jax.random.uniform(keys[1], (width,), minval=low, maxval=high),
        "head": dense(keys[2], width, 1, 0.5),
    }

    def combine(one, two):
        return one[0] * two[0], two[0] * one[1] + two[1]

    def forward(params, x):
        inputs = apply_dense(params["read"], x)
        factors = jnp.broadcast_to(params["factors"], inputs.shape)
        _, h = jax.lax.associative_scan(combine, (factors, inputs), axis=1)
        return apply_dense(params["head"], h[:, -1])

    return params, forward


def messages(key, *, width=16, rounds=4, mean=True, norm=False, gain=1.0):
    """Rounds of messages along the edges, which each node adds up or averages."""
    keys = jax.random.split(key, rounds + 2)
    params = {
        "first": dense(keys[0], 4, width, 1.0),
        "rounds": [dense(k, width, width, gain * np.sqrt(2)) for k in keys[1:-1]],
        "head": dense(keys[-1], width, 2, 1.0),
    }

    def forward(params, x, links):
        source, goal = links[:, 0], links[:, 1]
        count = jax.ops.segment_sum(jnp.ones(len(links)), goal, NODES)[:, None]
        x = apply_dense(params["first"], x)
        for p in params["rounds"]:
            y = jax.ops.segment_sum(apply_dense(p, x)[source], goal, NODES)
            y = y / jnp.maximum(count, 1) if mean else y
            x = jax.nn.relu(x + (normed(y) if norm else y))
        return apply_dense(params["head"], x)

    return params, forward


def fourier(key, *, width=32, waves=16, frequency=0.3):
    """Sines and cosines of random, trained frequencies, and an MLP on them."""
    keys = jax.random.split(key, 3)
    params = {
        "frequencies": frequency * jax.random.normal(keys[0], (1, waves)),
        "layer_0": dense(keys[1], 2 * waves, width, 1.0),
        "head": dense(keys[2], width, 1, 1.0),
    }

    def forward(params, x):
        turn = 2 * np.pi * x @ params["frequencies"]
        x = jnp.concatenate([jnp.sin(turn), jnp.cos(turn)], -1)
        return apply_dense(params["head"], jnp.tanh(apply_dense(params["layer_0"], x)))

    return params, forward


def counter(key, *, width=16, dtype="float32"):
    """Adds up a value per step, in ``dtype``, and reads the sum with an MLP."""
    keys = jax.random.split(key, 2)
    params = {
        "value": jnp.ones(width),
        "layer_0": dense(keys[0], width, width, 1.0),
        "head": dense(keys[1], width, 1, 1.0),
    }

    def forward(params, x):
        value = params["value"].astype(dtype)

        def add(total, one):
            return total + one[:, None] * value, None

        total = jnp.zeros((len(x), width), dtype)
        total, _ = jax.lax.scan(add, total, x.T.astype(dtype))
        # The sum of 800 steps is about 500, with a deviation of about 100.
        y = (total.astype("float32") - 500) / 100
        return apply_dense(params["head"], jnp.tanh(apply_dense(params["layer_0"], y)))

    return params, forward


def haiku_root(key, *, inputs=12, act="root"):
    """An MLP with a root of both signs."""

    def body(x):
        for _ in range(3):
            x = ACTS[act](hk.Linear(32)(x))
        return hk.Linear(1)(x)

    net = hk.without_apply_rng(hk.transform(body))
    return net.init(key, jnp.zeros((2, inputs))), net.apply


def frozen_features(key, *, inputs=20, width=48, outputs=8):
    """A trained linear head on the features of a frozen layer."""
    one, two = jax.random.split(key)
    frozen = dense(one, inputs, width, np.sqrt(2))
    params = {"head": dense(two, width, outputs, 1.0)}

    def forward(params, x):
        return apply_dense(params["head"], jax.nn.relu(apply_dense(frozen, x)))

    return params, forward


def cast(net, dtype="float32", **knobs):
    """Returns a network whose parameters are stored in ``dtype``."""

    def made(key, dtype=dtype, **more):
        params, forward = net(key, **knobs, **more)
        params = jax.tree.map(lambda x: x.astype(dtype), params)

        def cast_forward(params, x):
            x = x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else x
            return forward(params, x)

        return params, cast_forward

    return made
