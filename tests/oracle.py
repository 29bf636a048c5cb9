"""What a clip should do, in NumPy long doubles, written from the docstrings alone.

Groups are given as arrays of group numbers, one per leaf. The code is simple, not fast.
"""

import re
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

WIDE = np.longdouble


def wide(leaf):
    """Converts a leaf of any dtype to long doubles."""
    leaf = np.asarray(leaf)
    if np.iscomplexobj(leaf):
        return leaf.astype(np.clongdouble)
    small = leaf.dtype.itemsize < 4
    return (leaf.astype(np.float32) if small else leaf).astype(WIDE)


def norm(values, ord=2):
    """Returns the norm of a flat array of long doubles."""
    size = np.abs(values)
    if size.size == 0:
        return WIDE(0)
    if ord == "rms":
        return np.sqrt(np.mean(size * size))
    if ord == np.inf:
        return np.max(size)
    top = np.max(size)
    if top == 0 or not np.isfinite(top):
        return np.sum(size)
    return top * np.sum((size / top) ** WIDE(ord)) ** (1 / WIDE(ord))


def tree_norm(leaves, ord=2):
    flat = [wide(x).ravel() for x in leaves]
    return norm(np.concatenate(flat) if flat else np.zeros(0, WIDE), ord)


def _look_up(table, path):
    if isinstance(table, dict):
        return next((v for k, v in table.items() if re.search(k, path)), None)
    return table(path) if callable(table) else table


def _unit_axes(shape, axis):
    rank = len(shape)
    if axis is None:
        default = {0: (), 1: (0,), 2: (0,), 3: (0,), 4: (0, 1, 2), 5: (0, 1, 2, 3)}
        return default[rank]
    axes = (axis,) if isinstance(axis, int) else axis
    return tuple(a % rank for a in axes) if rank else ()


def _cut(shape, summed, first):
    """Numbers the groups of one leaf whose norms reduce over the axes ``summed``."""
    kept = [1 if a in summed else n for a, n in enumerate(shape)]
    count = int(np.prod(kept))
    return np.broadcast_to(first + np.arange(count).reshape(kept), shape), count


def groups(scope, argument, paths, shapes):
    """Returns the group number of every entry: one array per leaf."""
    out, first, labels = [], 0, {}
    for path, shape in zip(paths, shapes, strict=True):
        rank = len(shape)
        if scope == "tree":
            out.append(np.zeros(shape, int))
            continue
        if scope == "label":
            number = labels.setdefault(_look_up(argument, path), len(labels))
            out.append(np.full(shape, number))
            continue
        summed = {
            "leaf": lambda rank=rank: range(rank),
            "element": lambda: (),
            "layer": lambda path=path, rank=rank: range(
                _look_up(argument, path) or 0, rank
            ),
            "unit": lambda shape=shape, path=path: _unit_axes(
                shape, _look_up(argument, path)
            ),
        }[scope]()
        ids, count = _cut(shape, tuple(summed), first)
        out.append(ids)
        first += count
    return out


CURVES = {
    "rational": lambda r: r / (1 + r),
    "tanh": np.tanh,
    "atan": lambda r: 2 / WIDE(np.pi) * np.arctan(WIDE(np.pi) / 2 * r),
    "sqrt": lambda r: r / np.sqrt(1 + r * r),
}


def scale(action, norm, threshold, eps=0.0):
    """Returns the scale of a group with a finite norm."""
    eps = WIDE(eps)
    if norm == 0 or action == "none":
        return WIDE(1)
    if action == "rescale":
        return threshold / (norm + eps) if norm + eps > threshold else WIDE(1)
    if action == "normalize":
        return threshold / (norm + eps)
    if action == "zero":
        return WIDE(0 if norm > threshold else 1)
    if threshold == 0:
        return WIDE(0)
    if np.isinf(threshold):
        return WIDE(1)
    r = norm / threshold
    return CURVES[action.removeprefix("soften-")](r) / r


