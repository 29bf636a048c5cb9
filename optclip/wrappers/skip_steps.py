"""Skips bad steps, so that they never change the state of an optimizer."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optclip._engine import group_norms, pytrees, sharding, validation
from optclip._engine import state as states
from optclip._engine.state import NonfiniteStats
from optclip._engine.types import Order
from optclip._engine.validation import EUCLIDEAN, Static
from optclip.wrappers import _holding, _masks, _spikes
from optclip.wrappers._spikes import pushed

__all__ = ["BadSteps", "SkipState", "skip_steps"]


class BadSteps(NamedTuple):
    """The most recently skipped steps, newest first.

    Attributes:
        bad_step: int32[K]. Step numbers, counted from 0; -1 in unused entries.
        bad_norm: float32[K]. Norms of the gradients, which may be NaN or inf.
        bad_loss: float32[K]. Losses; 0 if none was passed.
        bad_leaf: int32[K]. Index of the worst leaf: the first leaf that contained NaN
            or inf, otherwise the leaf with the largest norm; -1 if only the loss was
            bad.
        bad_kinds: int32[K, 3]. 1 or 0 for each of NaN, +inf and -inf, depending on
            whether that leaf contained it.
    """

    bad_step: jax.Array
    bad_norm: jax.Array
    bad_loss: jax.Array
    bad_leaf: jax.Array
    bad_kinds: jax.Array


class SkipState(NamedTuple):
    """State of `skip_steps`.

    Attributes:
        optimizer_state: State of the wrapped optimizer, as if the skipped steps had not
            happened.
        norm_rule_state: State of the rule for the norm.
        loss_rule_state: State of the rule for the loss, or () if there is none.
        offered_norms: float32[512]. The most recent finite norms, newest first,
            including the norms of skipped steps. Unused entries hold the lowest
            float32. () if the rule is stateless or ``max_similar`` is None.
        offered_losses: float32[512]. The same for the loss.
        recent_skips: int32[512]. 1 for a skipped step and 0 otherwise, newest first.
        recent_fraction: float32 scalar. Fraction of steps that were skipped, over the
            last 512 steps or, if there are fewer, over all steps.
        recent_since: int32 scalar. Step number of the first skip that followed 512
            steps without one; -1 if the last 512 steps were all taken.
        offered_steps: int32 scalar. Number of steps so far, including skipped steps.
            All counters saturate at 2**31 - 1.
        skipped_steps: int32 scalar. Number of steps skipped for any reason.
        spike_steps: int32 scalar. Number of steps skipped because of a spike, with
            finite gradients and loss.
        skipped_run: int32 scalar. Number of consecutive steps skipped so far.
        spike_run: int32 scalar. Number of spikes skipped since the last step that was
            taken.
        offered_norm: float32 scalar. Norm of the last gradients; initially 0.
        offered_loss: float32 scalar. The last loss; 0 if none was passed.
        skip_above: float32 scalar. The last threshold for the norm; the largest float32
            if there was none; initially 0.
        skip_loss_above: float32 scalar. The same for the loss; 0 if none was checked.
        last_bad: The most recently skipped steps, as `BadSteps`.
        nonfinite: Statistics of non-finite entries, as `NonfiniteStats`.
    """

    optimizer_state: Any
    norm_rule_state: Any
    loss_rule_state: Any
    offered_norms: Any
    offered_losses: Any
    recent_skips: jax.Array
    recent_fraction: jax.Array
    recent_since: jax.Array
    offered_steps: jax.Array
    skipped_steps: jax.Array
    spike_steps: jax.Array
    skipped_run: jax.Array
    spike_run: jax.Array
    offered_norm: jax.Array
    offered_loss: jax.Array
    skip_above: jax.Array
    skip_loss_above: jax.Array
    last_bad: BadSteps
    nonfinite: NonfiniteStats


# Not plain ints, which `optax.inject_hyperparams` would convert to arrays.
MAX_CONSECUTIVE, MAX_SIMILAR, KEPT = Static(10), Static(10), Static(8)


def _worst(norms: jax.Array, kinds: jax.Array) -> jax.Array:
    """Returns the index of the first non-finite leaf, or else of the largest norm."""
    bad = jnp.any(kinds, axis=1)
    size = jnp.where(jnp.isfinite(norms) & ~bad, norms, 0.0)
    return jnp.argmax(jnp.where(bad, jnp.inf, size)).astype(jnp.int32)


def _counted(count: jax.Array, flag: jax.Array) -> jax.Array:
    """Increments ``count`` where ``flag`` is set, up to the largest int32."""
    return jnp.where(flag, optax.safe_increment(count), count)


def _recent(state: SkipState, skip: jax.Array) -> dict[str, jax.Array]:
    """Returns the updated fields that describe recent steps."""
    before, after = state.recent_skips, pushed(state.recent_skips, skip)
    begins = skip & ~jnp.any(before > 0)
    since = jnp.where(begins, state.offered_steps, state.recent_since)
    steps = jnp.minimum(optax.safe_increment(state.offered_steps), after.size)
    skipped = jnp.sum(after, dtype=jnp.int32).astype(jnp.float32)
    return {
        "recent_skips": after,
        "recent_fraction": skipped / steps.astype(jnp.float32),
        "recent_since": jnp.where(jnp.any(after > 0), since, -1),
    }


def skip_steps(
    optimizer: optax.GradientTransformation,
    *,
    when: Any = None,
    when_loss: Any = None,
    max_consecutive: Any = MAX_CONSECUTIVE,
    max_similar: Any = MAX_SIMILAR,
    keep_last: Any = KEPT,
    mask: Any = None,
    ord: Order = EUCLIDEAN,
    axis_name: Any = None,
    loss_axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that bad steps are skipped and leave its state unchanged.

    A step is skipped if its gradients or its loss contain NaN or inf, or if the norm of
    its gradients or its loss is a spike. The updates of a skipped step are zeros, and
    the optimizer's state, including its step count, is bitwise unchanged.

    A spike is a value that is above the threshold t of its rule and rare among the last
    512 finite values, including the values of skipped steps. The norm n is a spike if

        n > t  and  fewer than ``max_similar`` of the 512 norms were n / 2 or more

    For the loss, a previous value counts if it is at least half as far above t. The
    rule records only steps that are taken, so a spike does not raise t. New data with
    large gradients is accepted after about ``max_similar`` of its batches have been
    skipped; the rule then adapts to it. Among the steps in any window of 512 whose
    norms are within a factor of two of each other, at most ``max_similar`` are skipped.
    If the norms are in random order, at most a fraction ``max_similar / 513`` of the
    steps is skipped. A number or a schedule has no history and is always a fixed bound.

    | ``when``                                  | a step is skipped if its norm is     |
    | ----------------------------------------- | ------------------------------------ |
    | None: `rules.log_window_sigma()`          | 5 deviations above its mean on a log |
    |                                           | scale, and above twice that mean     |
    | `rules.window_sigma(6.0, unbiased=True)`  | 6 deviations above its mean, as      |
    |                                           | in OLMo-core and MaxText             |
    | `rules.window_sigma(6.0)`                 | the same, as in Levanter             |
    | a number or a schedule                    | above it, as in paxml                |
    | inf                                       | NaN or inf                           |

    ``when_loss`` is the same for the loss: a number of any sign, a schedule, or a rule
    that accepts negative values. The only such rule in this library is
    `rules.window_sigma`. If both ``when`` and ``when_loss`` are None, the loss uses
    ``rules.window_sigma(6.0, unbiased=True)``; if only ``when_loss`` is None, a loss is
    bad only if it is NaN or inf. To judge only the loss, pass ``when=jnp.inf``.

    After ``max_consecutive`` spikes with no step taken in between, the next spike is
    taken, and a stateful rule restarts from it. A non-finite step is never taken and
    does not count as a spike.

    Pass the loss as an extra argument: ``update(grads, state, params, loss=loss)``. If
    you pass it under Optax's name, ``value=loss``, the wrapped optimizer receives it
    too; ``loss`` is not passed on. If this wraps `optax.MultiSteps`, it skips bad
    microbatches; inside `optax.MultiSteps`, it skips bad averages.

    A rule does not detect spikes during its first steps: by default, the first 64 steps
    and the 64 steps after a restart. Chain a clip inside to guard against a bad start:
    a finite gradient of 1e25 would make Adam's second moment infinite permanently.

    Args:
        optimizer: An Optax optimizer, including its clip. `optax.lookahead` can't be
            wrapped, since its parameters come in pairs: use this inside it.
        when: A rule of `optclip.rules`, a number, an array or a schedule.
        when_loss: A rule that accepts negative values, a number or a schedule.
        max_consecutive: Number of spikes, with no step taken in between, after which a
            rule restarts. At least 1; if None, it never restarts.
        max_similar: A value is a spike only if fewer than ``max_similar`` of the last
            512 values were similar. At least 1; None disables this condition.
        keep_last: Number of skipped steps kept in the state, at least 1.
        mask: Which leaves are judged, as in `optax.masked`: a pytree of booleans with
            the structure of the updates or a prefix of it, or a function of the updates
            that returns one. The other leaves, such as frozen parameters, are not
            measured and are passed to the optimizer unchanged.
        ord: Order of the norm: a number of at least 1, inf or "rms".
        axis_name: As in `optclip.clip_by_rule`.
        loss_axis_name: Inside `jax.pmap`, or `jax.shard_map` with ``check_vma=False``,
            the mesh axes over which the loss differs between devices. The mean of these
            losses is judged, so that all devices make the same decision. Otherwise, the
            axes are inferred from the type of the loss.

    Returns:
        A gradient transformation whose state is a `SkipState`. Read it with
        `optclip.metrics`, `optclip.step_taken` and `optclip.nonfinite_leaves`.

    Raises:
        TypeError: If ``optimizer`` is not a gradient transformation, or ``mask``
            contains anything other than booleans.
        ValueError: If an argument is out of range, ``when_loss`` is a rule that does
            not accept negative values, ``loss`` is not a scalar, or ``mask`` does not
            fit the updates.

    Example:
        >>> import jax.numpy as jnp, optax, optclip
        >>> clip = optclip.clip_by_global_norm(1.0)
        >>> tx = optclip.skip_steps(optax.chain(clip, optax.adam(1e-3)))
        >>> params = jnp.ones(2)
        >>> grads = jnp.array([jnp.nan, 1.0])
        >>> updates, state = tx.update(grads, tx.init(params), params, loss=0.5)
        >>> updates.tolist(), int(optclip.metrics(state)["skip/skipped_steps"])
        ([0.0, 0.0], 1)

    Reference:
        OLMo et al., 2 OLMo 2 Furious, 2024, https://arxiv.org/abs/2501.00656
    """
    inner: Any = validation.transformation(optimizer=optimizer)
    by_loss = _spikes.loss_rule(when_loss, when)
    by_norm = _spikes.norm_rule(when)
    if max_consecutive is not None:
        max_consecutive = validation.size("max_consecutive", max_consecutive)
    if max_similar is not None:
        max_similar = validation.size("max_similar", max_similar)
    keep_last = validation.size("keep_last", keep_last)
    order = validation.order(ord)
    _masks.check(mask)

    def count():
        return states.scalar(0, jnp.int32)

    def memories(rule):
        """Returns the initial state of a rule and an empty history of values."""
        if rule is None:
            return (), ()
        state = states.tree_copy(rule.init(jnp.zeros([], jnp.float32)))
        counts = max_similar is not None and jax.tree.leaves(state)
        return state, _spikes.no_values() if counts else ()

    def first(judged, optimizer_state):
        (norm_rule, norms), (loss_rule, losses) = memories(by_norm), memories(by_loss)
        return SkipState(
            optimizer_state=optimizer_state,
            norm_rule_state=norm_rule,
            loss_rule_state=loss_rule,
            offered_norms=norms,
            offered_losses=losses,
            recent_skips=jnp.zeros(_spikes.RECENT, jnp.int32),
            recent_fraction=states.scalar(0.0),
            recent_since=states.scalar(-1, jnp.int32),
            offered_steps=count(),
            skipped_steps=count(),
            spike_steps=count(),
            skipped_run=count(),
            spike_run=count(),
            offered_norm=states.scalar(0.0),
            offered_loss=states.scalar(0.0),
            skip_above=states.scalar(0.0),
            skip_loss_above=states.scalar(0.0),
            last_bad=BadSteps(
                bad_step=jnp.full(keep_last, -1, jnp.int32),
                bad_norm=jnp.zeros(keep_last, jnp.float32),
                bad_loss=jnp.zeros(keep_last, jnp.float32),
                bad_leaf=jnp.zeros(keep_last, jnp.int32),
                bad_kinds=jnp.zeros((keep_last, 3), jnp.int32),
            ),
            nonfinite=states.init_nonfinite(pytrees.leaves_of(judged).paths),
        )

    def init_fn(params) -> Any:
        judged = _masks.kept(_masks.selected(mask, params), params)
        return first(judged, inner.init(params))

    def update_fn(updates, state, params=None, *, loss=None, **extra_args) -> Any:
        judged = _masks.kept(_masks.selected(mask, updates), updates)
        found, inside = pytrees.leaves_of(judged), ("optimizer_state",)
        state = states.validate_state(
            state, lambda: first(judged, ()), foreign=inside, absent=found.absent
        )
        if not jax.tree.leaves(updates):  # an empty group of a partition
            inside = state.optimizer_state
            out, inside = inner.update(updates, inside, params, **extra_args)
            steps = optax.safe_increment(state.offered_steps)
            return out, state._replace(optimizer_state=inside, offered_steps=steps)
        if found.leaves:
            measured, norm = group_norms.measure_leaves(
                judged, found, order=order, axis_name=axis_name
            )
        else:  # only the loss is judged
            nothing, norm = jnp.zeros(1, jnp.float32), jnp.zeros([], jnp.float32)
            measured = group_norms.Measured(
                (nothing,), (nothing,), jnp.zeros((1, 3), bool)
            )
        norm = states.to_finite_f32(norm)
        step, paths = state.offered_steps, found.paths
        loss = extra_args.get("value") if loss is None else loss
        given, level = loss is not None, states.scalar(0.0)
        if given:
            level = _spikes.mean_loss(loss, loss_axis_name)
        nonfinite = jnp.any(measured.kinds)
        bad = nonfinite | ~jnp.isfinite(level)
        due = jnp.zeros([], bool)
        if max_consecutive is not None:
            due = state.spike_run >= max_consecutive

        def verdict(rule, value, rule_state, recent, signed):
            """Returns the rule's verdict, whether it restarts, and the new history."""
            said = _spikes.judge(
                rule,
                value,
                rule_state,
                recent,
                step,
                signed=signed,
                max_similar=max_similar,
            )
            restart = said.spike & due & bool(jax.tree.leaves(rule_state))
            if not isinstance(recent, tuple):
                kept = jnp.isfinite(value)
                recent = states.tree_where(kept, pushed(recent, value), recent)
            return said, restart, recent

        def recorded(rule, value, old, said, restart):
            again = _spikes.restarted(rule, value, step)
            after = states.tree_where(restart, again, said.after)
            return states.tree_where(skip, old, after)

        old_norms, old_losses = state.norm_rule_state, state.loss_rule_state
        norm_said, norm_restart, norms = verdict(
            by_norm, norm, old_norms, state.offered_norms, False
        )
        spike = norm_said.spike & ~norm_restart
        loss_said, loss_restart, losses = None, None, state.offered_losses
        if given and by_loss is not None:
            loss_said, loss_restart, losses = verdict(
                by_loss, level, old_losses, losses, True
            )
            spike |= loss_said.spike & ~loss_restart
        spike &= ~bad
        skip = bad | spike
        norm_rule = recorded(by_norm, norm, old_norms, norm_said, norm_restart)
        loss_rule, loss_above = old_losses, states.scalar(0.0)
        if by_loss is not None and loss_said is not None:
            loss_above = states.to_finite_f32(loss_said.threshold)
            loss_rule = recorded(by_loss, level, old_losses, loss_said, loss_restart)
        # Otherwise, XLA on CPU materializes intermediate values that the norms and the
        # optimizer share, such as squares.
        updates = sharding.kept_apart_on_cpu(updates)
        out, after = _holding.update_unless(
            skip, inner, updates, state.optimizer_state, params, extra_args
        )

        worst = _worst(measured.norm[0], measured.kinds)
        # Selected by comparison instead of indexing: if the gradients are constants of
        # a `jax.lax.scan`, XLA on GPU fails to compile an index that depends on them
        # through a barrier.
        here = np.arange(len(measured.kinds), dtype=np.int32) == worst
        kinds = jnp.any(measured.kinds & here[:, None], axis=0)
        if paths and state.nonfinite.leaf_code.size != len(paths):
            rows = states.row_numbers(state.nonfinite, paths)
            worst = jnp.sum(jnp.where(here, rows, 0), dtype=jnp.int32)
        worst = jnp.where(nonfinite | norm_said.spike, worst, -1)
        noted = BadSteps(step, norm, level, worst, kinds)
        last_bad = jax.tree.map(pushed, state.last_bad, noted)
        run = {"skipped_run": skip, "spike_run": spike}
        runs = {k: _counted(getattr(state, k), flag) for k, flag in run.items()}
        return out, SkipState(
            optimizer_state=after,
            norm_rule_state=norm_rule,
            loss_rule_state=loss_rule,
            offered_norms=norms,
            offered_losses=losses,
            offered_steps=_counted(step, jnp.ones([], bool)),
            skipped_steps=_counted(state.skipped_steps, skip),
            spike_steps=_counted(state.spike_steps, spike),
            offered_norm=states.tree_copy(norm),
            offered_loss=states.tree_copy(level),
            skip_above=states.to_finite_f32(norm_said.threshold),
            skip_loss_above=loss_above,
            last_bad=states.tree_where(skip, last_bad, state.last_bad),
            nonfinite=states.record_nonfinite(
                state.nonfinite, measured.kinds, nonfinite, step, paths
            ),
            **states.tree_where(skip, runs, jax.tree.map(jnp.zeros_like, runs)),
            **_recent(state, skip),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
