"""Bounds the singular values of matrices and vectors, with custom derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from optclip._engine.numerics import root_of

__all__ = ["Method", "clipped"]


def _full_precision(function: Callable) -> Callable:
    """Returns ``function`` with matrix products in the precision of their inputs.

    By default, XLA rounds the inputs of float32 matrix products to TF32 on GPUs and to
    bfloat16 on TPUs. The results would not have the documented accuracy.
    """

    @functools.wraps(function)
    def call(*args):
        with jax.default_matmul_precision("highest"):
            return function(*args)

    return call


def _transposed(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


def _by_svd(x: jax.Array, cap: jax.Array) -> jax.Array:
    left, values, right = jnp.linalg.svd(x, full_matrices=False)
    # Subtract only the excess over the cap, so that the part of the matrix that is not
    # clipped keeps full precision.
    over = jnp.maximum(values - cap[..., 0], 0.0)
    clipped = x - (left * over[..., None, :]) @ right
    # If the largest singular value is far above the cap, the subtraction cancels most
    # of the significant digits. In that case, multiply the factors of the SVD instead.
    rebuilt = (left * jnp.minimum(values, cap[..., 0])[..., None, :]) @ right
    far = values[..., :1, None] > FAR_ABOVE * cap
    clipped = jnp.where(far, rebuilt, clipped)
    return jnp.where(jnp.any(over > 0, axis=-1)[..., None, None], clipped, x)


# In `_by_svd`, the ratio of the largest singular value to the cap above which the
# product of the factors is more accurate than the subtraction.
FAR_ABOVE = 4
# The ratio of the Frobenius norm to the cap above which the iterations below do not
# converge in their fixed number of steps.
MOST_CAPS = 1e3


def _norm(x: jax.Array, axes: Any = (-2, -1)) -> jax.Array:
    return root_of(jnp.sum(jnp.square(x), axis=axes, keepdims=True))


def _sign(x: jax.Array, steps: int) -> jax.Array:
    """Returns U Vt for x = U S Vt, using the cubic Newton-Schulz iteration."""
    size = _norm(x)
    x = x / jnp.where(size > 0, size, 1.0)

    def step(_, y):
        return 1.5 * y - 0.5 * (y @ _transposed(y)) @ y

    return jax.lax.fori_loop(0, steps, step, x)


def _hardcap(x: jax.Array, like: jax.Array) -> jax.Array:
    """Clips the singular values of ``x``, which is in units of the cap, to 1."""
    del like
    # Use min(s, 1) = (1 + s - |1 - s|) / 2 for each singular value s.
    sign = _sign(x, 30)
    rest = sign - x
    return 0.5 * (sign + x - rest @ (_transposed(_sign(rest, 30)) @ sign))


def _soft(x: jax.Array, like: jax.Array) -> jax.Array:
    """Returns (I + x xt)^(-1/2) ``like``, using a coupled Newton-Schulz iteration."""
    gram = x @ _transposed(x)
    one = jnp.eye(x.shape[-2], dtype=x.dtype).reshape(
        (1,) * (x.ndim - 2) + gram.shape[-2:]
    )
    eye = jnp.broadcast_to(one, gram.shape)
    rows = jnp.max(jnp.sum(jnp.abs(gram), axis=-1), axis=-1)[..., None, None]
    top = 1 + rows  # an upper bound on the eigenvalues of I + gram
    start = (eye + gram) / top

    def step(_, pair):
        a, b = pair
        middle = 0.5 * (3 * eye - b @ a)
        return a @ middle, middle @ b

    _, inverse_root = jax.lax.fori_loop(0, 20, step, (start, eye))
    return (inverse_root @ like) / jnp.sqrt(top)


Method: TypeAlias = Literal["svd", "hardcap", "soft"]
ITERATIONS = {"hardcap": _hardcap, "soft": _soft}


def _matrix(y: jax.Array, bound: jax.Array, size: jax.Array, method: str) -> jax.Array:
    """Bounds the singular values of matrices that are wide or square."""
    if method == "svd":
        return _by_svd(y, bound)
    y = y * jnp.minimum(1.0, MOST_CAPS * (bound / jnp.where(size > 0, size, 1.0)))
    out = ITERATIONS[method](y / bound, y)
    return bound * out if method == "hardcap" else out


def _vector(y: jax.Array, bound: jax.Array, size: jax.Array, method: str) -> jax.Array:
    """Bounds the norm of a scalar or vector. The result is in units of the cap."""
    size = jnp.where(size > 0, size, 1.0)
    return y / size * (size / jnp.hypot(bound, size) if method == "soft" else 1.0)


def _in_units(x: jax.Array, cap: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the scaled leaf, the scaled cap, the unit, and the scaled norm.

    The leaf, the cap and the norm are divided by the unit, so that powers of the
    entries can't overflow. The unit is a power of two near the largest entry of each
    matrix, and it is small enough that its inverse is a normal number.
    """
    axes, info = tuple(range(x.ndim))[-2:], jnp.finfo(x.dtype)
    top = jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0.0)
    top = jnp.clip(top, info.tiny * 16, info.max / 16)
    unit = jnp.exp2(jnp.floor(jnp.log2(top)))
    y = x * (1 / unit)
    return y, jnp.maximum(cap / unit, info.tiny), unit, _norm(y, axes)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
