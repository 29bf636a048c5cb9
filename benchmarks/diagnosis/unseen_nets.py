"""Networks of the unseen split; the knobs are those of `plain`."""

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.diagnosis.plain import ACTS as KNOWN
from benchmarks.diagnosis.plain import apply_dense, dense, normed, typical
from benchmarks.diagnosis.unseen_tasks import web

ACTS = {
    **KNOWN,
    "silu": jax.nn.silu,
    "expm1": jnp.expm1,
    "poly": lambda x: x + x**2,
}


def rms(x):
    """Divides by the root mean square, in the dtype of ``x``."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5).astype(x.dtype)


def glu_transformer(key, *, width=24, depth=3, vocabulary=20, length=20, gain=1.0,
                    weights="float32"):  # fmt: skip
    """A causal model with gated layers, scanned and checkpointed."""
    keys = jax.random.split(key, depth + 2)

    def make(key):
        ks = jax.random.split(key, 5)
        return {
            "mix": dense(ks[0], width, 3 * width, gain),
            "out": dense(ks[1], width, width, gain),
            "gate": dense(ks[2], width, 2 * width, gain),
            "up": dense(ks[3], width, 2 * width, gain),
            "down": dense(ks[4], 2 * width, width, gain),
        }

    params = {
        "embed": gain * 0.5 * jax.random.normal(keys[0], (vocabulary, width)),
        "blocks": jax.vmap(make)(keys[2:]),
        "head": dense(keys[1], width, vocabulary, gain),
    }
    params = jax.tree.map(lambda x: x.astype(weights), params)
    steps = jnp.arange(length)[:, None] / 10 ** jnp.linspace(0, 2, width // 2)
    place = jnp.concatenate([jnp.sin(steps), jnp.cos(steps)], -1).astype(weights)
    seen = jnp.tril(jnp.ones((length, length), bool))

    def block(x, p):
        query, key, value = jnp.split(apply_dense(p["mix"], rms(x)), 3, -1)
        scores = query @ key.swapaxes(-1, -2) / np.sqrt(width).astype(x.dtype)
        scores = jnp.where(seen, scores, -1e4)
        x = x + apply_dense(p["out"], jax.nn.softmax(scores) @ value)
        y = rms(x)
        y = jax.nn.silu(apply_dense(p["gate"], y)) * apply_dense(p["up"], y)
        return x + apply_dense(p["down"], y), None

    def forward(params, words):
        x = params["embed"][words] + place
        x, _ = jax.lax.scan(jax.checkpoint(block), x, params["blocks"])
        return apply_dense(params["head"], rms(x))

    return params, forward


class _ViT(nn.Module):
    depth: int
    gain: float
    norm: bool
    width: int = 24

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.variance_scaling(self.gain**2, "fan_in", "normal")
        x = nn.Conv(self.width, (4, 4), (4, 4), name="patches")(x)
        x = x.reshape(len(x), -1, self.width)
        x = x + self.param("place", nn.initializers.normal(0.1), x.shape[1:])
        for _ in range(self.depth):
            y = nn.LayerNorm()(x) if self.norm else x
            x = x + nn.MultiHeadDotProductAttention(2, kernel_init=init)(y)
            y = nn.LayerNorm()(x) if self.norm else x
            y = nn.gelu(nn.Dense(2 * self.width, kernel_init=init)(y))
            x = x + nn.Dense(self.width, kernel_init=init)(y)
        return nn.Dense(6)((nn.LayerNorm()(x) if self.norm else x).mean(1))


def vit(key, *, depth=3, gain=1.0, norm=True, residual=True):
    """A vision transformer on patches of 4 by 4, in Linen."""
    del residual
    net = _ViT(depth, float(gain), norm)
    return net.init(key, jnp.zeros((2, 12, 12, 3))), net.apply


class _UNet(nn.Module):
    gain: float
    act: str
    norm: bool

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.variance_scaling(2.0 * self.gain**2, "fan_in", "normal")

        def conv(x, channels, name):
            y = nn.Conv(channels, (3, 3), kernel_init=init, name=name)(x)
            return ACTS[self.act](normed(y) if self.norm else y)

        one = conv(x, 8, "down_1")
        two = conv(nn.avg_pool(one, (2, 2), (2, 2)), 12, "down_2")
        low = conv(nn.avg_pool(two, (2, 2), (2, 2)), 16, "bottom_1")
        low = conv(low, 16, "bottom_2")
        up = conv(jnp.concatenate([_larger(low), two], -1), 12, "up_2")
        up = conv(jnp.concatenate([_larger(up), one], -1), 8, "up_1")
        return nn.Conv(1, (1, 1), name="head")(up)[..., 0]


def _larger(x):
    return x.repeat(2, 1).repeat(2, 2)


def unet(key, *, gain=1.0, act="relu", norm=False, residual=False):
    """A U-Net that halves the resolution twice, in Linen."""
    del residual
    net = _UNet(float(gain), act, norm)
    return net.init(key, jnp.zeros((2, 16, 16, 1))), net.apply


def tcn(key, *, channels=12, depth=6, outputs=6, act="relu", gain=1.0, norm=False,
        residual=False, dtype="float32"):  # fmt: skip
    """Causal, dilated convolutions over time, in Haiku."""
    scale = float(gain * typical(act))

    def body(x):
        x = x.astype(dtype)
        draw = hk.initializers.VarianceScaling(scale**2, "fan_in", "normal")
        for i in range(depth):
            y = hk.Conv1D(channels, 3, rate=2 ** (i % 3), padding=hk.pad.causal,
                          w_init=draw)(x)  # fmt: skip
            y = ACTS[act](rms(y) if norm else y)
            x = x + y if residual and i else y
        return hk.Linear(outputs)(x.mean(1))

    net = hk.without_apply_rng(hk.transform(body))
    return net.init(key, jnp.zeros((2, 48, 1))), net.apply


def vae(key, *, width=32, gain=1.0):
    """A variational autoencoder of curves in Haiku; the noise is part of the batch."""

    def body(batch):
        x, noise = batch
        draw = hk.initializers.VarianceScaling(float(gain) ** 2, "fan_in", "normal")
        code = hk.nets.MLP((width, width, 8), w_init=draw, activation=jax.nn.silu)(x)
        mean, log_var = jnp.split(code, 2, -1)
        drawn = mean + jnp.exp(0.5 * log_var) * noise
        back = hk.nets.MLP((width, width, 36), w_init=draw, activation=jax.nn.silu)
        return back(drawn), mean, log_var

    net = hk.without_apply_rng(hk.transform(body))
    return net.init(key, (jnp.zeros((2, 36)), jnp.zeros((2, 4)))), net.apply


def experts(key, *, inputs=20, width=24, count=4, outputs=8):
    """Two of four experts per example, weighted by a softmax over the two."""
    keys = jax.random.split(key, 5)

    def many(key, n_in, n_out, gain):
        return jax.vmap(lambda k: dense(k, n_in, n_out, gain))(
            jax.random.split(key, count)
        )

    params = {
        "first": dense(keys[0], inputs, width, 1.0),
        "router": dense(keys[1], width, count, 1.0),
        "up": many(keys[2], width, 2 * width, np.sqrt(2)),
        "down": many(keys[3], 2 * width, width, 1.0),
        "head": dense(keys[4], width, outputs, 1.0),
    }

    def expert(up, down, x):
        return apply_dense(down, jax.nn.gelu(apply_dense(up, x)))

    def forward(params, x):
        x = apply_dense(params["first"], x)
        y = normed(x)
        best, which = jax.lax.top_k(apply_dense(params["router"], y), 2)
        share = (jax.nn.softmax(best)[..., None] * jax.nn.one_hot(which, count)).sum(1)
        each = jax.vmap(expert, (0, 0, None))(params["up"], params["down"], y)
        x = x + jnp.einsum("be,ebw->bw", share, each)
        return apply_dense(params["head"], normed(x))

    return params, forward


class _GraphNet(nnx.Module):
    def __init__(self, width, depth, deviation, norm, residual, rngs):
        init = nnx.initializers.normal(deviation or np.sqrt(2 / width))
        self.first = nnx.Linear(4, width, rngs=rngs)
        self.rounds = nnx.List(
            nnx.Linear(width, width, kernel_init=init, rngs=rngs) for _ in range(depth)
        )
        self.head = nnx.Linear(width, 3, rngs=rngs)
        self.norm, self.residual = norm, residual

    def __call__(self, x):
        links = jnp.array(web(), jnp.float32)
        x = self.first(x)
        for layer in self.rounds:
            y = layer(links @ x)
            y = jax.nn.elu(normed(y) if self.norm else y)
            x = x + y if self.residual else y
        return self.head(x)


def graph_net(key, *, width=24, depth=4, deviation=None, norm=False, residual=False):
    """Message passing along the edges of a fixed graph, in NNX."""
    model = _GraphNet(width, depth, deviation, norm, residual, nnx.Rngs(key))
    graph, params = nnx.split(model, nnx.Param)
    return params, lambda params, x: nnx.merge(graph, params)(x)
