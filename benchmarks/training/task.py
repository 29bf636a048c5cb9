"""What a task of the benchmark is, and the optimizers that tasks are trained with."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

__all__ = ["OPTIMIZERS", "Task", "schedule_of"]


class Task(NamedTuple):
    """A small training problem, and what may go wrong in it.

    Attributes:
        name: The name of its file.
        split: "tune" if defaults may be chosen on it, "held_out" if it only judges
            them.
        trouble: What makes training hard, in a few words.
        optimizer: A key of `OPTIMIZERS`.
        rates: Learning rates, from a safe one to one about ten times too high. The best
            rate of every method should be inside.
        steps: Number of steps.
        init: Function of a key that returns the parameters.
        batch: Function of (key, step) that returns a batch. ``step`` is an int32
            scalar, for troubles that begin at some step.
        loss: Function of (params, batch) that returns the loss that is trained on.
        clean: Function of the parameters that returns the loss on fixed data without
            the trouble, or the largest possible return divided by the return. Lower is
            better, and it is above 0.
        chance: The clean loss of a model that has learned nothing. Runs that end far
            above it have diverged.
        gradient: Function of (key, step, grads) that returns the gradients that the
            optimizer receives, for noise that is not in the data; None for none.
        cosine: Whether the learning rate decays to zero by a cosine. If not, it is
            constant.
    """

    name: str
    split: Literal["tune", "held_out"]
    trouble: str
    optimizer: str
    rates: tuple[float, ...]
    steps: int
    init: Callable[[jax.Array], Any]
    batch: Callable[[jax.Array, jax.Array], Any]
    loss: Callable[[Any, Any], jax.Array]
    clean: Callable[[Any], jax.Array]
    chance: float
    gradient: Callable[[jax.Array, jax.Array, Any], Any] | None = None
    cosine: bool = True


# Each is a function of the learning rate, which is a schedule.
OPTIMIZERS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
    "adam": optax.adam,
    "adamw": lambda rate: optax.adamw(rate, weight_decay=0.01),
    "lion": optax.lion,
    "rmsprop": lambda rate: optax.rmsprop(rate, decay=0.99),
    "muon": optax.contrib.muon,
}


def schedule_of(task: Task, rate: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """Returns the schedule of the learning rate, which begins at ``rate``."""

    def schedule(count):
        if not task.cosine:
            return rate
        return rate * 0.5 * (1 + jnp.cos(jnp.pi * count / task.steps))

    return schedule
