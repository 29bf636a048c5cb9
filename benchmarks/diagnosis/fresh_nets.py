"""Networks for images, text and sets of the split "fresh".

Each takes a key and knobs, and returns parameters and ``forward(params, x)``.
"""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.diagnosis.plain import normed


def from_linen(net, key, *x):
    variables = net.init(key, *x)
    rest = {k: v for k, v in variables.items() if k != "params"}

    def forward(params, *x):
        out = net.apply({"params": params, **rest}, *x, mutable=list(rest))
        return out[0]

    return variables["params"], forward


def from_haiku(body, key, *x):
    net = hk.without_apply_rng(hk.transform(body))
    return net.init(key, *x), net.apply


def from_nnx(model):
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    return params, lambda params, *x: nnx.merge(graph, params, rest)(*x)


def from_equinox(model):
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return params, lambda params, *x: jax.vmap(eqx.combine(params, static))(*x)


class _ViT(nn.Module):
    width: int
    depth: int
    order: str
    dtype: str
    outputs: int = 6

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (3, 3), strides=3, padding="VALID")(x)
        x = x.reshape(len(x), -1, self.width).astype(self.dtype)
        draw = nn.initializers.normal(0.2)
        x = x + self.param("places", draw, x.shape[1:]).astype(self.dtype)
        for _ in range(self.depth):
            x = self.step(nn.MultiHeadDotProductAttention(2, dtype=self.dtype), x)
            x = self.step(_FeedForward(self.width, self.dtype), x)
        return nn.Dense(self.outputs)(x.mean(1))

    def step(self, layer, x):
        if self.order == "post":
            return nn.LayerNorm(dtype=self.dtype)(x + layer(x))
        return x + layer(nn.LayerNorm(dtype=self.dtype)(x))


class _FeedForward(nn.Module):
    width: int
    dtype: str

    @nn.compact
    def __call__(self, x):
        y = nn.gelu(nn.Dense(2 * self.width, dtype=self.dtype)(x))
        return nn.Dense(self.width, dtype=self.dtype)(y)


def vit(key, *, width=16, depth=2, order="pre", dtype="float32"):
    net = _ViT(width, depth, order, dtype)
    return from_linen(net, key, jnp.zeros((2, 12, 12, 1)))


class _UNet(nn.Module):
    spread: float
    dtype: str

    @nn.compact
    def __call__(self, x):
        x = x.astype(self.dtype)
        high = self.block(x, 4)
        low = self.block(nn.avg_pool(high, (2, 2), (2, 2)), 8)
        deep = self.block(nn.avg_pool(low, (2, 2), (2, 2)), 8)
        low = self.block(jnp.concatenate([low, self.grow(deep)], -1), 8)
        high = self.block(jnp.concatenate([high, self.grow(low)], -1), 4)
        return nn.Conv(2, (1, 1))(high.astype("float32"))

    def block(self, x, channels):
        draw = nn.initializers.variance_scaling(self.spread, "fan_in", "normal")
        for _ in range(2):
            layer = nn.Conv(channels, (3, 3), kernel_init=draw, dtype=self.dtype)
            x = nn.relu(layer(x))
        return x

    def grow(self, x):
        return x.repeat(2, 1).repeat(2, 2)


def unet(key, *, spread=2.0, dtype="float32"):
    """``spread`` is the variance of the weights times their fan-in."""
    return from_linen(_UNet(spread, dtype), key, jnp.zeros((2, 12, 12, 1)))


class _ResNet(nnx.Module):
    def __init__(self, blocks, norm, rngs):
        init = nnx.initializers.he_normal()
        self.stem = nnx.Conv(1, 6, (3, 3), strides=2, kernel_init=init, rngs=rngs)
        self.convs = nnx.List(
            nnx.Conv(6, 6, (3, 3), kernel_init=init, rngs=rngs)
            for _ in range(2 * blocks)
        )
        count = 2 * blocks if norm else 0
        self.norms = nnx.List(nnx.GroupNorm(6, 2, rngs=rngs) for _ in range(count))
        self.head = nnx.Linear(6, 6, rngs=rngs)
        self.blocks = blocks

    def conv(self, i, x):
        y = self.convs[i](x)
        return self.norms[i](y) if len(self.norms) else y

    def __call__(self, x):
        x = nnx.relu(self.stem(x))
        for i in range(self.blocks):
            y = nnx.relu(self.conv(2 * i, x))
            x = nnx.relu(x + self.conv(2 * i + 1, y))
        return self.head(x.mean((1, 2)))


