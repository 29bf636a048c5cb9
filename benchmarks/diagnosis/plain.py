"""Networks in plain JAX: each takes a key and knobs; returns parameters and forward.

All networks support these knobs where they apply: ``gain`` multiplies the default
weights, ``act`` names the activation, ``norm`` normalizes each layer, ``residual`` adds
a layer's input to its output, ``dtype`` is the dtype of the computation.
"""

import jax
import jax.numpy as jnp
import numpy as np

ACTS = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "linear": lambda x: x,
    "square": lambda x: x**2,
    "cube": lambda x: x**3,
    "exp": jnp.exp,
    "leaky": lambda x: jax.nn.leaky_relu(x, 0.2),
    "steep": lambda x: jnp.where(x > 0, x, 2.0 * x),
    "softplus2": lambda x: jax.nn.softplus(x) ** 2,
    "sinh": jnp.sinh,
}


def typical(act):
    """Returns the standard deviation of weights (He or Xavier) times sqrt(fan_in)."""
    return 1.0 if act in ("tanh", "sigmoid", "linear") else np.sqrt(2)


def dense(key, n_in, n_out, gain):
    kernel = gain * jax.random.normal(key, (n_in, n_out)) / np.sqrt(n_in)
    return {"kernel": kernel, "bias": jnp.zeros(n_out)}


def apply_dense(p, x):
    return x @ p["kernel"].astype(x.dtype) + p["bias"].astype(x.dtype)


def normed(x):
    """Layer normalization without parameters."""
    centered = x - x.mean(-1, keepdims=True)
    return centered * jax.lax.rsqrt(jnp.square(centered).mean(-1, keepdims=True) + 1e-5)


def mlp(key, *, inputs=64, width=32, depth=8, outputs=10, act="relu", gain=1.0,
        norm=False, residual=False, dtype="float32", init=None):  # fmt: skip
    """``init`` names the activation that the weights are meant for, if it differs."""
    keys = jax.random.split(key, depth + 1)
    scale = gain * typical(init or act)
    sizes = [inputs] + [width] * depth
    params = {
        f"layer_{i:02d}": dense(keys[i], sizes[i], width, scale) for i in range(depth)
    }
    params["head"] = dense(keys[depth], width, outputs, gain)

    def forward(params, x):
        x = x.reshape(len(x), -1).astype(dtype)
        for i in range(depth):
            y = apply_dense(params[f"layer_{i:02d}"], x)
            y = ACTS[act](normed(y) if norm else y)
            x = x + y if residual and i else y
        return apply_dense(params["head"], normed(x) if residual and norm else x)

    return params, forward


def stacked(key, *, inputs=64, width=32, depth=40, outputs=10, act="relu", gain=1.0,
            norm=False, residual=False):  # fmt: skip
    """An MLP whose layers are stacked in one array and run by `jax.lax.scan`."""
    first, middle, last = jax.random.split(key, 3)
    scale = gain * typical(act)
    kernels = jax.random.normal(middle, (depth, width, width)) * scale / np.sqrt(width)
    params = {
        "first": dense(first, inputs, width, typical(act)),
        "layers": {"kernel": kernels, "bias": jnp.zeros((depth, width))},
        "last": dense(last, width, outputs, 1.0),
    }

    def layer(x, p):
        y = apply_dense(p, x)
        y = ACTS[act](normed(y) if norm else y)
        return (x + y if residual else y), None

    def forward(params, x):
        x = ACTS[act](apply_dense(params["first"], x.reshape(len(x), -1)))
        x, _ = jax.lax.scan(layer, x, params["layers"])
        return apply_dense(params["last"], normed(x) if residual else x)

    return params, forward


def _conv(p, x):
    y = jax.lax.conv_general_dilated(
        x, p["kernel"].astype(x.dtype), (1, 1), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"))  # fmt: skip
    return y + p["bias"].astype(x.dtype)


def cnn(key, *, channels=6, depth=6, act="relu", gain=1.0, norm=False, residual=False):
    keys = jax.random.split(key, depth + 1)
    sizes = [1] + [channels] * depth
    params = {}
    for i in range(depth):
        p = dense(keys[i], 9 * sizes[i], channels, gain * typical(act))
        p["kernel"] = p["kernel"].reshape(3, 3, sizes[i], channels)
        params[f"conv_{i:02d}"] = p
    params["head"] = dense(keys[depth], channels * 64, 10, gain)

    def forward(params, x):
        for i in range(depth):
            y = _conv(params[f"conv_{i:02d}"], x)
            y = ACTS[act](normed(y) if norm else y)
            x = x + y if residual and i else y
        return apply_dense(params["head"], x.reshape(len(x), -1))

    return params, forward


def embedding(key, *, people=40, things=30, width=8):
    """Users and items in two embedding tables, looked up and multiplied."""
    one, two = jax.random.split(key)
    params = {
        "people": 0.5 * jax.random.normal(one, (people, width)),
        "things": 0.5 * jax.random.normal(two, (things, width)),
    }

    def forward(params, x):
        return (params["people"][x[:, 0]] * params["things"][x[:, 1]]).sum(-1)

    return params, forward


def linear(key, *, inputs=16, outputs=1):
    """One layer, initialized to zero."""
    del key
    params = {"kernel": jnp.zeros((inputs, outputs)), "bias": jnp.zeros(outputs)}
    return params, lambda params, x: apply_dense(params, x)
