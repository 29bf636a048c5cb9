"""Networks in Linen, NNX, Equinox and Haiku; the knobs are those of `plain`."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.diagnosis.plain import ACTS, normed, typical


def _init(gain, act):
    return nn.initializers.variance_scaling(
        float(gain * typical(act)) ** 2, "fan_in", "normal"
    )


class _LinenMLP(nn.Module):
    width: int
    depth: int
    outputs: int
    act: str
    gain: float
    norm: str
    residual: bool
    dtype: str

    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1).astype(self.dtype)
        init = _init(self.gain, self.act)
        for i in range(self.depth):
            y = nn.Dense(self.width, kernel_init=init, dtype=self.dtype)(x)
            if self.norm == "batch":
                y = nn.BatchNorm(use_running_average=False)(y)
            elif self.norm:
                y = nn.LayerNorm()(y)
            y = ACTS[self.act](y)
            x = x + y if self.residual and i else y
        return nn.Dense(self.outputs, dtype=self.dtype)(x)


def linen_mlp(key, *, inputs=64, width=32, depth=8, outputs=10, act="relu", gain=1.0,
              norm=False, residual=False, dtype="float32"):  # fmt: skip
    net = _LinenMLP(width, depth, outputs, act, gain, norm, residual, dtype)
    return _linen(net, key, jnp.zeros((4, inputs)))


class _LinenCNN(nn.Module):
    channels: int
    depth: int
    act: str
    gain: float
    norm: str
    residual: bool

    @nn.compact
    def __call__(self, x):
        init = _init(self.gain, self.act)
        for i in range(self.depth):
            y = nn.Conv(self.channels, (3, 3), kernel_init=init)(x)
            if self.norm == "batch":
                y = nn.BatchNorm(use_running_average=False)(y)
            elif self.norm:
                y = nn.LayerNorm()(y)
            y = ACTS[self.act](y)
            x = x + y if self.residual and i else y
        return nn.Dense(10)(x.reshape(len(x), -1))


def linen_cnn(key, *, channels=6, depth=6, act="relu", gain=1.0, norm=False,
              residual=False):  # fmt: skip
    net = _LinenCNN(channels, depth, act, gain, norm, residual)
    return _linen(net, key, jnp.zeros((4, 8, 8, 1)))


def _linen(net, key, x):
    variables = net.init(key, x)
    rest = {k: v for k, v in variables.items() if k != "params"}

    def forward(params, x):
        kept = {"params": params, **rest}
        return net.apply(kept, x, mutable=list(rest))[0] if rest else net.apply(kept, x)

    return variables["params"], forward


class _NnxCNN(nnx.Module):
    def __init__(self, channels, depth, act, gain, norm, residual, rngs):
        init = nnx.initializers.variance_scaling(
            (gain * typical(act)) ** 2, "fan_in", "normal"
        )
        sizes = [1] + [channels] * depth
        self.layers = nnx.List(
            nnx.Conv(sizes[i], channels, (3, 3), kernel_init=init, rngs=rngs)
            for i in range(depth)
        )
        groups = [
            nnx.GroupNorm(channels, 3, rngs=rngs) for _ in range(depth if norm else 0)
        ]
        self.norms = nnx.List(groups)
        self.head = nnx.Linear(64 * channels, 10, rngs=rngs)
        self.act, self.residual = act, residual

    def __call__(self, x):
        for i, layer in enumerate(self.layers):
            y = layer(x)
            y = ACTS[self.act](self.norms[i](y) if len(self.norms) else y)
            x = x + y if self.residual and i else y
        return self.head(x.reshape(len(x), -1))


def nnx_cnn(key, *, channels=6, depth=6, act="relu", gain=1.0, norm=False,
            residual=False):  # fmt: skip
    model = _NnxCNN(channels, depth, act, gain, norm, residual, nnx.Rngs(key))
    return _nnx(model)


class _NnxMLP(nnx.Module):
    def __init__(self, inputs, width, depth, outputs, act, gain, norm, rngs):
        init = nnx.initializers.variance_scaling(
            (gain * typical(act)) ** 2, "fan_in", "normal"
        )
        sizes = [inputs] + [width] * depth
        self.layers = nnx.List(
            nnx.Linear(sizes[i], width, kernel_init=init, rngs=rngs)
            for i in range(depth)
        )
        self.head = nnx.Linear(width, outputs, rngs=rngs)
        self.act, self.norm = act, norm

    def __call__(self, x):
        x = x.reshape(len(x), -1)
        for layer in self.layers:
            x = layer(x)
            x = ACTS[self.act](normed(x) if self.norm else x)
        return self.head(x)


def nnx_mlp(key, *, inputs=64, width=32, depth=8, outputs=10, act="relu", gain=1.0,
            norm=False):  # fmt: skip
    rngs = nnx.Rngs(key)
    return _nnx(_NnxMLP(inputs, width, depth, outputs, act, gain, norm, rngs))


def _nnx(model):
    graph, params = nnx.split(model, nnx.Param)
    return params, lambda params, x: nnx.merge(graph, params)(x)


class _EqxMLP(eqx.Module):
    layers: list
    act: str = eqx.field(static=True)
    norm: bool = eqx.field(static=True)
    residual: bool = eqx.field(static=True)

    def __call__(self, x):
        x = x.reshape(-1)
        for i, layer in enumerate(self.layers[:-1]):
            y = layer(x)
            y = ACTS[self.act](normed(y) if self.norm else y)
            x = x + y if self.residual and i else y
        return self.layers[-1](x)


def eqx_mlp(key, *, inputs=64, width=32, depth=8, outputs=10, act="relu", gain=1.0,
            norm=False, residual=False, init=None):  # fmt: skip
    sizes = [inputs] + [width] * depth + [outputs]
    keys = jax.random.split(key, len(sizes))
    scale = gain * typical(init or act)
    layers = [
        _eqx_linear(keys[i], sizes[i], sizes[i + 1], scale if i < depth else 1.0)
        for i in range(depth + 1)
    ]
    model = _EqxMLP(layers, act, norm, residual)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return params, lambda params, x: jax.vmap(eqx.combine(params, static))(x)


def _eqx_linear(key, n_in, n_out, scale):
    made = eqx.nn.Linear(n_in, n_out, key=key)
    weight = scale * jax.random.normal(key, (n_out, n_in)) / np.sqrt(n_in)
    return eqx.tree_at(lambda m: (m.weight, m.bias), made, (weight, jnp.zeros(n_out)))


class _EqxGRU(eqx.Module):
    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear

    def __call__(self, x):
        first = jnp.zeros(self.cell.hidden_size)
        last, _ = jax.lax.scan(lambda h, x: (self.cell(x, h), None), first, x)
        return self.head(last)


def eqx_gru(key, *, width=32, channels=4):
    one, two = jax.random.split(key)
    model = _EqxGRU(
        eqx.nn.GRUCell(channels, width, key=one), eqx.nn.Linear(width, 1, key=two)
    )
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return params, lambda params, x: jax.vmap(eqx.combine(params, static))(x)


def haiku_mlp(key, *, sizes=(32, 32, 32, 32, 10), inputs=64, act="relu", gain=1.0,
              norm=False, residual=False, init=None):  # fmt: skip
    scale = float(gain * typical(init or act))

    def body(x):
        x = x.reshape(len(x), -1)
        draw = hk.initializers.VarianceScaling(scale**2, "fan_in", "normal")
        for i, size in enumerate(sizes[:-1]):
            y = hk.Linear(size, w_init=draw)(x)
            y = ACTS[act](normed(y) if norm else y)
            x = x + y if residual and i else y
        return hk.Linear(sizes[-1])(x)

    net = hk.without_apply_rng(hk.transform(body))
    return net.init(key, jnp.zeros((4, inputs))), net.apply


def haiku_cnn(key, *, channels=6, depth=6, gain=1.0, norm=False, residual=False,
              dtype="float32"):  # fmt: skip
    def body(x):
        x = x.astype(dtype)
        draw = hk.initializers.VarianceScaling(2.0 * gain**2, "fan_in", "normal")
        for i in range(depth):
            y = hk.Conv2D(channels, 3, w_init=draw)(x)
            y = jax.nn.relu(normed(y) if norm else y)
            x = x + y if residual and i else y
        return hk.Linear(10)(x.reshape(len(x), -1))

    net = hk.without_apply_rng(hk.transform(body))
    return net.init(key, jnp.zeros((4, 8, 8, 1))), net.apply
