"""Low-rank adapters of a fixed random network; half of their gradients start at 0."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.training.task import Task

SIZES = ((32, 32), (32, 16))  # inputs and outputs of the two layers
RANK = 4
NOISE = 0.3  # standard deviation of the observations; that of the targets is about 0.9
RNG = np.random.default_rng(0)


def random_kernel(fan_in, fan_out):
    return np.float32(RNG.standard_normal((fan_in, fan_out)) / np.sqrt(fan_in))


FIXED = [random_kernel(*size) for size in SIZES]
# The product of two such kernels has about the size of the fixed one.
CHANGED = [
    kernel + random_kernel(size[0], RANK) @ random_kernel(RANK, size[1])
    for kernel, size in zip(FIXED, SIZES, strict=True)
]
TEST = RNG.standard_normal((500, SIZES[0][0])).astype(np.float32)


def network(first, last, x):
    return jnp.tanh(x @ first) @ last


def adapted(params, x):
    kernels = [k + p["a"] @ p["b"] for k, p in zip(FIXED, params, strict=True)]
    return network(*kernels, x)


def init(key):
    keys = jax.random.split(key, len(SIZES))
    return [
        {
            "a": jax.random.normal(k, (fan_in, RANK)) / np.sqrt(fan_in),
            "b": jnp.zeros((RANK, fan_out)),
        }
        for k, (fan_in, fan_out) in zip(keys, SIZES, strict=True)
    ]


def batch(key, step):
    inputs, noise = jax.random.split(key)
    x = jax.random.normal(inputs, (16, SIZES[0][0]))
    y = network(*CHANGED, x)
    return x, y + NOISE * jax.random.normal(noise, y.shape)


def loss(params, batch):
    return jnp.mean((adapted(params, batch[0]) - batch[1]) ** 2)


def clean(params):
    return loss(params, (TEST, network(*CHANGED, TEST)))


TASK = Task(
    name="lora",
    split="held_out",
    trouble="zero adapters",
    optimizer="adamw",
    rates=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    steps=600,
    init=init,
    batch=batch,
    loss=loss,
    clean=clean,
    # That of the fixed network, with which training starts.
    chance=float(np.mean((network(*FIXED, TEST) - network(*CHANGED, TEST)) ** 2)),
)