class Done(NamedTuple):
    """The expected result of one update, in long doubles, before any rounding."""

    leaves: list
    norms: dict
    thresholds: dict
    scales: dict
    before: WIDE
    after: WIDE


def _direction(entry):
    """Returns the direction of one infinite entry: a sign, or a diagonal if complex."""
    if not np.iscomplexobj(entry):
        return np.sign(entry)
    parts = np.array([entry.real, entry.imag])
    parts = np.where(np.isinf(parts), np.sign(parts), 0) / np.sqrt(
        np.isinf(parts).sum()
    )
    return parts[0] + 1j * parts[1]


def clip(
    leaves, ids, *, threshold, ord=2, action="rescale", eps=0.0, policy="propagate",
    params=None, floor=0.0, by_element=False,
):  # fmt: skip
    """Clips flat leaves. With ``params``, the threshold is relative to their norm."""
    xs = [wide(x) for x in leaves]
    bads = [~np.isfinite(x) for x in xs]
    if policy == "drop":
        xs = [np.where(b, 0, x) for x, b in zip(xs, bads, strict=True)]
    numbers = sorted({int(g) for i in ids for g in i.ravel()})
    out = [np.array(x) for x in xs]
    norms, limits, scales = {}, {}, {}
    for g in numbers:
        masks = [i == g for i in ids]
        entries = np.concatenate([x[m] for x, m in zip(xs, masks, strict=True)])
        norms[g] = norm(entries, ord)
        limits[g] = WIDE(threshold)
        if params is not None:
            weights = [wide(p)[m] for p, m in zip(params, masks, strict=True)]
            limits[g] *= max(norm(np.concatenate(weights), ord), WIDE(floor))
        if np.isfinite(norms[g]):
            scales[g] = scale(action, norms[g], limits[g], eps)
        else:
            scales[g] = WIDE(1)
        for o, m in zip(out, masks, strict=True):
            if np.isfinite(norms[g]):
                o[m] = o[m] * scales[g] if scales[g] else 0
            elif by_element and np.isinf(norms[g]) and policy == "propagate":
                o[m] = [_direction(v) * limits[g] for v in o[m]]
            elif policy in ("zero", "drop"):
                o[m] = 0
    if policy == "skip" and any(b.any() for b in bads):
        out = [np.zeros_like(o) for o in out]
    whole = np.inf if by_element else ord
    return Done(out, norms, limits, scales, tree_norm(xs, whole), tree_norm(out, whole))


def epsilon(dtype):
    return float(jnp.finfo(dtype).eps)


def ulp(value, dtype):
    """Returns the spacing of ``dtype`` at the magnitudes ``value``."""
    info = jnp.finfo(dtype)
    size = np.maximum(np.abs(value), WIDE(float(info.tiny)))
    return np.exp2(np.floor(np.log2(size))) * WIDE(float(info.eps))


def assert_rounded_once(got, exact, work=2e-6):
    """Asserts that ``got`` is ``exact`` rounded once, after float32 arithmetic.

    ``work`` is the relative error of that arithmetic. XLA flushes subnormal float32.
    """
    dtype = np.asarray(got).dtype
    real = jnp.finfo(dtype).dtype
    got = wide(got)
    flushed = float(jnp.finfo(jnp.float32).tiny) if work > 1e-9 else 1e-300
    flushed = 2 * flushed if real.itemsize >= 4 or real == jnp.bfloat16 else 0.0
    parts = [(got.real, exact.real), (got.imag, exact.imag)]
    largest = WIDE(float(jnp.finfo(real).max)) * (1 - WIDE(epsilon(real)))
    for a, b in parts if np.iscomplexobj(exact) else parts[:1]:
        fits = np.abs(b) < largest  # near the maximum, rounding depends on the dtype
        a, b = a[fits], b[fits]
        room = (0 if real.itemsize >= 4 else ulp(b, real) / 2) + work * np.abs(b)
        np.testing.assert_array_less(
            np.abs(a - b), room * (1 + 1e-5) + flushed + 1e-4000
        )
