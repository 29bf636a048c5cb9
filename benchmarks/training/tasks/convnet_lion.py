"""A ConvNet on digits; 2% of the batches have random labels."""

import numpy as np

from benchmarks.training.data import convnet, convnet_init, digits, digits_batch, nll
from benchmarks.training.task import Task

_, _, TEST_IMAGES, TEST_LABELS = digits()

init = convnet_init


def batch(key, step):
    return digits_batch(key, 16, bad=0.02)


def loss(params, batch):
    return nll(convnet(params, batch[0]), batch[1])


def clean(params):
    return nll(convnet(params, TEST_IMAGES), TEST_LABELS)


TASK = Task(
    name="convnet_lion",
    split="held_out",
    trouble="batches with random labels",
    optimizer="lion",
    rates=(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
    steps=600,
    init=init,
    batch=batch,
    loss=loss,
    clean=clean,
    chance=float(np.log(10)),
)
