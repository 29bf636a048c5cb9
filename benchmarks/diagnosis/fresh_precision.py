"""Faults of the precision of bfloat16."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.diagnosis import fresh_recipes as make
from benchmarks.diagnosis import fresh_tasks as tasks
from benchmarks.diagnosis import losses
from benchmarks.diagnosis.fresh_flows import head_net
from benchmarks.diagnosis.kinds_pairs import pair
from benchmarks.diagnosis.problem import Recipe

partial = functools.partial


def standardizing(key, *, dtype="float32"):
    """Standardizes its inputs in ``dtype``, with constants of the training data."""
    params, forward = head_net(key, inputs=9)

    def whole(params, x):
        x = (x.astype(dtype) - jnp.asarray(2000, dtype)) / jnp.asarray(2, dtype)
        return forward(params, x.astype("float32"))

    return params, whole


def calendar(key, *, dtype="float32"):
    """Sines and cosines of the time in days, with periods of a week and less."""
    params, forward = head_net(key, inputs=6, act="tanh")

    def whole(params, day):
        waves = 2 * np.pi * jnp.arange(1, 4, dtype=dtype) / 7
        turn = day.astype(dtype) * waves
        x = jnp.concatenate([jnp.sin(turn), jnp.cos(turn)], -1)
        return forward(params, x.astype("float32"))

    return params, whole


def days(seed, size=64):
    """Sales on the days of four years; they depend on the day of the week."""
    rng = np.random.default_rng(seed)
    sales = rng.normal(size=7)

    def sample():
        day = rng.integers(0, 1461, size)
        y = sales[day % 7] + 0.1 * rng.normal(size=size)
        return day[:, None] * 1.0, y[:, None]

    return tasks.collect(sample)


# In radians per second; numbers from 64 to 128 are 0.5 apart in bfloat16.
WAVES = (61.1, 76.3, 102.8, 112.7)


def vibrations(seed, size=64):
    """How far a machine has moved at some time within 20 seconds: four waves."""
    rng = np.random.default_rng(seed)
    high, shift = rng.uniform(0.5, 1.0, 4), rng.uniform(0, 6, 4)

    def sample():
        time = rng.uniform(0, 20, (size, 1))
        y = np.sin(time * WAVES + shift) @ high + 0.05 * rng.normal(size=size)
        return time, y[:, None]

    return tasks.collect(sample)


def waves(key, *, dtype="float32"):
    """Sums up waves whose frequencies are roughly known; kept in ``dtype``."""
    params = {
        "frequency": jnp.array(WAVES) + 0.02 * jax.random.normal(key, (4,)),
        "sine": jnp.zeros((4, 1)),
        "cosine": jnp.zeros((4, 1)),
    }
    params = jax.tree.map(lambda x: x.astype(dtype), params)

    def forward(params, time):
        turn = time * params["frequency"]
        return jnp.sin(turn) @ params["sine"] + jnp.cos(turn) @ params["cosine"]

    return params, forward


def scenarios():
    yield from pair(
        "vibrations, trained frequencies in bfloat16",
        "vibrations, trained frequencies in float32",
        "precision",
        Recipe(waves, vibrations, optax.adam(0.01), losses.squared_error),
        knobs=dict(dtype="bfloat16"),
        fixes={"float32": None},
    )
    yield from pair(
        "years standardized in bfloat16",
        "years standardized in float32",
        "precision",
        make.rents(standardizing).but(
            task=partial(tasks.rentals, columns=lambda x, rng: 2000 + 2 * x)
        ),
        knobs=dict(dtype="bfloat16"),
        fixes={"float32": None},
    )
    yield from pair(
        "sines of the day number in bfloat16",
        "sines of the day number in float32",
        "precision",
        Recipe(calendar, days, optax.adam(0.01), losses.squared_error),
        knobs=dict(dtype="bfloat16"),
        fixes={"float32": None},
    )
