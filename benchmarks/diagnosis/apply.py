"""Carries out what a diagnosis says, and checks whether the model then trains."""

import dataclasses

import jax
import numpy as np
import optax

import optclip
from benchmarks.diagnosis.problem import train, typical_loss
from optclip._engine.names import path_name

__all__ = ["apply", "apply_all", "first_applicable", "trains"]


def _scale_weights(action, problem):
    def scale(path, x):
        chosen = path_name(path) in action.where
        return (x * action.amount).astype(x.dtype) if chosen else x

    params = jax.tree_util.tree_map_with_path(scale, problem.params)
    return dataclasses.replace(problem, params=params)


def _scale_learning_rate(action, problem):
    optimizer = optax.chain(problem.optimizer, optax.scale(action.amount))
    return _with_optimizer(
        problem, optimizer, lambda state: (state, optax.ScaleState())
    )


def _clip(action, problem):
    clip = optclip.clip_by_global_norm(action.amount)
    optimizer = optax.chain(clip, problem.optimizer)
    first = clip.init(problem.params)
    return _with_optimizer(problem, optimizer, lambda state: (first, state))


def _with_optimizer(problem, optimizer, wrap):
    state = None if problem.opt_state is None else wrap(problem.opt_state)
    return dataclasses.replace(problem, optimizer=optimizer, opt_state=state)


def _divide_loss(action, problem):
    def loss_fn(params, batch):
        return problem.loss_fn(params, batch) / action.amount

    return dataclasses.replace(problem, loss_fn=loss_fn)


def _drop_batches(action, problem):
    dropped = {int(word) for word in action.where}
    kept = [b for i, b in enumerate(problem.batches) if i not in dropped]
    return dataclasses.replace(problem, batches=kept)


NUMBERS = {
    "scale_weights": _scale_weights,
    "scale_learning_rate": _scale_learning_rate,
    "divide_loss": _divide_loss,
    "drop_batches": _drop_batches,
    "clip": _clip,
}


# Remedies that are carried out by variants of other names. The advice on an operation
# whose result is not finite is followed by changing this operation.
ALIASES = {
    "divide_factor": ("divide_factor", "divide_term", "divide_loss"),
    "advice": ("stable_log", "add_epsilon", "double_where"),
}


def apply(action, problem, scenario, seed):
    """Returns the problem after a `Remedy`.

    An action that changes the program is carried out through the scenario's variants;
    earlier changes to the problem are then lost.

    Raises:
        KeyError: If the scenario has no such variant.
    """
    if action.kind in NUMBERS:
        return NUMBERS[action.kind](action, problem)
    names = ALIASES.get(action.kind, (action.kind,))
    variants = [scenario.variants[name] for name in names if name in scenario.variants]
    if not variants:
        known = ", ".join(scenario.variants) or "none"
        raise KeyError(
            f"{scenario.name!r} has no variant for {action.kind!r}; it has: {known}."
        )
    return variants[0](seed)


def first_applicable(actions, problem, scenario, seed):
    """Returns the first action that can be carried out, and the problem after it."""
    for action in actions:
        try:
            return action, apply(action, problem, scenario, seed)
        except KeyError:
            continue
    return None, problem


def apply_all(findings, problem, scenario, seed):
    """Returns the problem after the first applicable action of each finding."""
    actions = [
        first_applicable(finding.remedies, problem, scenario, seed)[0]
        for finding in findings
    ]
    # Changes of the program reset the problem, so changes of numbers are applied later.
    for action in sorted(filter(None, actions), key=lambda a: a.kind in NUMBERS):
        problem = apply(action, problem, scenario, seed)
    return problem


def trains(problem, steps=200):
    """Returns whether the typical loss falls and no step is non-finite."""
    before = typical_loss(problem)
    params, _, _, finite = train(problem, steps)
    return bool(
        finite and np.isfinite(before) and typical_loss(problem, params) < before
    )
