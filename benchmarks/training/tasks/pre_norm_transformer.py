"""A pre-norm transformer on characters; it is trained without a warm-up."""

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


def init(key):
    return transformer_init(key, CONTEXT)


def batch(key, step):
    return text_windows(key, 4, CONTEXT)


def loss(params, windows):
    logits = transformer(params, windows[:, :-1])
    return nll(logits, windows[:, 1:])


def clean(params):
    return loss(params, text_windows(jax.random.key(0), 100, CONTEXT, test=True))


TASK = Task(
    name="pre_norm_transformer",
    split="tune",
    trouble="no warm-up",
    optimizer="adamw",
    rates=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
    steps=300,
    init=init,
    batch=batch,
    loss=loss,
    clean=clean,
    chance=float(np.log(CHARACTERS + 1)),
)
