"""Recipes that train: a network and its task; and a function to scale the weights."""

import functools

import jax
import optax

from benchmarks.diagnosis import attention, losses, tasks
from benchmarks.diagnosis.problem import Recipe
from optclip._engine.names import path_name


def scaled(factor, where=""):
    """Returns a function that multiplies the weights whose path contains ``where``."""

    def scale(path, x):
        chosen = x.ndim > 1 and where in path_name(path)
        return factor * x if chosen else x

    return functools.partial(jax.tree_util.tree_map_with_path, scale)


def classes(net, rate=0.02, optimizer=None, **knobs):
    return Recipe(net, tasks.images, optimizer or optax.sgd(rate), knobs=knobs)


def words(net=attention.transformer, optimizer=None, **knobs):
    optimizer = optimizer or optax.adam(3e-3)
    return Recipe(net, tasks.tokens, optimizer, losses.next_token, knobs)


def past(net, length=100, rate=0.001, time_major=False, **knobs):
    made = functools.partial(tasks.sequences, length=length, time_major=time_major)
    return Recipe(net, made, optax.sgd(rate), losses.squared_error, knobs)


def numbers(net, optimizer=None, **knobs):
    knobs = {"inputs": 16, "outputs": 1, **knobs}
    optimizer = optimizer or optax.sgd(0.02)
    return Recipe(net, tasks.vectors, optimizer, losses.squared_error, knobs)
