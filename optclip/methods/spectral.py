"""Spectral clipping: bounds the singular values of each matrix."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import optax

from optclip._engine import group_norms, grouping, pytrees, validation
from optclip._engine import state as states
from optclip._engine.numerics import increment
from optclip._engine.state import ClipState
from optclip._engine.types import NonfinitePolicy
from optclip._engine.update import POLICIES
from optclip.methods import _spectra

__all__ = ["spectral_clip"]


def _lengths(updates: Any, found: pytrees.Leaves) -> tuple[jax.Array, ...]:
    """Returns the leaf norms, the global norm, and the kinds of non-finite values."""
    layout = grouping.whole_leaf_layout(range(len(found.leaves)), found.leaves)
    cut = group_norms.cut_by(layout, updates, found, order=2.0, axis_name=None)
    measured = group_norms.norms_of(found.leaves, cut)
    whole = group_norms.total(measured.norm, cut)
    return measured.norm[0], whole, measured.kinds


def spectral_clip(
    max_sigma: jax.typing.ArrayLike | Callable[[jax.Array], jax.typing.ArrayLike],
    *,
    method: _spectra.Method = "svd",
    nonfinite: NonfinitePolicy = "propagate",
) -> optax.GradientTransformationExtraArgs:
    """Bounds the singular values of each matrix and keeps its singular vectors.

    The last two axes of a leaf form a matrix, and all other axes are batch axes. A
    matrix with the singular value decomposition u = U S Vt becomes u' = U f(S) Vt,
    where f depends on ``method`` and c = ``max_sigma``:

    | method    | f(s)                  | algorithm            | accuracy           |
    | --------- | --------------------- | -------------------- | ------------------ |
    | "svd"     | min(s, c)             | SVD                  | 1e-5               |
    | "hardcap" | min(s, c)             | matrix products only | 0.15 * c           |
    | "soft"    | s / sqrt(1 + (s/c)^2) | matrix products only | 1e-3 for s < 100 c |

    If the Frobenius norm of a matrix is above 1,000 c, "hardcap" and "soft" first scale
    the matrix to a Frobenius norm of 1,000 c, which also reduces its small singular
    values.

    A scalar or vector leaf is treated as a matrix with a single column, so f is applied
    to its norm. Sharded matrices are gathered. Matrix products are computed in float32
    or higher precision. Muon's quintic iteration is not used, because five steps of it
    are not accurate enough for clipping. Derivatives are finite everywhere, even if
    singular values are equal or zero.

    Args:
        max_sigma: The largest singular value c, at least 0: a number or a schedule. A
            value of 0 sets all updates to zero, which stops training; inf disables
            clipping.
        method: "svd", "hardcap" or "soft".
        nonfinite: How to handle a leaf that contains NaN or inf: "propagate" leaves it
            unchanged, "zero" sets it to zero, "drop" sets the non-finite entries to
            zero and clips the rest, and "skip" sets all updates to zero.

    Returns:
        A gradient transformation whose state is a `ClipState`. ``norm_before`` and
        ``norm_after`` are the global norms of the updates, and ``scale`` is the ratio
        of ``norm_after`` to ``norm_before``. ``clipped`` is the fraction of leaves
        whose norm was reduced. ``params`` is not used.

    Raises:
        ValueError: If ``max_sigma`` is negative or NaN, or ``method`` or ``nonfinite``
            is unknown. In ``update``, if a leaf is complex.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> tx = optclip.spectral_clip(1.0)
        >>> grads = jnp.diag(jnp.array([3.0, 0.5]))
        >>> tx.update(grads, tx.init(grads))[0].round(3).tolist()
        [[1.0, 0.0], [0.0, 0.5]]

    Reference:
        Jiang et al., SPECTRA, 2026, https://arxiv.org/abs/2603.14315
        ("soft"); Newhouse et al., Training Transformers with Enforced Lipschitz
        Constants, 2025, https://arxiv.org/abs/2507.13338 ("hardcap")
    """
    if not callable(max_sigma):
        validation.threshold(max_sigma=max_sigma)
    validation.one_of("method", method, get_args(_spectra.Method))
    validation.one_of("nonfinite", nonfinite, POLICIES)

    def init_fn(params) -> Any:
        return states.init_clip_state(pytrees.leaves_of(params).paths)

    def update_fn(updates, state, params=None, **extra_args) -> Any:
        del params, extra_args
        found = pytrees.leaves_of(updates)
        empty = functools.partial(states.init_clip_state, found.paths)
        state = states.validate_state(state, empty, absent=found.absent)
        if not found.leaves:
            return updates, state._replace(steps=increment(state.steps))
        value = max_sigma(state.steps) if callable(max_sigma) else max_sigma
        cap: Any = jnp.asarray(value, jnp.result_type(float))
        cap = jnp.where(cap > 0, cap, 0.0)
        before, length, kinds = _lengths(updates, found)
        bad = jnp.any(kinds)
        new = []
        for x, held in zip(found.leaves, kinds, strict=True):
            if jnp.iscomplexobj(x):
                raise ValueError(
                    "`spectral_clip` needs real updates, got a complex leaf. Exclude "
                    "complex leaves with `optax.masked`."
                )
            small = jnp.finfo(x.dtype).bits < 32
            y = x.astype(jnp.float32) if small else x
            finite = jnp.where(jnp.isfinite(y), y, 0.0)
            leaf_bad = jnp.any(held)
            z = _spectra.clipped(finite, cap.astype(y.dtype), method)
            if nonfinite != "drop":
                kept = y if nonfinite == "propagate" else jnp.zeros_like(y)
                z = jnp.where(leaf_bad, kept, z)
            if nonfinite == "skip":
                z = jnp.where(bad, jnp.zeros_like(z), z)
            new.append(z.astype(x.dtype))
        out = found.rebuild(new)
        after, rest, _ = _lengths(out, found._replace(leaves=new))
        usable = jnp.isfinite(length) & (length > 0)
        share = jnp.where(usable, rest / jnp.where(usable, length, 1.0), 1.0)
        # Count only the leaves whose norm decreased by more than a rounding error.
        smaller = after < before * (1 - 2.0**-20)
        clipped = jnp.mean(smaller.astype(jnp.float32))
        steps, clipped_steps = states.count_event(
            state.steps, state.clipped_steps, clipped > 0
        )
        return out, ClipState(
            state.rule_state,
            norm_before=states.to_finite_f32(length),
            norm_after=states.to_finite_f32(rest),
            threshold=states.finite_threshold(cap),
            scale=states.to_finite_f32(share),
            clipped=states.to_finite_f32(clipped),
            steps=steps,
            clipped_steps=clipped_steps,
            nonfinite=states.record_nonfinite(
                state.nonfinite, kinds, bad, state.steps, found.paths
            ),
            groups=None,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
