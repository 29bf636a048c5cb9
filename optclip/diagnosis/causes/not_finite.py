"""Numbers that are not finite, in what was given or in an operation."""

import dataclasses

import numpy as np

from optclip.diagnosis._signals import Signals
from optclip.diagnosis.findings import Finding, Remedy

__all__ = ["cure", "given_not_finite", "not_finite", "operation"]

BROKEN = {
    "parameters": (
        "These parameters hold numbers that are not finite, so every loss is too.",
        "Go back to a checkpoint from before. `optclip.skip_steps` keeps steps that "
        "are not finite out of the parameters, and `optclip.nonfinite_leaves` names "
        "the leaf where it began.",
    ),
    "optimizer": (
        "The optimizer's state holds numbers that are not finite, and so do its "
        "updates, though the gradient is finite.",
        "Go back to a checkpoint from before, or begin with `optimizer.init(params)`. "
        "`optclip.skip_steps` keeps steps that are not finite out of the state.",
    ),
    "batches": (
        "All of these batches hold numbers that are not finite, in the data itself.",
        "Look where the data come from: a division by a deviation of 0, a missing "
        "value, a file that was read wrongly.",
    ),
    "empty": (
        "These batches hold no numbers: the mean over no examples is not finite.",
        "Leave empty batches out.",
    ),
}
UPDATES = (
    "The gradient is finite, and the optimizer's updates are not.",
    "Look at the optimizer's numbers: a learning rate that is not finite, or a "
    "division by a root mean square of 0 with an `eps` of 0.",
)
# What to do about the operation in which numbers stop being finite.
CURES = {
    "gather": "Check that labels and indices are within the size of their axis.",
    "log": "Use a stable function such as `jax.nn.log_softmax` or `optax.losses`, or "
    "keep the argument of the logarithm above zero.",
    "exp": "Use a stable function such as `jax.nn.log_softmax` or `jax.nn.logsumexp`, "
    "which subtract the maximum first.",
    "div": "Keep the divisor away from zero, for example by adding a small constant.",
    "sqrt": "Keep the argument of the square root at or above zero.",
    "rsqrt": "Add a small constant to the argument of the inverse square root.",
}
DERIVATIVE = (
    "The loss is finite and its derivative is not, as for a square root at zero. If a "
    "`jnp.where` selects another branch there, apply `jnp.where` to the argument of "
    "this operation as well, since the branch that is not taken is differentiated too."
)
UNKNOWN = (
    "Look for a logarithm, root or division of zero, or an exponential of a large "
    "number: `jax.config.update('jax_debug_nans', True)` stops at it."
)
SKIP = "`optclip.skip_steps` keeps such steps out of the optimizer."


def operation(s: Signals) -> str:
    """Describes the operation in which a batch stops being finite; "" if unknown."""
    if s.origin is None:
        return ""
    words = str(s.origin)
    return f" {words[0].upper()}{words[1:]}."


def _finding(where: tuple[str, ...], evidence: str, advice: str) -> Finding:
    remedies = (Remedy("advice", advice=advice),)
    return Finding("not_finite", where, evidence, remedies, "high")


def given_not_finite(s: Signals) -> Finding | None:
    """Finds an argument that was not finite before anything was computed."""
    for name, words in BROKEN.items():
        where = s.broken.get(name, ())
        if name in ("batches", "empty"):
            where = tuple(f"batch {i}" for i in where)
            if len(where) < len(s.batches):
                continue
        if where:
            return _finding(where, *words)
    return _finding((), *UPDATES) if s.bad_updates else None


def cure(s: Signals) -> str:
    """Returns what to do about the operation that was found, or how to find it."""
    if s.origin is None:
        return UNKNOWN
    if s.origin.backward:
        return DERIVATIVE
    known = CURES.get(s.origin.primitive)
    return known or "Look at the operands of this operation."


def not_finite(s: Signals) -> Finding:
    """Describes losses or gradients that are not finite for no other known cause."""
    broken = [b for b in s.batches if not b.finite]
    worst = broken[0]
    sites = [x for x in worst.sites if not np.all(np.isfinite(x.rms_out))]
    where = (sites[0].leaf,) if sites else worst.bad_leaves[:4]
    first = operation(s)
    if not first and sites:
        first = (
            f" The first use of parameters whose result is not finite is {where[0]}."
        )
    found = _finding(
        where,
        f"{len(broken)} of {len(s.batches)} batches have a loss or gradient that is "
        f"not finite.{first}",
        f"{cure(s)} {SKIP}",
    )
    # Without the operation, this only says that no other cause explains it.
    return found if s.origin else dataclasses.replace(found, basis="eliminated")
