"""Stabilizes any optimizer with no threshold to tune."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optclip import scopes
from optclip._engine import power_sums, pytrees, scaling, validation
from optclip._engine import state as states
from optclip._engine.scale_invariance import ignores_scale
from optclip._engine.state import ClipState
from optclip.methods.cap_update import cap_update
from optclip.methods.quantile import quantile_clip
from optclip.wrappers import _holding, _masks

__all__ = ["StabilizeState", "stabilize"]

# If the norm falls by this factor during the warm-up, the first steps were bad. Adam
# recovers from a smaller fall by itself: three gradients that are five times too large
# slow it down by a few percent, but three that are ten times too large slow it down by
# a whole learning rate schedule.
FALL = 5.0
# Below 1.8e19, the square root of the largest float32, beyond which the square of a
# gradient overflows.
LARGEST_NORM = 1e18
# Weight of the last norm in the running average, once there are enough norms: the
# average follows norms that fall by a tenth in every step to within a factor of e.
NORM_WEIGHT = 0.1
# Largest fall of the average's logarithm per step after the ramp, a factor of e in 500
# steps. Updates of Adam shrink while its gradients fall faster than its memory of a
# thousand steps, which lets training converge at a constant learning rate. An average
# that follows them at once would prevent this.
NORM_FALL = 0.002
# Lower bound on the norm. It keeps the factor exp(-log_norm) finite.
LEAST = 1e-30
# The initial `least_norm`: every recorded norm is below it.
NO_NORM = float(jnp.finfo(jnp.float32).max)


class StabilizeState(NamedTuple):
    """State of `stabilize`.

    Attributes:
        gradient_clip: `ClipState` of the quantile clip, named `clip` in the metrics.
        optimizer_state: State of the wrapped optimizer.
        update_cap: `ClipState` of the cap on the update, named `clip_2` in the metrics.
        least_norm: float32 scalar. The smallest nonzero norm among the steps taken;
            initially the largest float32.
        taken_steps: int32 scalar. Number of steps taken, up to 2**31 - 1.
        skipped_run: int32 scalar. Number of consecutive steps skipped so far, up to
            2**31 - 1.
        restarts: int32 scalar. Number of times the optimizer restarted after a bad
            start.
        log_norm: float32 scalar. Running average of the natural logarithm of the
            clipped norm.
        averaged_norms: int32 scalar. Number of norms in ``log_norm``, up to 2**31 - 1.
        normalizes: int32 scalar. 1 if the gradients are divided by exp(log_norm), 0 if
            they are not.
    """

    gradient_clip: ClipState
    optimizer_state: Any
    update_cap: ClipState
    least_norm: jax.Array
    taken_steps: jax.Array
    skipped_run: jax.Array
    restarts: jax.Array
    log_norm: jax.Array
    averaged_norms: jax.Array
    normalizes: jax.Array


def _counted(count: jax.Array, flag: jax.Array) -> jax.Array:
    return jnp.where(flag, optax.safe_increment(count), count)


def _averaged(state, norm, counts, restart, ramp_steps) -> tuple[jax.Array, jax.Array]:
    """Returns (log_norm, averaged_norms) after a step with this norm.

    The average is an arithmetic mean at first, whose memory grows to ten steps. After
    ``ramp_steps`` steps, it falls slowly.
    """
    number: Any = optax.safe_increment(jnp.where(restart, 0, state.averaged_norms))
    weight = jnp.maximum(NORM_WEIGHT, 1 / number.astype(jnp.float32))
    norm = jnp.maximum(states.to_finite_f32(norm), LEAST)
    change = weight * (jnp.log(norm) - state.log_norm)
    slow = number > jnp.maximum(ramp_steps, 1)
    change = jnp.where(slow, jnp.maximum(change, -NORM_FALL), change)
    average = jnp.where(counts, state.log_norm + change, state.log_norm)
    return average, jnp.where(counts, number, state.averaged_norms)


def _times(leaf: Any, factor: jax.Array) -> Any:
    """Returns a leaf times a float32 scalar, in the dtype of the leaf."""
    if not pytrees.is_measured(leaf):
        return leaf
    wide: Any = power_sums.widen(leaf)
    product = wide * factor.astype(jnp.finfo(wide.dtype).dtype)
    # A product with 1 would flush subnormal numbers.
    return scaling.cast_output(jnp.where(factor == 1, wide, product), leaf, None)


def _has_hyperparams(node: Any) -> bool:
    return {"hyperparams", "inner_state"} <= set(getattr(node, "_fields", ()))


def _started_again(inner: Any, params: Any, old: Any) -> Any:
    """Returns the optimizer's initial state, with the hyperparameters of ``old``.

    A training loop may have changed the hyperparameters in the state of
    `optax.inject_hyperparams`.
    """
    fresh = inner.init(params)

    def keep(new, before):
        if not _has_hyperparams(new):
            return new
        kept = jax.tree.map(
            keep, new.inner_state, before.inner_state, is_leaf=_has_hyperparams
        )
        return new._replace(hyperparams=before.hyperparams, inner_state=kept)

    return jax.tree.map(keep, fresh, old, is_leaf=_has_hyperparams)


def stabilize(
    optimizer: optax.GradientTransformation,
    *,
    quantile: jax.typing.ArrayLike = 0.1,
    margin: jax.typing.ArrayLike = 2.0,
    rate: jax.typing.ArrayLike = 0.05,
    warmup_steps: jax.typing.ArrayLike = 5,
    max_ratio: jax.typing.ArrayLike = 0.04,
    floor: jax.typing.ArrayLike | None = None,
    ramp_steps: jax.typing.ArrayLike = 200,
    normalize: bool | None = None,
    scope: scopes.Scope = scopes.tree(),
    mask: Any = None,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that neither bad batches nor large steps derail it.

    It adds five guards, none of which has a threshold in the units of the gradients:

    1. The gradients are clipped to ``margin`` times a low quantile of the previous
       norms (`quantile_clip`). This guards against bad batches at any loss scale.
    2. If the updates of the optimizer do not depend on the scale of the gradients, as
       in Adam, Lion and Muon, the clipped gradients are divided by a running geometric
       mean of their norms. After ``ramp_steps`` steps, the mean falls by at most a
       factor of e in 500 steps. This guards against gradients that are large at the
       start of training: without it, they would stay in the second moment of Adam for
       a thousand steps.
    3. A step whose gradients contain NaN or inf, or whose clipped norm is above 1e18,
       is skipped: its updates are zeros, and the optimizer's state is unchanged.
    4. If a norm in the first ``warmup_steps`` steps falls below a fifth of the smallest
       previous norm, the earlier steps are treated as bad. The optimizer restarts at
       this step from the state that its ``init`` returns for the current parameters.
       This also resets its step count and therefore delays any learning rate schedule
       by at most ``warmup_steps`` steps. The hyperparameters of
       `optax.inject_hyperparams` are kept.
    5. The root mean square of the final update is capped at ``max_ratio`` times the
       root mean square of the parameters (`cap_update`). The cap rises linearly in the
       first ``ramp_steps`` steps, and updates that exceed it persistently are divided
       by their average excess. This guards against a learning rate that is too high.

    The clip and the cap each handle failures that the other does not. In the metrics,
    they are the first and the last clip: `clip` and `clip_2`, unless the wrapped
    optimizer contains clips of its own.

    An optimizer that searches for its own step size, such as `optax.lbfgs`, makes
    little progress under the cap: pass ``max_ratio=jnp.inf``.

    Args:
        optimizer: Any Optax optimizer, including its learning rate.
        quantile: As in `quantile_clip`.
        margin: As in `quantile_clip`.
        rate: As in `quantile_clip`.
        warmup_steps: As in `quantile_clip`; also the number of initial steps during
            which the optimizer may restart.
        max_ratio: The ratio of `cap_update`; inf disables the cap.
        floor: As in `cap_update`.
        ramp_steps: As in `cap_update`; also the number of steps in which the
            running mean of the norms may fall quickly.
        normalize: Whether to divide the gradients by a running mean of their norms.
            None means to do so if the updates of the optimizer do not depend on the
            scale of the gradients. ``init`` tests this by running the optimizer for
            four steps on small arrays with the structure of ``params``. If all four
            updates are zeros, or ``update`` raises an error, the gradients are not
            divided.
        scope: Which entries share one norm, in both the clip and the cap:
            `optclip.scopes.tree()`, or `optclip.scopes.leaf()` for one quantile and one
            cap per leaf.
        mask: Which leaves are clipped and capped, as in `optax.masked`: a pytree of
            booleans with the structure of the updates or a prefix of it, or a function
            of the updates that returns one. The other leaves, such as frozen
            parameters, are not measured and pass through unchanged.
        axis_name: As in `optclip.clip_by_rule`.

    Returns:
        A gradient transformation whose state is a `StabilizeState`. Its ``update``
        requires ``params``. It is the complete optimizer: do not chain anything after
        it. `optclip.step_taken` returns whether the last step was taken.

    Raises:
        TypeError: If ``mask`` contains anything other than booleans, or ``normalize``
            is neither a boolean nor None.
        ValueError: If an argument is out of range, ``params`` are missing, or ``mask``
            does not fit the updates.

    Example:
        >>> import jax.numpy as jnp, optax, optclip
        >>> tx = optclip.stabilize(optax.adamw(1e-3))
        >>> params = jnp.ones(3)
        >>> updates, state = tx.update(jnp.ones(3), tx.init(params), params)
        >>> sorted(optclip.metrics(state))[:2]
        ['clip/clipped', 'clip/clipped_fraction']
    """
    inner: Any = validation.transformation(optimizer=optimizer)
    validation.non_negative(max_ratio=max_ratio)
    if normalize is not None and not isinstance(normalize, (bool, np.bool_)):
        raise TypeError(
            f"`normalize` must be True, False or None, got {normalize!r}. None lets "
            "`init` test whether the optimizer ignores the scale of its gradients."
        )
    _masks.check(mask)
    first: Any = quantile_clip(
        quantile,
        margin=margin,
        rate=rate,
        warmup_steps=warmup_steps,
        scope=scope,
        nonfinite="skip",
        axis_name=axis_name,
    )
    last: Any = cap_update(
        max_ratio,
        floor=floor,
        ramp_steps=ramp_steps,
        scope=scope,
        nonfinite="skip",
        axis_name=axis_name,
    )
    return guarded(inner, first, last, warmup_steps, ramp_steps, normalize, mask)


