"""Leaving bad steps out: an optimizer whose state they never reach."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optclip import _checks, _engine, _layouts, _measure, _state, _trees, rules
from optclip._checks import EUCLIDEAN, Static
from optclip._state import Seen

__all__ = ["BadSteps", "SkipState", "skip_steps"]

IN_A_ROW, KEPT = Static(10), Static(8)


class BadSteps(NamedTuple):
    """The last steps that were left out, in a ring.

    Attributes:
        bad_step: int32[K]. Their numbers, where the first step is number 0; -1 where
            there was none yet.
        bad_norm: float32[K]. Norms of their gradients, perhaps NaN or inf.
        bad_loss: float32[K]. Their losses; 0 where none was given.
        bad_leaf: int32[K]. Number of the worst leaf: the one with most NaN and inf,
            else the one with the largest norm; -1 where only the loss was bad.
    """

    bad_step: jax.Array
    bad_norm: jax.Array
    bad_loss: jax.Array
    bad_leaf: jax.Array


class SkipState(NamedTuple):
    """State of `skip_steps`.

    Attributes:
        optimizer_state: State of the optimizer inside, as no bad step had been.
        norm_rule_state: What the rule remembers of the norms.
        loss_rule_state: What it remembers of the losses.
        offered_steps: int32 scalar. Steps so far, those left out included.
        skipped_steps: int32 scalar. Steps left out, for whatever reason.
        spike_steps: int32 scalar. Steps left out though all was finite.
        skipped_run: int32 scalar. Steps left out in a row until now.
        spike_run: int32 scalar. Spikes left out since the last step that was taken.
        offered_norm: float32 scalar. Norm of the last gradients; 0 at first.
        offered_loss: float32 scalar. The last loss; 0 where none was given.
        skip_above: float32 scalar. The last bound on the norm; 0 at first.
        skip_loss_above: float32 scalar. The last bound on the loss; 0 where none was.
        last_bad: A `BadSteps`.
        seen: A `Seen`: the non-finite entries.
    """

    optimizer_state: Any
    norm_rule_state: Any
    loss_rule_state: Any
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
    seen: Seen


def _worst(norms: jax.Array, entries: jax.Array) -> jax.Array:
    """Returns the number of the leaf with most bad entries, or the largest norm."""
    counts = jnp.sum(entries, axis=1)
    by_norm = jnp.argmax(jnp.where(jnp.isfinite(norms), norms, 0.0))
    worst = jnp.where(jnp.any(counts > 0), jnp.argmax(counts), by_norm)
    return worst.astype(jnp.int32)


def _mean_loss(loss: Any, updates: list, plan: Any) -> jax.Array:
    """Returns the loss, the same on all devices: each must decide alike."""
    loss = jnp.asarray(loss).astype(jnp.float32)
    if loss.ndim:
        raise ValueError(f"`loss` must be a scalar, got the shape {loss.shape}.")
    names = _trees.varying(loss)
    if not names and not any(map(_trees.varying, updates)):  # types tell of no axes
        names = tuple(sorted({n for each in plan.everywhere for n in each}))
    return lax.pmean(loss, names) if names else loss


class _Verdict(NamedTuple):
    over: jax.Array
    threshold: jax.Array
    after: Any


def _judge(rule: rules.Rule, value: jax.Array, state: Any, step: jax.Array) -> _Verdict:
    """Asks the rule whether ``value`` is a spike, and what it would remember of it."""

    def no_params():
        raise ValueError("`when` must be a rule that does not look at the parameters.")

    fine = jnp.where(jnp.isfinite(value), value, 0.0)
    context = rules.Context(step, fine, no_params)
    limit, after = _engine.apply_rule(rule, fine, state, context, signed=True)
    return _Verdict(fine > limit.threshold, jnp.asarray(limit.threshold), after)


def skip_steps(
    optimizer: optax.GradientTransformation,
    *,
    when: Any = None,
    max_consecutive: Any = IN_A_ROW,
    keep_last: Any = KEPT,
    ord: float | str = EUCLIDEAN,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that bad steps leave no trace in it.

    A step is left out if its gradients or its loss hold NaN or inf, or if the norm of
    its gradients or its loss is a spike: above the threshold of the rule ``when``. Its
    updates are zeros, and the optimizer's state, with its count of steps, stays as it
    was: bitwise as if the batch had never been. The rule remembers no such step either.

    | ``when``                                  | as                                  |
    | ----------------------------------------- | ----------------------------------- |
    | `rules.window_sigma(6.0, unbiased=True)`  | OLMo-core, MaxText; what None means |
    | `rules.window_sigma(6.0)`                 | Levanter                            |
    | a number, for the norm alone              | paxml                               |
    | inf                                       | only NaN and inf                    |

    They, unlike this, let a spike or a NaN into their history. After
    ``max_consecutive`` spikes without a step taken, what looked like spikes is how
    things are now: the rule begins anew, and that step is taken. A step that is not
    finite is never taken, and does not count.

    Give the loss as an extra argument: ``update(grads, state, params, loss=loss)``, or
    ``value=loss``, as Optax calls it. It is handed on to the optimizer too. Around
    `optax.MultiSteps` a bad microbatch is left out, within it a bad mean.

    A rule knows no spike before it knows what is usual: by default, in the first 64
    steps, and in the 64 after it began anew. Chain a clip inside for these.

    Args:
        optimizer: Any Optax optimizer, with its clip.
        when: A rule of `optclip.rules`, a number, an array or a schedule.
        max_consecutive: Spikes after which the rule begins anew; at least 1. None:
            never.
        keep_last: How many of the last bad steps are kept in the state, at least 1.
        ord: The norm's order: a number of at least 1, inf or "rms".
        axis_name: As in `optclip.clip`; all devices decide alike.

    Returns:
        A transformation with `SkipState`. Read it with `optclip.metrics` and
        `optclip.culprits`.

    Raises:
        TypeError: If ``optimizer`` is no transformation.
        ValueError: If a number is out of range, or ``loss`` is no scalar.

    Example:
        >>> import jax.numpy as jnp, optax, optclip
        >>> tx = optclip.skip_steps(optax.chain(optclip.clip(1.0), optax.adam(1e-3)))
        >>> params = jnp.ones(2)
        >>> grads = jnp.array([jnp.nan, 1.0])
        >>> updates, state = tx.update(grads, tx.init(params), params, loss=0.5)
        >>> updates.tolist(), int(optclip.metrics(state)["skip/skipped_steps"])
        ([0.0, 0.0], 1)

    Reference:
        OLMo et al., 2 OLMo 2 Furious, 2024, https://arxiv.org/abs/2501.00656
    """
    inner: Any = _checks.transformation(optimizer=optimizer)
    if when is None:
        when = rules.window_sigma(6.0, unbiased=True)
    by_loss = isinstance(when, rules.Rule)  # a number is in the unit of the norm
    rule = rules.as_rule(when, "when")
    if max_consecutive is not None:
        max_consecutive = _checks.size("max_consecutive", max_consecutive)
    keep_last = _checks.size("keep_last", keep_last)
    order = _checks.order(ord)

    def count():
        return _state.scalar(0, jnp.int32)

    def init_fn(params) -> Any:
        zero = jnp.zeros([], jnp.float32)
        return SkipState(
            optimizer_state=inner.init(params),
            norm_rule_state=_state.copied(rule.init(zero)),
            loss_rule_state=_state.copied(rule.init(zero)) if by_loss else (),
            offered_steps=count(),
            skipped_steps=count(),
            spike_steps=count(),
            skipped_run=count(),
            spike_run=count(),
            offered_norm=_state.scalar(0.0),
            offered_loss=_state.scalar(0.0),
            skip_above=_state.scalar(0.0),
            skip_loss_above=_state.scalar(0.0),
            last_bad=BadSteps(
                bad_step=jnp.full(keep_last, -1, jnp.int32),
                bad_norm=jnp.zeros(keep_last, jnp.float32),
                bad_loss=jnp.zeros(keep_last, jnp.float32),
                bad_leaf=jnp.zeros(keep_last, jnp.int32),
            ),
            seen=_state.first_seen(_trees.leaves_of(params).paths),
        )

    def measure(updates):
        found = _trees.leaves_of(updates)
        layout = _layouts.pooled(range(len(found.leaves)), found.leaves)
        measured, counts, plan = _measure.measure_layout(
            updates, found, layout, order=order, axis_name=axis_name
        )
        whole = _measure.total(measured.norm, counts, order, plan)
        return found.leaves, measured, whole, plan

    def update_fn(updates, state, params=None, *, loss=None, **extra_args) -> Any:
        if not isinstance(state, SkipState):
            raise TypeError(
                "`state` must be the `SkipState` that `init` returned, got a "
                f"{type(state).__name__}. Call `init` anew after a change of optimizer."
            )
        if not _trees.leaves_of(updates).leaves:
            raise ValueError(
                "`updates` has no leaf of real or complex numbers: `skip_steps` has "
                "nothing to judge a step by. Pass the gradients."
            )
        leaves, measured, norm, plan = measure(updates)
        step = state.offered_steps
        if loss is not None:
            extra_args["loss"] = loss
        loss = extra_args.get("value") if loss is None else loss
        given, level = loss is not None, _state.scalar(0.0)
        if given:
            level = _mean_loss(loss, leaves, plan)
        bad_entries = jnp.any(measured.entries > 0)
        bad = bad_entries | ~jnp.isfinite(level)

        about_norm = _judge(rule, norm, state.norm_rule_state, step)
        about_loss, loss_bound = about_norm, _state.scalar(0.0)
        spike = about_norm.over
        if given and by_loss:
            about_loss = _judge(rule, level, state.loss_rule_state, step)
            spike |= about_loss.over
            loss_bound = about_loss.threshold
        spike &= ~bad
        anew = jnp.zeros([], bool)
        if max_consecutive is not None:
            anew = spike & (state.spike_run >= max_consecutive)
        spike &= ~anew
        skip = bad | spike

        def remembered(about, value, old):
            zero = jnp.zeros([], jnp.float32)
            again = _judge(rule, value, rule.init(zero), step).after
            after = _state.chosen(anew, again, about.after)
            return _state.chosen(skip, old, after)

        loss_state = state.loss_rule_state
        if given and by_loss:
            loss_state = remembered(about_loss, level, loss_state)
        out, after = inner.update(updates, state.optimizer_state, params, **extra_args)
        out = jax.tree.map(lambda u: jnp.where(skip, jnp.zeros_like(u), u), out)

        one = skip.astype(jnp.int32)
        place = jnp.where(skip, state.skipped_steps % keep_last, keep_last)
        worst = _worst(measured.norm[0], measured.entries)
        worst = jnp.where(bad_entries | about_norm.over, worst, -1)
        noted = (step, norm, level, worst)
        last_bad = BadSteps(*(
            ring.at[place].set(value.astype(ring.dtype), mode="drop")
            for ring, value in zip(state.last_bad, noted, strict=True)
        ))  # fmt: skip
        spikes = spike.astype(jnp.int32)
        return out, SkipState(
            optimizer_state=_state.chosen(skip, state.optimizer_state, after),
            norm_rule_state=remembered(about_norm, norm, state.norm_rule_state),
            loss_rule_state=loss_state,
            offered_steps=step + 1,
            skipped_steps=state.skipped_steps + one,
            spike_steps=state.spike_steps + spikes,
            skipped_run=(state.skipped_run + 1) * one,
            spike_run=(state.spike_run + spikes) * one,
            offered_norm=_state.figures(norm),
            offered_loss=_state.figures(level),
            skip_above=_state.figures(about_norm.threshold),
            skip_loss_above=_state.figures(loss_bound),
            last_bad=last_bad,
            seen=_state.look(state.seen, measured.entries, bad_entries, step),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
