"""A deep MLP on digits; its initial weights are too large, and so are its gradients."""

import jax
import numpy as np

from benchmarks.training.data import apply, dense, digits, digits_batch, nll
from benchmarks.training.task import Task

_, _, TEST_IMAGES, TEST_LABELS = digits()
SIZES = (64, *[32] * 8, 10)
# He's gain, for relu, times 1.6: each layer makes its input 1.6 times as large.
GAIN = 1.6 * np.sqrt(2)


def init(key):
    keys = jax.random.split(key, len(SIZES) - 1)
    pairs = zip(keys, SIZES[:-1], SIZES[1:], strict=True)
    return [dense(k, fan_in, fan_out, GAIN) for k, fan_in, fan_out in pairs]


def logits(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(apply(layer, x))
    return apply(params[-1], x)


def batch(key, step):
    return digits_batch(key, 16)


def loss(params, batch):
    return nll(logits(params, batch[0]), batch[1])


def clean(params):
    return nll(logits(params, TEST_IMAGES), TEST_LABELS)


TASK = Task(
    name="deep_mlp_large_init",
    split="tune",
    trouble="too large initial weights",
    optimizer="momentum",
    rates=(0.0006, 0.0025, 0.01, 0.04, 0.15, 0.6),
    steps=600,
    init=init,
    batch=batch,
    loss=loss,
    clean=clean,
    chance=float(np.log(10)),
)
