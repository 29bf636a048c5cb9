"""A ConvNet with batch normalization on digits; nothing goes wrong."""

import jax.numpy as jnp
import numpy as np

from benchmarks.training.data import convnet, convnet_init, digits, digits_batch, nll
from benchmarks.training.task import Task

_, _, TEST_IMAGES, TEST_LABELS = digits()


def init(key):
    scales = {
        name: {"scale": jnp.ones(size), "bias": jnp.zeros(size)}
        for name, size in (("first", 8), ("second", 16))
    }
    return {"layers": convnet_init(key), "norms": scales}


def logits(params, images):
    def normalize(name, x):
        mean = jnp.mean(x, axis=(0, 1, 2))
        variance = jnp.var(x, axis=(0, 1, 2))
        norm = params["norms"][name]
        # 1e-5 is the epsilon of PyTorch.
        return (x - mean) / jnp.sqrt(variance + 1e-5) * norm["scale"] + norm["bias"]

    return convnet(params["layers"], images, normalize)


def batch(key, step):
    return digits_batch(key, 16)


def loss(params, batch):
    return nll(logits(params, batch[0]), batch[1])


def clean(params):
    # The test images are one batch, and normalized by their own statistics.
    return nll(logits(params, TEST_IMAGES), TEST_LABELS)


TASK = Task(
    name="convnet_batch_norm",
    split="held_out",
    trouble="noise of batch statistics",
    optimizer="adam",
    rates=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    steps=600,
    init=init,
    batch=batch,
    loss=loss,
    clean=clean,
    chance=float(np.log(10)),
)
