"""A ConvNet without normalization on digits; its gradient norm rises as it learns."""

import numpy as np

from benchmarks.training.data import convnet, convnet_init, digits, digits_batch, nll
from benchmarks.training.task import Task

_, _, TEST_IMAGES, TEST_LABELS = digits()

init = convnet_init


def batch(key, step):
    return digits_batch(key, 16)


def loss(params, batch):
    return nll(convnet(params, batch[0]), batch[1])


def clean(params):
    return nll(convnet(params, TEST_IMAGES), TEST_LABELS)


TASK = Task(
    name="convnet_no_norm",
    split="tune",
    trouble="rising gradient norm",
    optimizer="momentum",
    rates=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    steps=600,
    init=init,
    batch=batch,
    loss=loss,
    clean=clean,
    chance=float(np.log(10)),
)
