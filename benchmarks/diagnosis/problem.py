"""What a scenario is, and the recipe that builds it from a network and a task."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.diagnosis.losses import cross_entropy

# What each remedy that changes the program changes in a network.
VARIANTS = {
    "normalize": {"norm": True},
    "residual": {"norm": True, "residual": True},
    "gate": {"cell": "gru", "norm": False},
    "change_activation": {"act": "relu"},
    "float32": {"dtype": "float32"},
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """The arguments of `optclip.diagnose`."""

    loss_fn: Callable
    params: Any
    batches: list
    optimizer: optax.GradientTransformation
    opt_state: Any = None


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A model with a known cause of instability.

    Attributes:
        name: Its name in the tables.
        cause: A key of `optclip.diagnosis.findings.CAUSES`, or "healthy".
        make: Returns the problem for a seed.
        sound: The same without the fault; for a healthy model, before training.
        also: Further causes that also apply.
        held_out: Whether it is held out until the final evaluation.
        variants: The problem with each remedy that changes the program, by name.
    """

    name: str
    cause: str
    make: Callable[[int], Problem]
    sound: Callable[[int], Problem]
    also: tuple[str, ...] = ()
    held_out: bool = False
    variants: Mapping[str, Callable[[int], Problem]] = dataclasses.field(
        default_factory=dict
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """Builds a `Problem` from a seed.

    Attributes:
        net: Takes a key and the knobs; returns parameters and ``forward(params, x)``.
        task: Takes a seed; returns the batches.
        optimizer: The optimizer.
        loss: Takes ``forward``; returns ``loss_fn(params, batch)``.
        knobs: The network's keyword arguments.
        spoil_params: Changes the parameters last.
        spoil_batches: Changes the batches last.
        before: The recipe of the first ``steps`` steps.
        steps: How many steps ``before`` is followed.
    """

    net: Callable
    task: Callable[[int], list]
    optimizer: optax.GradientTransformation
    loss: Callable = cross_entropy
    knobs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    spoil_params: Callable = lambda params: params
    spoil_batches: Callable = lambda batches: batches
    before: "Recipe | None" = None
    steps: int = 0

    def __call__(self, seed: int) -> Problem:
        params, forward = self.net(jax.random.key(seed), **self.knobs)
        opt_state = None
        if self.before:
            params, opt_state = _trained(self.before, self.steps, seed)
        return Problem(
            self.loss(forward),
            self.spoil_params(params),
            self.spoil_batches(self.task(seed)),
            self.optimizer,
            opt_state,
        )

    def but(self, **changes: Any) -> "Recipe":
        """Returns the recipe with other fields; ``knobs`` extend the existing ones."""
        knobs = {**self.knobs, **changes.pop("knobs", {})}
        return dataclasses.replace(self, knobs=knobs, **changes)

    def after(self, steps: int, before: "Recipe | None" = None) -> "Recipe":
        """Returns the recipe that starts after this many healthy steps."""
        return dataclasses.replace(self, before=before or self, steps=steps)


@functools.lru_cache(maxsize=8)
def _trained(recipe, steps, seed):
    params, opt_state, _, _ = train(recipe(seed), steps)
    return params, opt_state


def train(problem, steps):
    """Trains, and returns parameters, state, losses, and whether all was finite."""
    params, state = problem.params, problem.opt_state
    if state is None:
        state = problem.optimizer.init(params)

    @jax.jit
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(problem.loss_fn)(params, batch)
        updates, state = problem.optimizer.update(grads, state, params)
        after = optax.apply_updates(params, updates)
        return after, state, loss, _finite((loss, after))

    # A Python loop: on the CPU, XLA runs a convolution within a scan far more slowly.
    losses, flags = [], []
    for i in range(steps):
        batch = problem.batches[i % len(problem.batches)]
        params, state, loss, finite = step(params, state, batch)
        losses.append(loss)
        flags.append(finite)
    return params, state, np.array(losses), bool(np.all(flags))


def _finite(tree):
    flags = [jnp.isfinite(x).all() for x in jax.tree.leaves(tree) if _is_real(x)]
    return jnp.stack(flags).all()


def _is_real(x):
    return jnp.issubdtype(x.dtype, jnp.inexact)


def typical_loss(problem, params=None):
    """Returns the median loss over the batches, which is robust to a few bad ones."""
    params = problem.params if params is None else params
    loss_fn = jax.jit(problem.loss_fn)
    values = np.array([loss_fn(params, b) for b in problem.batches], np.float64)
    return float(np.median(np.where(np.isnan(values), np.inf, values)))


def fault(name, cause, recipe, *, remedies=(), mid=0, also=(), held_out=False, **how):
    """Returns the scenario in which ``how`` is the change made to a good recipe.

    Args:
        name: Its name.
        cause: Its cause.
        recipe: The recipe that trains.
        remedies: The keys of `VARIANTS` that make sense for it.
        mid: After how many good steps the fault begins; 0 for the start.
        also: Further causes.
        held_out: Whether it is held out.
        **how: Fields of the recipe that make the fault.
    """
    bad = recipe.but(**how)
    variants = {}
    for key in remedies:
        variants[key] = bad.but(knobs=VARIANTS[key])
    if mid:
        variants = {k: v.after(mid, recipe) for k, v in variants.items()}
        bad, recipe = bad.after(mid, recipe), recipe.after(mid)
    return Scenario(name, cause, bad, recipe, also, held_out, variants)
