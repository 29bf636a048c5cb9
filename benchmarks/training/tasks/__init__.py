"""The tasks of the benchmark, one file each."""

import importlib
import pkgutil

from benchmarks.training.task import Task

__all__ = ["all_names", "load"]


def all_names() -> list[str]:
    """Returns the names of all tasks."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Task:
    """Returns the task of this name."""
    task = importlib.import_module(f"{__name__}.{name}").TASK
    assert task.name == name, f"{name}.py defines the task {task.name}"
    return task
