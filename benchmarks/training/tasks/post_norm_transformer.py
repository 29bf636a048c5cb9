"""A post-norm transformer on characters; large initial weights, and no warm-up."""

import jax
import numpy as np

from benchmarks.training.data import (
    CHARACTERS,
    nll,
    text_windows,
    transformer,
    transformer_init,
)
from benchmarks.training.task import Task

CONTEXT = 24
GAIN = 2.0  # early training is fragile


def init(key):
    return transformer_init(key, CONTEXT, GAIN)


def batch(key, step):
    return text_windows(key, 4, CONTEXT)


def loss(params, windows):
    logits = transformer(params, windows[:, :-1], post_norm=True)
    return nll(logits, windows[:, 1:])


def clean(params):
    return loss(params, text_windows(jax.random.key(0), 100, CONTEXT, test=True))


TASK = Task(
    name="post_norm_transformer",
    split="held_out",
    trouble="large initial weights",
    optimizer="adamw",
    rates=(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
    steps=300,
    init=init,
    batch=batch,
    loss=loss,
    clean=clean,
    chance=float(np.log(CHARACTERS + 1)),
)