@_full_precision
def clipped(x: jax.Array, cap: jax.Array, method: str) -> jax.Array:
    """Bounds the singular values of a leaf with finite entries by ``cap``."""
    if x.size == 0:
        return x
    y, bound, unit, size = _in_units(x, cap)
    # For "svd" and "hardcap", a cap above the Frobenius norm has no effect, so it can
    # be reduced. This also makes an infinite cap finite.
    if method != "soft":
        bound = jnp.minimum(bound, 2 * jnp.maximum(size, 1e-3))
    if x.ndim < 2:
        # Multiply by the original cap, because the scaled cap may be subnormal.
        out = _vector(y, bound, size, method) * cap
        short = (size <= bound) if method != "soft" else (size < 1e-5 * bound)
        return jnp.where(cap > 0, jnp.where(short, x, out), jnp.zeros_like(x))
    if x.shape[-2] > x.shape[-1]:
        out = _transposed(_matrix(_transposed(y), bound, size, method))
    else:
        out = _matrix(y, bound, size, method)
    kept = out == y
    if method != "soft":  # no singular value exceeds the Frobenius norm
        kept |= size <= bound
    out = jnp.where(kept, x, out * unit)
    return jnp.where(cap > 0, out, jnp.zeros_like(x))


@clipped.defjvp
@_full_precision
def _clipped_jvp(method, primals, tangents):
    """Computes the derivative for the scaled leaf, whose powers can't overflow."""
    (x, cap), (x_dot, cap_dot) = primals, tangents
    out = clipped(x, cap, method)
    if x.size == 0:
        return out, x_dot
    y, bound, _, size = _in_units(x, cap)
    bound = jnp.minimum(bound, 1e30)  # finite, but far above every entry
    if x.ndim < 2:
        slope = _vector_slope(y, bound, size, x_dot, cap_dot, method)
    elif x.shape[-2] > x.shape[-1]:
        turned = _transposed(y), bound, size, _transposed(x_dot), cap_dot
        slope = _transposed(_matrix_slope(*turned, method))
    else:
        slope = _matrix_slope(y, bound, size, x_dot, cap_dot, method)
    return out, jnp.where(cap > 0, slope, jnp.zeros_like(slope))


def _parts(y, size, x_dot, axes):
    """Returns the direction of ``y`` and two components of ``x_dot``.

    The components are parallel and orthogonal to ``y``.
    """
    way = y / jnp.where(size > 0, size, 1.0)
    along = way * jnp.sum(way * x_dot, axis=axes, keepdims=True)
    return way, along, x_dot - along


def _vector_slope(y, bound, size, x_dot, cap_dot, method):
    way, along, across = _parts(y, size, x_dot, tuple(range(y.ndim)))
    # The "soft" method maps the norm n to cap * h(n / cap), where
    # h(r) = r / sqrt(1 + r**2).
    if method == "soft":
        whole = jnp.hypot(bound, size)
        share, rise = bound / whole, (size / whole) ** 3
        return share * across + share**3 * along + cap_dot * rise * way
    over = size > bound
    share = jnp.where(over, bound / jnp.where(over, size, 1.0), 1.0)
    one = over.astype(y.dtype)
    return share * across + (1 - one) * along + cap_dot * one * way


def _matrix_slope(y, bound, size, x_dot, cap_dot, method):
    if method == "svd":
        return _svd_slope(y, bound, x_dot, cap_dot)
    way, _, across = _parts(y, size, x_dot, (-2, -1))
    known = jnp.where(size > 0, size, 1.0)
    far = size > MOST_CAPS * bound
    x = jnp.where(far, MOST_CAPS * way, y / jnp.where(far, known, bound))
    kept = (size <= bound) & (method == "hardcap")
    x = jnp.where(kept, 0.0, x)
    # The tangent of x, multiplied by the cap.
    move = jnp.where(far, MOST_CAPS * (bound / known) * across, x_dot - cap_dot * x)
    value, slope = jax.jvp(lambda x: ITERATIONS[method](x, x), (x,), (move,))
    return jnp.where(kept, x_dot, slope + cap_dot * value)


def _svd_slope(y, bound, x_dot, cap_dot):
    """Returns the derivative of U min(S, c) Vt, using divided differences of min.

    JAX's derivative of the SVD divides by differences of singular values, so it is not
    finite if two of them are equal. Divided differences of min are always finite.
    """
    left, s, right = jnp.linalg.svd(y, full_matrices=False)
    cap = bound[..., 0]
    over, ends = s > cap, jnp.minimum(s, cap)
    share = jnp.where(over, cap / jnp.where(over, s, 1.0), 1.0)

    def pairs(f, a):
        return f(a[..., :, None], a[..., None, :])

    mixed = pairs(jnp.logical_xor, over)
    gaps = jnp.where(mixed, pairs(jnp.subtract, s), 1.0)
    same = 1 - pairs(jnp.logical_and, over).astype(s.dtype)
    even = jnp.where(mixed, pairs(jnp.subtract, ends) / gaps, same)
    total = pairs(jnp.add, s)
    odd = jnp.where(
        total > 0, pairs(jnp.add, ends) / jnp.where(total > 0, total, 1.0), 1.0
    )
    mid = _transposed(left) @ x_dot @ _transposed(right)
    turned = _transposed(mid)
    inner = 0.5 * (even * (mid + turned) + odd * (mid - turned))
    one = jnp.expand_dims(jnp.eye(s.shape[-1], dtype=s.dtype), tuple(range(s.ndim - 1)))
    inner = inner + cap_dot * one * over[..., None, :]
    outside_left = (x_dot @ _transposed(right) - left @ mid) * share[..., None, :]
    outside_right = share[..., :, None] * (_transposed(left) @ x_dot - mid @ right)
    slope = left @ (inner @ right + outside_right) + outside_left @ right
    return jnp.where(jnp.any(over, axis=-1)[..., None, None], slope, x_dot)
