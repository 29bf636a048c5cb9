"""A GPT-2 in plain JAX, whose training step the benchmarks measure."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class Size(NamedTuple):
    """The size of a model and of its batch."""

    batch: int
    context: int
    width: int
    layers: int
    heads: int
    vocabulary: int


# XLA chooses the algorithm of each matrix product by timing it, so two programs could
# use different ones. Without this search, all rows of a table use the same.
FIXED = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
SMALL = Size(8, 1024, 768, 12, 12, 50257)  # GPT-2 small: 124M parameters


def initial(size):
    """Returns the parameters of a GPT-2."""
    width = size.width
    rng = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(rng.standard_normal(s, np.float32) * 0.02)  # noqa: E731
    ones, zeros = (lambda *s: jnp.ones(s)), (lambda *s: jnp.zeros(s))

    def layer():
        return {
            "norm_1": {"scale": ones(width), "bias": zeros(width)},
            "qkv": {"kernel": draw(width, 3 * width), "bias": zeros(3 * width)},
            "out": {"kernel": draw(width, width), "bias": zeros(width)},
            "norm_2": {"scale": ones(width), "bias": zeros(width)},
            "up": {"kernel": draw(width, 4 * width), "bias": zeros(4 * width)},
            "down": {"kernel": draw(4 * width, width), "bias": zeros(width)},
        }

    return {
        "embedding": draw(size.vocabulary, width),
        "positions": draw(size.context, width),
        "layers": [layer() for _ in range(size.layers)],
        "norm": {"scale": ones(width), "bias": zeros(width)},
    }


def normalized(x, parts):
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-5)
    return (wide * parts["scale"] + parts["bias"]).astype(x.dtype)


def dense(x, parts):
    return x @ parts["kernel"].astype(x.dtype) + parts["bias"].astype(x.dtype)


def attention(x, parts, heads):
    qkv = dense(x, parts["qkv"]).reshape(*x.shape[:2], 3, heads, -1)
    q, k, v = (qkv[:, :, i] for i in range(3))
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return dense(out.reshape(x.shape), parts["out"])


def loss_of(params, tokens, heads):
    """Returns the mean cross-entropy of the next token; arithmetic is in bfloat16."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    x = params["embedding"][inputs] + params["positions"][: inputs.shape[1]]
    x = x.astype(jnp.bfloat16)
    for parts in params["layers"]:
        x = x + attention(normalized(x, parts["norm_1"]), parts, heads)
        wide = dense(normalized(x, parts["norm_2"]), parts["up"])
        x = x + dense(jax.nn.gelu(wide), parts["down"])
    x = normalized(x, params["norm"])
    logits = (x @ params["embedding"].astype(x.dtype).T).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.mean(losses)
