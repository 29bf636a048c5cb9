"""Trains a task with a method, at all learning rates and seeds, in one program."""

import functools
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.training.methods import Method
from benchmarks.training.task import OPTIMIZERS, Task, schedule_of

__all__ = ["EVALUATIONS", "Outcome", "Program", "program_of", "train"]

# The clean loss is averaged over this many points in the last tenth of the steps.
EVALUATIONS = 5


class Outcome(NamedTuple):
    """What is left of the runs of one task with one method.

    Attributes:
        clean: float[values, rates, seeds]. The clean loss, averaged over the last tenth
            of the steps; inf where it is not finite.
    """

    clean: np.ndarray


def _one(task: Task, method: Method, value: Any, rate: Any, seed: Any) -> jax.Array:
    """Returns the clean loss of one run."""
    start, stream = jax.random.split(jax.random.key(seed))
    optimizer = OPTIMIZERS[task.optimizer](schedule_of(task, rate))
    optimizer = method.build(optimizer, value)
    optimizer = optax.with_extra_args_support(optimizer)
    params = task.init(start)

    def step(carry, number):
        params, state = carry
        key, noise = jax.random.split(jax.random.fold_in(stream, number))
        batch = task.batch(key, number)
        loss, grads = jax.value_and_grad(task.loss)(params, batch)
        if task.gradient is not None:
            grads = task.gradient(noise, number, grads)
        updates, state = optimizer.update(grads, state, params, value=loss)
        return (optax.apply_updates(params, updates), state), None

    part = max(task.steps // (10 * EVALUATIONS), 1)
    first = task.steps - EVALUATIONS * part
    numbers = jnp.arange(task.steps, dtype=jnp.int32)
    carry, _ = jax.lax.scan(step, (params, optimizer.init(params)), numbers[:first])

    def stretch(carry, numbers):
        carry, _ = jax.lax.scan(step, carry, numbers)
        return carry, task.clean(carry[0])

    rest = numbers[first:].reshape(EVALUATIONS, part)
    _, clean = jax.lax.scan(stretch, carry, rest)
    return jnp.mean(clean)


class Program(NamedTuple):
    """The program of one task with one method.

    Attributes:
        lowered: The program, before it is compiled.
        arguments: Its arguments: values, rates and seeds of all lanes.
        shape: The numbers of values, rates and seeds.
    """

    lowered: Any
    arguments: tuple[jax.Array, ...]
    shape: tuple[int, int, int]

    @property
    def checksum(self) -> int:
        """A checksum of all that is computed: the task, the method and the library."""
        return zlib.crc32(self.lowered.as_text().encode())


def program_of(task: Task, method: Method, seeds: range) -> Program:
    """Returns the program that trains with each value, rate and seed, as its lanes."""
    values = method.values or (None,)
    lanes = [(v, r, s) for v in values for r in task.rates for s in seeds]
    value, rate, seed = zip(*lanes, strict=True)
    run = functools.partial(_one, task, method)
    numbers = jnp.asarray(rate, jnp.float32), jnp.asarray(seed, jnp.uint32)
    if method.values:
        numbers = (jnp.asarray(value, jnp.float32), *numbers)
    else:
        run = functools.partial(run, None)
    shape = (len(values), len(task.rates), len(seeds))
    return Program(jax.jit(jax.vmap(run)).lower(*numbers), numbers, shape)


def train(program: Program) -> Outcome:
    """Runs a program."""
    clean = np.asarray(program.lowered.compile()(*program.arguments), np.float64)
    clean = np.where(np.isfinite(clean), clean, np.inf)
    return Outcome(clean.reshape(program.shape))
