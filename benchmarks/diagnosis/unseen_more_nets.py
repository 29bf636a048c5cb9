"""More networks of the unseen split: sets, sequences, tables, and very deep ones."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.diagnosis.plain import apply_dense, dense, normed
from benchmarks.diagnosis.recurrent import _gates, _gru, rotation
from benchmarks.diagnosis.unseen_nets import ACTS


def deep_sets(key, *, width=32, act="relu", gain=1.0, norm=False, residual=False):
    """Three layers for each element, their mean, and three layers for the set."""
    keys = jax.random.split(key, 7)
    sizes = [3, width, width, width, width, width]
    params = {
        f"{'member' if i < 3 else 'set'}_{i}": dense(
            keys[i], sizes[i], width, gain * np.sqrt(2)
        )
        for i in range(len(sizes))
    }
    params["head"] = dense(keys[6], width, 2, 1.0)

    def forward(params, x):
        for name in ("member_0", "member_1", "member_2", "set_3", "set_4", "set_5"):
            x = x.mean(1) if name == "set_3" else x
            y = apply_dense(params[name], x)
            y = ACTS[act](normed(y) if norm else y)
            x = x + y if residual and name != "member_0" else y
        return apply_dense(params["head"], x)

    return params, forward


class _Highway(eqx.Module):
    first: eqx.nn.Linear
    inner: list
    gates: list
    head: eqx.nn.Linear

    def __call__(self, x):
        x = self.first(x)
        for inner, gate in zip(self.inner, self.gates, strict=True):
            share = jax.nn.sigmoid(gate(x) - 1)
            x = share * jax.nn.relu(inner(x)) + (1 - share) * x
        return self.head(x)


def highway(key, *, inputs=12, width=24, depth=5, outputs=1):
    """Highway layers in Equinox: a gate mixes the new value and the old one."""
    keys = jax.random.split(key, 2 * depth + 2)
    model = _Highway(
        eqx.nn.Linear(inputs, width, key=keys[0]),
        [eqx.nn.Linear(width, width, key=k) for k in keys[1 : depth + 1]],
        [eqx.nn.Linear(width, width, key=k) for k in keys[depth + 1 : -1]],
        eqx.nn.Linear(width, outputs, key=keys[-1]),
    )
    return _eqx(model)


def _eqx(model):
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return params, lambda params, x: jax.vmap(eqx.combine(params, static))(x)


class _Irnn(eqx.Module):
    recur: jax.Array
    read: eqx.nn.Linear
    norm: bool = eqx.field(static=True)

    def __call__(self, x, h):
        h = self.recur @ h + self.read(x)
        return jax.nn.relu(normed(h) if self.norm else h)


class _Both(eqx.Module):
    ahead: eqx.Module
    back: eqx.Module
    head: eqx.nn.Linear
    width: int = eqx.field(static=True)

    def __call__(self, x):
        h = jnp.zeros(self.width)
        _, one = jax.lax.scan(lambda h, x: (self.ahead(x, h),) * 2, h, x)
        _, two = jax.lax.scan(lambda h, x: (self.back(x, h),) * 2, h, x, reverse=True)
        return jax.vmap(self.head)(jnp.concatenate([one, two], -1))


def two_ways(key, *, width=20, channels=3, cell="gru", growth=1.0, norm=False):
    """A bidirectional recurrence in Equinox: a GRU, or relu from the identity."""
    keys = jax.random.split(key, 3)

    def make(key):
        if cell == "gru":
            return eqx.nn.GRUCell(channels, width, key=key)
        return _Irnn(
            growth * jnp.eye(width), eqx.nn.Linear(channels, width, key=key), norm
        )

    head = eqx.nn.Linear(2 * width, 1, key=keys[2])
    return _eqx(_Both(make(keys[0]), make(keys[1]), head, width))


def world_model(key, *, width=24, cell="linear", growth=1.0, norm=False):
    """Rolls out from an initial state: each step is linear, or a GRU."""
    keys = jax.random.split(key, 4)
    params = {
        "first": dense(keys[0], 6, width, 1.0),
        "push": dense(keys[1], 2, width, 1.0),
        "recur": _gates(keys[2], width)
        if cell == "gru"
        else {"kernel": rotation(keys[2], width, growth), "bias": jnp.zeros(width)},
        "head": dense(keys[3], width, 6, 1.0),
    }

    def forward(params, x):
        def step(h, push):
            push = apply_dense(params["push"], push)
            if cell == "gru":
                h = _gru(params["recur"], h, push)
            else:
                h = apply_dense(params["recur"], h) + push
                h = normed(h) if norm else h
            return h, apply_dense(params["head"], h)

        h = apply_dense(params["first"], x[0])
        _, states = jax.lax.scan(step, h, x[1].swapaxes(0, 1))
        return states.swapaxes(0, 1)

    return params, forward


def automaton(key, *, channels=12, updates=40, cell="leaky", growth=1.0, norm=False):
    """A cellular automaton on a ring, which applies the same rule repeatedly."""
    keys = jax.random.split(key, 4)
    params = {
        "rule": dense(keys[0], 3 * channels, channels, 1.0),
        "gate": dense(keys[1], 3 * channels, channels, 1.0),
        "first": dense(keys[2], 1, channels, 1.0),
        "head": dense(keys[3], channels, 1, 1.0),
    }
    if cell != "gru":
        # Initially a cell keeps its value, and takes a little from its neighbors.
        del params["gate"]
        keep = jnp.pad(jnp.eye(channels), ((channels, channels), (0, 0)))
        params["rule"]["kernel"] = growth * keep + 0.1 * params["rule"]["kernel"]

    def update(params, x):
        around = jnp.concatenate([jnp.roll(x, 1, 1), x, jnp.roll(x, -1, 1)], -1)
        y = apply_dense(params["rule"], around)
        if cell == "gru":
            keep = jax.nn.sigmoid(apply_dense(params["gate"], around) + 1)
            return keep * x + (1 - keep) * jnp.tanh(y)
        return ACTS[cell](normed(y) if norm else y)

    def forward(params, x):
        x = apply_dense(params["first"], x)
        x, _ = jax.lax.scan(lambda x, _: (update(params, x), None), x, length=updates)
        return apply_dense(params["head"], x)

    return params, forward


def layer_norm_lstm(key, *, width=20, outputs=6):
    """An LSTM whose gates are normalized; time is the second axis."""
    keys = jax.random.split(key, 3)
    params = {
        "read": dense(keys[0], 1, 4 * width, 1.0),
        "recur": dense(keys[1], width, 4 * width, 1.0),
        "scale": jnp.ones(4 * width),
        "head": dense(keys[2], width, outputs, 1.0),
    }

    def forward(params, x):
        def step(state, x):
            h, c = state
            gates = apply_dense(params["recur"], h) + apply_dense(params["read"], x)
            i, f, o, g = jnp.split(normed(gates) * params["scale"], 4, -1)
            c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            return (jax.nn.sigmoid(o) * jnp.tanh(normed(c)), c), None

        none = jnp.zeros((len(x), width))
        (h, _), _ = jax.lax.scan(step, (none, none), x.swapaxes(0, 1))
        return apply_dense(params["head"], h)

    return params, forward


class _WideDeep(nnx.Module):
    def __init__(self, width, rngs):
        self.tables = nnx.List(nnx.Embed(25, 6, rngs=rngs) for _ in range(3))
        self.wide = nnx.List(nnx.Embed(25, 1, rngs=rngs) for _ in range(3))
        self.first = nnx.Linear(22, width, rngs=rngs)
        self.second = nnx.Linear(width, width, rngs=rngs)
        self.head = nnx.Linear(width, 1, rngs=rngs)

    def __call__(self, x):
        ids, about = x
        drawn = [table(ids[:, i]) for i, table in enumerate(self.tables)]
        y = jax.nn.relu(self.first(jnp.concatenate([*drawn, about], -1)))
        y = self.head(jax.nn.relu(self.second(y)))
        return (y + sum(w(ids[:, i]) for i, w in enumerate(self.wide)))[:, 0]


def wide_deep(key, *, width=24):
    """Embedding tables, summed in a wide part and passed to a deep one, in NNX."""
    graph, params = nnx.split(_WideDeep(width, nnx.Rngs(key)), nnx.Param)
    return params, lambda params, x: nnx.merge(graph, params)(x)


def ensemble(key, *, members=5, inputs=12, width=16, outputs=1):
    """Five small networks under one `jax.vmap`, and the mean of their outputs."""

    def make(key):
        one, two, three = jax.random.split(key, 3)
        return {
            "first": dense(one, inputs, width, np.sqrt(2)),
            "second": dense(two, width, width, np.sqrt(2)),
            "head": dense(three, width, outputs, 1.0),
        }

    def single(p, x):
        x = jax.nn.silu(apply_dense(p["first"], x))
        return apply_dense(p["head"], jax.nn.silu(apply_dense(p["second"], x)))

    def forward(params, x):
        return jax.vmap(single, (0, None))(params, x).mean(0)

    return jax.vmap(make)(jax.random.split(key, members)), forward


def maxout(key, *, inputs=20, width=24, depth=48, outputs=8, gain=1.0, norm=False,
           residual=False):  # fmt: skip
    """Scanned and checkpointed maxout layers, which take the larger of two sums."""
    keys = jax.random.split(key, depth + 2)
    params = {
        "first": dense(keys[0], inputs, width, 1.0),
        "layers": jax.vmap(lambda k: dense(k, width, 2 * width, gain))(keys[2:]),
        "head": dense(keys[1], width, outputs, 1.0),
    }

    @jax.checkpoint
    def layer(x, p):
        y = apply_dense(p, normed(x) if norm else x)
        y = jnp.maximum(*jnp.split(y, 2, -1))
        return (x + y if residual else y), None

    def forward(params, x):
        x, _ = jax.lax.scan(layer, apply_dense(params["first"], x), params["layers"])
        return apply_dense(params["head"], normed(x) if norm else x)

    return params, forward