def guarded(
    inner: Any,
    first: Any,
    last: Any,
    warmup_steps: Any,
    ramp_steps: Any,
    normalize: bool | None,
    mask: Any,
) -> optax.GradientTransformationExtraArgs:
    """Returns ``inner`` wrapped in a clip of its gradients and a cap on its updates."""

    def own(clip, optimizer_state, cap, normalizes: Any = False):
        return StabilizeState(
            gradient_clip=clip,
            optimizer_state=optimizer_state,
            update_cap=cap,
            least_norm=states.scalar(NO_NORM),
            taken_steps=states.scalar(0, jnp.int32),
            skipped_run=states.scalar(0, jnp.int32),
            restarts=states.scalar(0, jnp.int32),
            log_norm=states.scalar(0.0),
            averaged_norms=states.scalar(0, jnp.int32),
            normalizes=states.scalar(normalizes, jnp.int32),
        )

    def init_fn(params) -> Any:
        clipped = _masks.kept(_masks.selected(mask, params), params)
        normalizes = normalize
        if normalizes is None:
            normalizes = ignores_scale(inner, params)
        parts = first.init(clipped), inner.init(params), last.init(clipped)
        return own(*parts, normalizes)

    def update_fn(updates, state, params=None, **extra_args) -> Any:
        if params is None:
            raise ValueError(
                "`stabilize` compares the update with the parameters, but `params` is "
                "None: call `update(grads, state, params)` instead of "
                "`update(grads, state)`. For a training loop that you can't change, "
                "the documentation has a wrapper that keeps the parameters: see "
                '"Bad steps".'
            )
        # The clips and the optimizer validate their own states.
        parts = ("gradient_clip", "optimizer_state", "update_cap")
        state = states.validate_state(state, lambda: own((), (), ()), parts)
        clip_state: Any
        cap_state: Any
        flags = _masks.selected(mask, updates)
        clipped, clip_state = first.update(
            _masks.kept(flags, updates), state.gradient_clip, params
        )
        norm = states.to_finite_f32(clip_state.norm_before)
        bad = ~jnp.isfinite(norm)
        # If an optimizer squared such a gradient, its second moment would be infinite
        # permanently.
        bad |= clip_state.norm_after > LARGEST_NORM
        counts = ~bad & (norm > 0)
        restart = counts & (state.taken_steps < warmup_steps)
        restart &= (state.least_norm < NO_NORM) & (norm < state.least_norm / FALL)
        log_norm, averaged = _averaged(
            state, clip_state.norm_after, counts, restart, ramp_steps
        )
        factor = jnp.where(state.normalizes > 0, jnp.exp(-log_norm), 1.0)
        clipped = jax.tree.map(lambda g: _times(g, factor), clipped)
        clipped = _masks.restored(flags, clipped, updates)

        again = _started_again(inner, params, state.optimizer_state)
        before = states.tree_where(restart, again, state.optimizer_state)
        out, after = _holding.update_unless(
            bad, inner, clipped, before, params, extra_args
        )
        if isinstance(out, optax.LookaheadParams):
            raise ValueError(
                "`stabilize` can't wrap `optax.lookahead`, whose updates come in "
                "pairs. Use it inside: `optax.lookahead(optclip.stabilize(...), ...)`."
            )
        # Integer leaves must pass through unchanged, but optimizers return floats for
        # them.
        out = pytrees.leaves_of(updates).rebuild(pytrees.matching(updates, out))
        # The cap must not average over updates from before the restart.
        initial = last.init(_masks.kept(flags, params)).rule_state
        cap_rule_state = states.tree_where(
            restart, initial, state.update_cap.rule_state
        )
        capped, cap_state = last.update(
            _masks.kept(flags, out),
            state.update_cap._replace(rule_state=cap_rule_state),
            params,
        )
        least = jnp.minimum(norm, state.least_norm)
        return _masks.restored(flags, capped, out), StabilizeState(
            gradient_clip=clip_state,
            optimizer_state=after,
            update_cap=cap_state,
            least_norm=jnp.where(counts, least, state.least_norm),
            taken_steps=_counted(state.taken_steps, ~bad),
            skipped_run=jnp.where(bad, _counted(state.skipped_run, bad), 0),
            restarts=_counted(state.restarts, restart),
            log_norm=log_norm,
            averaged_norms=averaged,
            normalizes=state.normalizes,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
