"""Transformers and a mixer in plain JAX; the knobs are those of `plain`."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.diagnosis.plain import ACTS, apply_dense, dense, normed


def _scale(x, p):
    return normed(x) * p.astype(x.dtype)


def _attend(p, x, mask_value):
    query, key, value = jnp.split(apply_dense(p["mix"], x), 3, -1)
    scores = query @ key.swapaxes(-1, -2) / np.sqrt(x.shape[-1]).astype(x.dtype)
    seen = jnp.tril(jnp.ones(scores.shape[-2:], x.dtype))
    # A common implementation: in float16 the mask value becomes infinite, and 0 * inf
    # is NaN.
    scores = scores + (1 - seen) * jnp.array(mask_value, x.dtype)
    return apply_dense(p["out"], jax.nn.softmax(scores) @ value)


def _feed(p, x, act):
    return apply_dense(p["down"], ACTS[act](apply_dense(p["up"], x)))


def _block(key, width, gain):
    keys = jax.random.split(key, 4)
    return {
        "mix": dense(keys[0], width, 3 * width, gain),
        "out": dense(keys[1], width, width, gain),
        "up": dense(keys[2], width, 2 * width, gain),
        "down": dense(keys[3], 2 * width, width, gain),
        "scale_1": jnp.ones(width),
        "scale_2": jnp.ones(width),
    }


def transformer(key, *, width=32, depth=3, vocabulary=16, length=16, gain=1.0,
                order="pre", act="gelu", dtype="float32", mask_value=-1e4,
                norm=True, scanned=False):  # fmt: skip
    """A causal language model; ``order`` is the position of the normalization."""
    keys = jax.random.split(key, depth + 3)
    blocks = [_block(k, width, gain) for k in keys[:depth]]
    if scanned:
        blocks = jax.tree.map(lambda *x: jnp.stack(x), *blocks)
    params = {
        "embed": gain * 0.5 * jax.random.normal(keys[depth], (vocabulary, width)),
        "place": gain * 0.5 * jax.random.normal(keys[depth + 1], (length, width)),
        "blocks": blocks,
        "head": dense(keys[depth + 2], width, vocabulary, gain),
    }

    def block(x, p):
        if not norm:
            x = x + _attend(p, x, mask_value)
            return x + _feed(p, x, act), None
        if order == "post":
            x = _scale(x + _attend(p, x, mask_value), p["scale_1"])
            return _scale(x + _feed(p, x, act), p["scale_2"]), None
        x = x + _attend(p, _scale(x, p["scale_1"]), mask_value)
        return x + _feed(p, _scale(x, p["scale_2"]), act), None

    def forward(params, words):
        x = (params["embed"][words] + params["place"]).astype(dtype)
        if scanned:
            x, _ = jax.lax.scan(block, x, params["blocks"])
        else:
            for p in params["blocks"]:
                x, _ = block(x, p)
        return apply_dense(params["head"], normed(x) if norm else x)

    return params, forward


def mixer(key, *, width=16, depth=3, gain=1.0):
    """An MLP-Mixer over the rows of an image."""
    keys = jax.random.split(key, depth + 2)
    params = {
        "first": dense(keys[0], 8, width, gain),
        "blocks": [_mixer_block(k, width, gain) for k in keys[1:-1]],
        "head": dense(keys[-1], width, 10, gain),
    }

    def forward(params, x):
        x = apply_dense(params["first"], x[..., 0])
        for p in params["blocks"]:
            x = x + _feed(p["rows"], normed(x).swapaxes(1, 2), "gelu").swapaxes(1, 2)
            x = x + _feed(p["channels"], normed(x), "gelu")
        return apply_dense(params["head"], normed(x).mean(1))

    return params, forward


def _mixer_block(key, width, gain):
    keys = jax.random.split(key, 4)
    return {
        "rows": {
            "up": dense(keys[0], 8, 16, gain),
            "down": dense(keys[1], 16, 8, gain),
        },
        "channels": {
            "up": dense(keys[2], width, 32, gain),
            "down": dense(keys[3], 32, width, gain),
        },
    }
