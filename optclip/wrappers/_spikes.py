"""Spike detection for `skip_steps`: a rule, and a test of how rare such norms are.

A rule alone is not enough. If it excludes spikes from its history, it never learns that
they have become normal; if it includes them, a single spike hides the next ones. The
rule therefore records only steps that are taken, and a second, much longer history
counts how often values of similar size have occurred. Frequent values are never spikes,
even if they exceed the threshold of the rule.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optclip._engine import sharding, validation
from optclip._engine import state as states
from optclip._engine.power_sums import widen
from optclip._engine.rule import Context, Rule, apply_rule
from optclip._engine.thresholds import as_rule, schedule
from optclip.methods.rolling_sigma import window_sigma
from optclip.wrappers._log_window import log_window_sigma

__all__ = [
    "RECENT",
    "Verdict",
    "judge",
    "loss_rule",
    "mean_loss",
    "no_values",
    "pushed",
    "restarted",
]

# Number of steps over which values and skips are counted. The default limit of ten
# similar values is 2% of this: new data in 5% of the batches produces 26 similar
# values, whereas isolated spikes in 1% of the batches produce 5.
RECENT = 512
# Relative differences of at most 8 times the float32 epsilon are rounding errors.
NEAR = 2.0**-20
LARGEST = float(jnp.finfo(jnp.float32).max)


def no_values() -> jax.Array:
    """Returns an empty history of values."""
    return jnp.full(RECENT, -LARGEST, jnp.float32)


def pushed(rows: jax.Array, value: jax.Array) -> jax.Array:
    """Returns ``rows`` with ``value`` prepended and the last row dropped."""
    row = jnp.asarray(value).astype(rows.dtype)[None]
    return jnp.concatenate([row, jnp.asarray(rows)[:-1]])


def mean_loss(loss: Any, names: Any) -> jax.Array:
    """Returns the loss, averaged over the mesh axes that it varies over."""
    try:
        loss = jnp.asarray(loss)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`loss` must be a real scalar, got {loss!r}.") from error
    if loss.ndim or jnp.iscomplexobj(loss):
        raise ValueError(
            f"`loss` must be a real scalar, got {loss.dtype} of shape {loss.shape}."
        )
    if jnp.issubdtype(loss.dtype, jnp.floating):
        loss = widen(loss)
    loss = states.to_finite_f32(loss)
    names = sharding.varying(loss) if names is None else names
    return lax.pmean(loss, names) if names else loss


def norm_rule(when: Any) -> Rule:
    """Returns the rule for the norm."""
    rule = log_window_sigma() if when is None else as_rule(when, "when")
    if rule.for_groups is not None:
        raise ValueError(
            "`when` must be a single threshold, since only the global norm of the "
            "gradients is judged, got thresholds by name. Pass a number, a schedule or "
            "a rule, and use `mask` to choose the leaves that count."
        )
    return rule


def loss_rule(when_loss: Any, when: Any) -> Rule | None:
    """Returns the rule for the loss, or None if there is none."""
    if when_loss is None:
        return None if when is not None else window_sigma(6.0, unbiased=True)
    if isinstance(when_loss, Rule):
        if when_loss.signed:
            return when_loss
        raise ValueError(
            "`when_loss` must be a rule that accepts negative values, since losses may "
            f"be negative, got `{when_loss.name}`, which accepts only norms. Use a "
            "number, a schedule, `optclip.rules.window_sigma`, or a custom `Rule` with "
            "`signed=True`."
        )
    if callable(when_loss):
        return schedule(when_loss)._replace(signed=True)
    validation.not_nan(when_loss=when_loss)
    if np.ndim(when_loss):
        raise ValueError(
            "`when_loss` must be a single number, a schedule or a rule, since there is "
            f"one loss, got an array of shape {np.shape(when_loss)}."
        )
    return schedule(lambda step: when_loss)._replace(signed=True)


class Verdict(NamedTuple):
    """Result of applying a rule to a value.

    Attributes:
        spike: Whether the value is a spike.
        threshold: The threshold of the rule, clipped to the finite range.
        after: The new state of the rule if the step is taken.
    """

    spike: jax.Array
    threshold: jax.Array
    after: Any


def judge(
    rule: Rule,
    value: jax.Array,
    state: Any,
    recent: jax.Array | tuple,
    step: jax.Array,
    *,
    signed: bool,
    max_similar: int | None = None,
) -> Verdict:
    """Applies the rule to ``value`` and counts the similar values in ``recent``."""

    def no_params():
        raise ValueError(
            "`when` and `when_loss` must be rules that do not use the parameters, got "
            f"`{rule.name}`."
        )

    fine = jnp.where(jnp.isfinite(value), value, 0.0)
    context = Context(step, fine, no_params)
    limit, after = apply_rule(rule, fine, state, context, signed=signed)
    bound = jnp.asarray(limit.threshold).astype(fine.dtype)
    bound = jnp.where(jnp.isnan(bound), -LARGEST, jnp.clip(bound, -LARGEST, LARGEST))
    # A value that exceeds the threshold only by a rounding error, such as a constant
    # compared with its own mean, is not a spike. Both sides are halved so that their
    # difference can't overflow.
    above = fine / 2 - bound / 2
    spike = above > NEAR / 2 * jnp.abs(bound)
    if max_similar is not None and not isinstance(recent, tuple):
        # A norm is similar if it is at least half as large. A loss has no natural zero,
        # so a loss is similar if it is at least half as far above the threshold.
        similar = recent >= (bound + above if signed else fine / 2)
        spike &= jnp.sum(similar, dtype=jnp.int32) < max_similar
    after = jax.tree.map(lambda old, new: new.astype(old.dtype), state, after)
    return Verdict(spike, bound, after)


def restarted(rule: Rule, value: jax.Array, step: jax.Array) -> Any:
    """Returns the state of a rule whose first recorded value is ``value``."""
    state = rule.init(jnp.zeros([], jnp.float32))
    return judge(rule, value, state, (), step, signed=True).after
