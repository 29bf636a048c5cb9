"""Leaving bad steps out: an optimizer whose state they never reach."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optclip import _checks, _engine, _measure, _state, _trees, rules
from optclip._checks import EUCLIDEAN, Static
from optclip._state import BadSteps, SkipState

__all__ = ["BadSteps", "SkipState", "skip_steps"]

IN_A_ROW, KEPT = Static(10), Static(8)
NEAR = 2.0**-20


def _worst(norms: jax.Array, entries: jax.Array) -> jax.Array:
    """Returns the number of the leaf with most bad entries, or the largest norm."""
    counts = jnp.sum(entries, axis=1)
    by_norm = jnp.argmax(jnp.where(jnp.isfinite(norms), norms, 0.0))
    worst = jnp.where(jnp.any(counts > 0), jnp.argmax(counts), by_norm)
    return worst.astype(jnp.int32)


def _mean_loss(loss: Any, names: Any) -> jax.Array:
    """Returns the loss, averaged over the devices on which it differs."""
    try:
        loss = jnp.asarray(loss)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`loss` must be a real scalar, got {loss!r}.") from error
    if loss.ndim or jnp.iscomplexobj(loss):
        raise ValueError(
            f"`loss` must be a real scalar, got {loss.dtype} of shape {loss.shape}."
        )
    if jnp.issubdtype(loss.dtype, jnp.floating):
        loss = _measure.widen(loss)
    loss = _state.figures(loss)
    names = _trees.varying(loss) if names is None else names
    return lax.pmean(loss, names) if names else loss


class _Verdict(NamedTuple):
    over: jax.Array
    threshold: jax.Array
    after: Any


def _judge(
    rule: rules.Rule, value: jax.Array, state: Any, step: jax.Array, signed: bool
) -> _Verdict:
    """Asks the rule whether ``value`` is a spike, and what it would remember of it."""

    def no_params():
        raise ValueError("`when` must be a rule that does not look at the parameters.")

    fine = jnp.where(jnp.isfinite(value), value, 0.0)
    context = rules.Context(step, fine, no_params)
    limit, after = _engine.apply_rule(rule, fine, state, context, signed=signed)
    bound = jnp.asarray(limit.threshold).astype(fine.dtype)
    # What is above by rounding only is no spike: a constant is not above its own mean.
    over = ~(fine - bound <= NEAR * jnp.abs(bound))
    after = jax.tree.map(lambda old, new: new.astype(old.dtype), state, after)
    return _Verdict(over, bound, after)


def skip_steps(
    optimizer: optax.GradientTransformation,
    *,
    when: Any = None,
    max_consecutive: Any = IN_A_ROW,
    keep_last: Any = KEPT,
    ord: float | str = EUCLIDEAN,
    axis_name: Any = None,
    loss_axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that bad steps leave no trace in it.

    A step is left out if its gradients or its loss hold NaN or inf, or if the norm of
    its gradients is a spike: above the threshold of the rule ``when``, by more than
    rounding, a millionth of it. So is a loss, by a rule that fits numbers which may be
    negative: of those of this library `rules.window_sigma`, the default.

    The updates of such a step are zeros, and the optimizer's state, with its count of
    steps, stays as it was: bitwise as if the batch had never been. The rule remembers
    no such step either.

    | ``when``                                  | as                                  |
    | ----------------------------------------- | ----------------------------------- |
    | `rules.window_sigma(6.0, unbiased=True)`  | OLMo-core, MaxText; what None means |
    | `rules.window_sigma(6.0)`                 | Levanter                            |
    | a number                                  | paxml                               |
    | inf                                       | only NaN and inf                    |

    They, unlike this, let a spike or a NaN into their history. After
    ``max_consecutive`` spikes without a step taken, what looked like spikes is how
    things are now: a rule with a memory begins anew, and that step is taken. A number
    remembers nothing, and stays the bound that it is. A step that is not finite is
    never taken, and does not count.

    Give the loss as an extra argument: ``update(grads, state, params, loss=loss)``, or
    as Optax calls it, ``value=loss``, which the optimizer inside is given too; ``loss``
    ends here, even if that is another `skip_steps`. Around `optax.MultiSteps` a bad
    microbatch is left out, within it a bad mean.

    A rule knows no spike before it knows what is usual: by default, in the first 64
    steps, and in the 64 after it began anew. Chain a clip inside for these: a finite
    gradient of 1e25 would make Adam's squares infinite for good.

    Args:
        optimizer: An Optax optimizer, with its clip. Put this inside of
            `optax.lookahead`, not around it: its parameters come in pairs.
        when: A rule of `optclip.rules`, a number, an array or a schedule.
        max_consecutive: Spikes after which the rule begins anew; at least 1. None:
            never.
        keep_last: How many of the last bad steps are kept in the state, at least 1.
        ord: The norm's order: a number of at least 1, inf or "rms".
        axis_name: As in `optclip.clip`.
        loss_axis_name: Inside `jax.pmap`, or `jax.shard_map` with ``check_vma=False``,
            the mesh axes along which each device has a loss of its own: their mean is
            judged, or devices would decide differently. Elsewhere types tell.

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
    rule = rules.as_rule(when, "when")
    by_loss = rule.signed
    if max_consecutive is not None:
        max_consecutive = _checks.size("max_consecutive", max_consecutive)
    keep_last = _checks.size("keep_last", keep_last)
    order = _checks.order(ord)

    def count():
        return _state.scalar(0, jnp.int32)

    def first(params, optimizer_state):
        zero = jnp.zeros([], jnp.float32)
        return SkipState(
            optimizer_state=optimizer_state,
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
                bad_entries=jnp.zeros((keep_last, 3), jnp.int32),
            ),
            seen=_state.first_seen(_trees.leaves_of(params).paths),
        )

    def init_fn(params) -> Any:
        return first(params, inner.init(params))

    def update_fn(updates, state, params=None, *, loss=None, **extra_args) -> Any:
        def empty():
            return first(updates, ())

        found, inside = _trees.leaves_of(updates), ("optimizer_state",)
        state = _state.own(state, empty, foreign=inside, absent=found.absent)
        if not found.leaves:  # an empty group of a partition
            inside = state.optimizer_state
            out, inside = inner.update(updates, inside, params, **extra_args)
            count = state.offered_steps + 1
            return out, state._replace(optimizer_state=inside, offered_steps=count)
        measured, norm = _measure.measure_leaves(
            updates, found, order=order, axis_name=axis_name
        )
        norm = _state.figures(norm)
        step, paths = state.offered_steps, found.paths
        loss = extra_args.get("value") if loss is None else loss
        given, level = loss is not None, _state.scalar(0.0)
        if given:
            level = _mean_loss(loss, loss_axis_name)
        bad_entries = jnp.any(measured.entries > 0)
        bad = bad_entries | ~jnp.isfinite(level)

        about_norm = _judge(rule, norm, state.norm_rule_state, step, False)
        about_loss, loss_bound = about_norm, _state.scalar(0.0)
        spike = about_norm.over
        if given and by_loss:
            about_loss = _judge(rule, level, state.loss_rule_state, step, True)
            spike |= about_loss.over
            loss_bound = about_loss.threshold
        spike &= ~bad
        anew = jnp.zeros([], bool)
        if max_consecutive is not None and jax.tree.leaves(state.norm_rule_state):
            anew = spike & (state.spike_run >= max_consecutive)
        spike &= ~anew
        skip = bad | spike

        def remembered(about, value, old):
            zero = jnp.zeros([], jnp.float32)
            again = _judge(rule, value, rule.init(zero), step, True).after
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
        counts = measured.entries[worst]
        if state.seen.leaf_code.size != len(paths):
            worst = _state.row_numbers(state.seen, paths)[worst]
        worst = jnp.where(bad_entries | about_norm.over, worst, -1)
        noted = (step, norm, level, worst, counts)
        last_bad = BadSteps(*(
            jnp.asarray(ring).at[place].set(value.astype(ring.dtype), mode="drop")
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
            offered_norm=_state.copied(norm),
            offered_loss=_state.copied(level),
            skip_above=_state.finite_threshold(about_norm.threshold),
            skip_loss_above=_state.finite_threshold(loss_bound),
            last_bad=last_bad,
            seen=_state.look(state.seen, measured.entries, bad_entries, step, paths),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
