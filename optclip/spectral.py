"""Clipping of singular values: the scale is a matrix function, not a number."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optclip import _checks, _layouts, _measure, _state, _trees
from optclip._engine import POLICIES
from optclip._state import ClipState

__all__ = ["spectral_clip"]


def _transposed(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


def _by_svd(x: jax.Array, cap: jax.Array) -> jax.Array:
    left, values, right = jnp.linalg.svd(x, full_matrices=False)
    # Taken off, not rebuilt: what is not clipped keeps its digits.
    over = jnp.maximum(values - cap[..., 0], 0.0)
    clipped = x - (left * over[..., None, :]) @ right
    # Far above the cap nothing would be left of them.
    rebuilt = (left * jnp.minimum(values, cap[..., 0])[..., None, :]) @ right
    far = values[..., :1, None] > 4 * cap
    clipped = jnp.where(far, rebuilt, clipped)
    return jnp.where(jnp.any(over > 0, axis=-1)[..., None, None], clipped, x)


def _sign(x: jax.Array, steps: int) -> jax.Array:
    """Returns U Vt of x = U S Vt, by the cubic Newton-Schulz iteration."""
    size = jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True))
    x = x / jnp.where(size > 0, size, 1.0)

    def step(_, y):
        return 1.5 * y - 0.5 * (y @ _transposed(y)) @ y

    return jax.lax.fori_loop(0, steps, step, x)


def _shortened(x: jax.Array, cap: jax.Array) -> jax.Array:
    """Returns x, no longer than a thousand caps: beyond, no iteration converges."""
    size = jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True))
    return x * jnp.minimum(1.0, 1e3 * (cap / jnp.where(size > 0, size, 1.0)))


def _by_hardcap(x: jax.Array, cap: jax.Array) -> jax.Array:
    x = _shortened(x, cap) / cap  # in the unit of the cap
    sign = _sign(x, 30)
    rest = sign - x
    return 0.5 * cap * (sign + x - rest @ (_transposed(_sign(rest, 30)) @ sign))


def _by_soft(x: jax.Array, cap: jax.Array) -> jax.Array:
    x = _shortened(x, cap)
    y = x / cap
    gram = y @ _transposed(y)
    one = jnp.eye(x.shape[-2], dtype=x.dtype).reshape(
        (1,) * (x.ndim - 2) + gram.shape[-2:]
    )
    eye = jnp.broadcast_to(one, gram.shape)
    rows = jnp.max(jnp.sum(jnp.abs(gram), axis=-1), axis=-1)[..., None, None]
    top = 1 + rows  # no eigenvalue of I + gram is larger
    start = (eye + gram) / top

    def step(_, pair):
        a, b = pair
        middle = 0.5 * (3 * eye - b @ a)
        return a @ middle, middle @ b

    _, inverse_root = jax.lax.fori_loop(0, 20, step, (start, eye))
    return (inverse_root @ x) / jnp.sqrt(top)


_METHODS = {"svd": _by_svd, "hardcap": _by_hardcap, "soft": _by_soft}


def _vector(y: jax.Array, bound: jax.Array, method: str) -> jax.Array:
    """Returns what a leaf of rank 0 or 1, with its norm clipped, is of the cap."""
    size = jnp.sqrt(jnp.sum(jnp.square(y)))
    size = jnp.where(size > 0, size, 1.0)
    return y / size * (size / jnp.hypot(bound, size) if method == "soft" else 1.0)


def _clipped(x: jax.Array, cap: jax.Array, method: str) -> jax.Array:
    """Returns one finite leaf with its singular values bounded by ``cap``."""
    if x.size == 0:
        return x
    axes = tuple(range(x.ndim))[-2:]
    # In units of the largest entry, whose powers can't overflow; of a power of two, no
    # larger than has a normal inverse.
    top = jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0.0)
    top = jnp.clip(top, jnp.finfo(x.dtype).tiny * 16, jnp.finfo(x.dtype).max / 16)
    unit = jnp.exp2(jnp.floor(jnp.log2(lax.stop_gradient(top))))
    y, bound = x * (1 / unit), jnp.maximum(cap / unit, jnp.finfo(x.dtype).tiny)
    size = jnp.sqrt(jnp.sum(jnp.square(y), axis=axes, keepdims=True))
    if method != "soft":  # an infinite one, too
        bound = jnp.minimum(bound, 2 * jnp.maximum(size, 1e-3))
    if x.ndim < 2:
        # In the unit of the cap: in that of the leaf it may be subnormal.
        out = _vector(y, bound, method) * cap
        short = (size <= bound) if method != "soft" else (size < 1e-5 * bound)
        return jnp.where(cap > 0, jnp.where(short, x, out), jnp.zeros_like(x))
    if x.shape[-2] > x.shape[-1]:
        out = _transposed(_METHODS[method](_transposed(y), bound))
    else:
        out = _METHODS[method](y, bound)
    kept = out == y
    if method != "soft":  # no singular value is longer than all together
        kept |= size <= bound
    out = jnp.where(kept, x, out * unit)
    return jnp.where(cap > 0, out, jnp.zeros_like(x))


def _lengths(updates: Any, found: _trees.Leaves) -> tuple[jax.Array, ...]:
    """Returns the norm of each leaf, that of all, and the counts of bad entries."""
    layout = _layouts.pooled(range(len(found.leaves)), found.leaves)
    measured, counts, plan = _measure.measure_layout(
        updates, found, layout, order=2.0, axis_name=None
    )
    whole = _measure.total(measured.norm, counts, 2.0, plan)
    return measured.norm[0], whole, measured.entries


def spectral_clip(
    max_sigma: jax.typing.ArrayLike | Callable[[jax.Array], jax.typing.ArrayLike],
    *,
    method: str = "svd",
    nonfinite: str = "propagate",
) -> optax.GradientTransformationExtraArgs:
    """Bounds the singular values of each matrix; its singular directions stay.

    For each leaf u = U S Vt, the last two axes of which are a matrix and the others a
    batch of them, u' = U f(S) Vt with c = ``max_sigma``:

    | method    | f(s)                  | how, and how well                           |
    | --------- | --------------------- | ------------------------------------------- |
    | "svd"     | min(s, c)             | by SVD, to 1e-5                             |
    | "hardcap" | min(s, c)             | matrix products only; off by up to 0.15 * c |
    | "soft"    | s / sqrt(1 + (s/c)^2) | matrix products only, to 1e-3 for s < 100 c |

    "hardcap" and "soft" first shorten a matrix whose Frobenius norm is above 1,000 c to
    that, and its small singular values with it.

    Leaves of rank 0 and 1 count as one column: their norm is bounded by the same f. A
    matrix whose entries are sharded is gathered. Matrix products are taken in float32;
    five steps of Muon's quintic iteration are no use here, and not offered.

    Args:
        max_sigma: The largest singular value c, at least 0: a number or schedule.
        method: "svd", "hardcap" or "soft".
        nonfinite: What happens to a leaf with NaN or inf: "propagate" leaves it, "zero"
            makes it zero, "drop" makes such entries zero and clips the rest, "skip"
            makes all updates zero.

    Returns:
        A transformation with `ClipState`: ``norm_before`` and ``norm_after`` are
        Frobenius norms of all updates, ``scale`` their ratio, ``clipped`` the share of
        leaves that became shorter. ``params`` is not used.

    Raises:
        ValueError: If ``max_sigma`` is negative or NaN, or an option is not one of
            those named; in ``update``, if a leaf is complex.

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
        _checks.non_negative(max_sigma=max_sigma)
    _checks.one_of("method", method, tuple(_METHODS))
    _checks.one_of("nonfinite", nonfinite, POLICIES)

    def init_fn(params) -> Any:
        return _state.first(_trees.leaves_of(params).paths)

    def update_fn(updates, state, params=None, **extra_args) -> Any:
        del params, extra_args
        found = _trees.leaves_of(updates)
        empty = functools.partial(_state.first, found.paths)
        state = _state.own(state, empty, absent=found.absent)
        if not found.leaves:
            return updates, state._replace(steps=state.steps + 1)
        value = max_sigma(state.steps) if callable(max_sigma) else max_sigma
        cap: Any = jnp.asarray(value, jnp.float32)
        cap = jnp.where(cap > 0, cap, 0.0)
        before, length, entries = _lengths(updates, found)
        bad = jnp.any(entries > 0)
        new = []
        for x, counts in zip(found.leaves, entries, strict=True):
            if jnp.iscomplexobj(x):
                raise ValueError(
                    "`spectral_clip` needs real updates, got a complex leaf."
                )
            small = jnp.finfo(x.dtype).bits < 32
            y = x.astype(jnp.float32) if small else x
            finite = jnp.where(jnp.isfinite(y), y, 0.0)
            leaf_bad = jnp.any(counts > 0)
            z = _clipped(finite, cap.astype(y.dtype), method)
            if nonfinite != "drop":
                kept = y if nonfinite == "propagate" else jnp.zeros_like(y)
                z = jnp.where(leaf_bad, kept, z)
            if nonfinite == "skip":
                z = jnp.where(bad, jnp.zeros_like(z), z)
            new.append(jnp.where(z == y, x, z.astype(x.dtype)))
        out = found.rebuild(new)
        after, rest, _ = _lengths(out, found._replace(leaves=new))
        usable = jnp.isfinite(length) & (length > 0)
        share = jnp.where(usable, rest / jnp.where(usable, length, 1.0), 1.0)
        clipped = jnp.mean((after < 0.999 * before).astype(jnp.float32))
        return out, ClipState(
            state.rule_state,
            norm_before=_state.figures(length),
            norm_after=_state.figures(rest),
            threshold=_state.finite_threshold(cap),
            scale=_state.figures(share),
            clipped=_state.figures(clipped),
            steps=state.steps + 1,
            clipped_steps=state.clipped_steps + (clipped > 0).astype(jnp.int32),
            seen=_state.look(state.seen, entries, bad, state.steps, found.paths),
            groups=None,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