def resnet(key, *, blocks=3, norm=True):
    return from_nnx(_ResNet(blocks, norm, nnx.Rngs(key)))


def crypto_net(key, *, act="relu", depth=4):
    """A network for encrypted images, which can be squared but not compared."""
    apply = {"relu": jax.nn.relu, "square": jnp.square}[act]

    def body(x):
        for i in range(depth):
            stride = 2 if i == 0 else 1
            x = apply(
                hk.Conv2D(8, 3, stride, w_init=hk.initializers.VarianceScaling(2))(x)
            )
        return hk.Linear(6)(x.reshape(len(x), -1))

    return from_haiku(body, key, jnp.zeros((2, 12, 12, 1)))


class _AutoEncoder(eqx.Module):
    down: list
    up: list
    middle: list

    def __init__(self, latent, key):
        keys = jax.random.split(key, 6)
        self.down = [
            eqx.nn.Conv2d(1, 6, 3, 2, 1, key=keys[0]),
            eqx.nn.Conv2d(6, 8, 3, 2, 1, key=keys[1]),
        ]
        self.middle = [
            eqx.nn.Linear(72, latent, key=keys[2]),
            eqx.nn.Linear(latent, 72, key=keys[3]),
        ]
        self.up = [
            eqx.nn.ConvTranspose2d(8, 6, 4, 2, padding=1, key=keys[4]),
            eqx.nn.ConvTranspose2d(6, 1, 4, 2, padding=1, key=keys[5]),
        ]

    def __call__(self, x):
        x = x.transpose(2, 0, 1)
        for conv in self.down:
            x = jax.nn.elu(conv(x))
        x = jax.nn.elu(self.middle[1](self.middle[0](x.reshape(-1)))).reshape(8, 3, 3)
        return self.up[1](jax.nn.elu(self.up[0](x))).transpose(1, 2, 0)


def autoencoder(key, *, latent=16):
    return from_equinox(_AutoEncoder(latent, key))


class _Block(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    norms: list
    act: str = eqx.field(static=True)

    def __init__(self, width, act, key):
        keys = jax.random.split(key, 3)
        self.attention = eqx.nn.MultiheadAttention(2, width, key=keys[0])
        self.up = eqx.nn.Linear(width, 2 * width, key=keys[1])
        self.down = eqx.nn.Linear(2 * width, width, key=keys[2])
        self.norms = [eqx.nn.RMSNorm(width), eqx.nn.RMSNorm(width)]
        self.act = act

    def __call__(self, x, mask):
        y = jax.vmap(self.norms[0])(x)
        x = x + self.attention(y, y, y, mask=mask)
        y = jax.vmap(self.up)(jax.vmap(self.norms[1])(x))
        return x + jax.vmap(self.down)(getattr(jax.nn, self.act)(y))


class _Writer(eqx.Module):
    words: jax.Array
    places: jax.Array
    blocks: list

    def __call__(self, text, causal):
        x = self.words[text] + self.places
        mask = jnp.ones((len(text), len(text)), bool)
        for block in self.blocks:
            x = block(x, jnp.tril(mask) if causal else mask)
        return normed(x) @ self.words.T


def writer(key, *, width=24, depth=2, words=12, spread=0.2, causal=True, act="gelu"):
    """A language model whose output layer is the table of its words."""
    one, two, *keys = jax.random.split(key, depth + 2)
    model = _Writer(
        spread * jax.random.normal(one, (words, width)),
        0.2 * jax.random.normal(two, (16, width)),
        [_Block(width, act, k) for k in keys],
    )
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def forward(params, texts):
        model = eqx.combine(params, static)
        return jax.vmap(lambda text: model(text, causal))(texts)

    return params, forward


class _Crowd(eqx.Module):
    each: eqx.nn.MLP
    all: eqx.nn.MLP
    pool: str = eqx.field(static=True)

    def __call__(self, x):
        x = jax.vmap(self.each)(x)
        return self.all(x.sum(0) if self.pool == "sum" else x.mean(0))


def crowd(key, *, pool="mean"):
    """A Deep Set: the features of all points are averaged, or added up."""
    one, two = jax.random.split(key)
    each = eqx.nn.MLP(3, 16, 24, 2, key=one)
    return from_equinox(_Crowd(each, eqx.nn.MLP(16, 4, 24, 1, key=two), pool))
