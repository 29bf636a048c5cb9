"""The tasks of the training benchmark work, and its ratios are what they say."""

import json

import jax
import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the tasks use scikit-learn's digits")

from benchmarks.training import summary, tasks
from benchmarks.training.methods import CONSTANT, METHODS
from benchmarks.training.run import program_of, train


@pytest.fixture(autouse=True)
def implicit_broadcasting():
    """Allows what the suite forbids in the library: the tasks add biases to batches."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("name", tasks.all_names())
def test_every_task_trains(name):
    # Without a clip: methods must not be run on held-out tasks before they are frozen.
    task = tasks.load(name)
    task = task._replace(steps=10, rates=task.rates[:1])
    clean = train(program_of(task, METHODS["none"], range(1))).clean
    assert clean.shape == (1, 1, 1)
    assert np.isfinite(clean).all()
    assert (clean > 0).all()


def test_both_splits_have_every_optimizer():
    found = {}
    for name in tasks.all_names():
        task = tasks.load(name)
        found.setdefault(task.split, set()).add(task.optimizer)
    assert found["tune"] >= {"momentum", "adam", "adamw", "lion", "rmsprop", "muon"}
    assert found["held_out"] >= {"momentum", "adam", "adamw", "lion", "rmsprop", "muon"}


def test_methods_build_the_same_program_for_the_same_settings():
    task = tasks.load("logistic_from_zeros")._replace(steps=10)
    first, second = (program_of(task, METHODS["zclip"], range(2)) for _ in range(2))
    assert first.checksum == second.checksum
    longer = task._replace(steps=20)
    assert program_of(longer, METHODS["zclip"], range(2)).checksum != first.checksum


def read_back(folder, losses):
    """Returns the results that are read from files with these losses."""
    settings = {"task": "t", "chance": 1.0, "rates": [0.1, 1.0], "values": [1.0, 2.0]}
    for method, clean in losses.items():
        file = folder / "t" / f"{method}.json"
        file.parent.mkdir(exist_ok=True)
        row = {"settings": settings | {"method": method}, "clean": clean}
        file.write_text(json.dumps(row | {"machine": "2 cores"}))
    return summary.read(folder)["t"]


def test_ratios_by_hand(tmp_path):
    losses = {
        CONSTANT: [[[0.2, 0.2], [0.4, 0.4]], [[0.1, 0.1], [None, None]]],
        "stabilize": [[[0.3, 0.3], [0.05, 0.05]]],
    }
    task = read_back(tmp_path, losses)
    ratios = summary.ratios(task, "stabilize")
    np.testing.assert_allclose(ratios.own, 0.5)  # 0.05 against 0.1 with value 2
    np.testing.assert_allclose(ratios.same, 3.0)  # 0.3, at the same rate of 0.1
    np.testing.assert_allclose(ratios.worst, 3.0)
    # A run that diverged counts as twice the loss of a model that learned nothing.
    np.testing.assert_allclose(summary.ratios(task, f"{CONSTANT}(2)").worst, 20.0)


def test_rates_below_that_of_the_best_constant_are_not_too_high(tmp_path):
    losses = {
        CONSTANT: [[[0.4, 0.4], [0.1, 0.1]], [[0.5, 0.5], [0.2, 0.2]]],
        "stabilize": [[[0.9, 0.9], [0.3, 0.3]]],
    }
    ratios = summary.ratios(read_back(tmp_path, losses), "stabilize")
    np.testing.assert_allclose(ratios.high, 3.0)  # at the higher rate
    np.testing.assert_allclose(ratios.worst, 9.0)  # at the lower one
