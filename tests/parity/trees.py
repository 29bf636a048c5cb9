"""Gradients below and above a threshold of 1, and a helper to import slow packages."""

import functools
import importlib
import warnings

import numpy as np
import pytest

SHAPES = {"w": (4, 3), "b": (3,), "head": (3, 1)}
# Norms well below, near and far above a threshold of 1.
SIZES = [0.1, 0.999, 1.001, 3.0, 1e4]


def draw(size, seed=0):
    """Returns float32 gradients whose joint norm is ``size``."""
    rng = np.random.default_rng(seed)
    tree = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    norm = np.sqrt(sum(np.sum(np.square(x)) for x in tree.values()))
    return {name: np.asarray(x * size / norm, np.float32) for name, x in tree.items()}


@functools.cache
def imported(name):
    """Imports a package that emits warnings on import, or skips the module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            pytest.skip(f"{name} is not installed", allow_module_level=True)


def updates_of(tx, grads, params=None):
    """Returns the updates of a transformation at its first step."""
    return tx.update(grads, tx.init(grads if params is None else params), params)[0]


def assert_same(ours, theirs, rtol=1e-6):
    for name in SHAPES:
        np.testing.assert_allclose(
            np.asarray(ours[name]), np.asarray(theirs[name]), rtol=rtol, atol=1e-9
        )
