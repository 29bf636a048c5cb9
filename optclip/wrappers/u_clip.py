"""Error feedback: adds what a clip removed to the next gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optclip._engine import pytrees, sharding, validation
from optclip._engine import state as states
from optclip.methods.global_norm import clip_by_global_norm

__all__ = ["CarryState", "u_clip"]


class CarryState(NamedTuple):
    """State of `u_clip`.

    Attributes:
        carry: float32, with the structure of the parameters. The part of the gradients
            that was clipped and not yet applied; initially zeros, always finite, and
            None for leaves that are not gradients.
        inner_state: State of the wrapped clip.
    """

    carry: Any
    inner_state: Any


def u_clip(
    inner_clip: optax.GradientTransformation,
    *,
    max_carry: jax.typing.ArrayLike | None = None,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Adds what a clip removes to the next gradients, to avoid bias (U-Clip).

    Let c be the carry, which is initially zero. Each step returns u' = clip(u + c) and
    sets c to u + c - u'. Clipped gradients are therefore delayed instead of dropped:
    the sum of the updates differs from the sum of the gradients only by the carry. The
    wrapped clip measures u + c.

    If a leaf of u + c or of u' is not finite, its carry is unchanged. Entries whose
    carry is zero reach the wrapped clip bitwise unchanged, including -0 and subnormal
    numbers.

    Args:
        inner_clip: Any clip of optclip or Optax.
        max_carry: Upper bound on the norm of the carry, above 0. None, as in the paper,
            means no bound: a spike of k times the threshold is then replayed over k
            steps.
        axis_name: As in `optclip.clip_by_rule`; pass it to the wrapped clip as well.

    Returns:
        A gradient transformation whose state is a `CarryState`. The carry takes as much
        memory as the parameters in float32.

    Raises:
        ValueError: If ``max_carry`` is not above 0.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> tx = optclip.u_clip(optclip.clip_by_value(1.0))
        >>> grads = jnp.array([1.5])
        >>> out, state = tx.update(grads, tx.init(grads))
        >>> out.tolist(), tx.update(jnp.array([0.25]), state)[0].tolist()
        ([1.0], [0.75])

    Reference:
        Elesedy and Hutter, U-Clip: On-Average Unbiased Stochastic Gradient Clipping,
        2023, https://arxiv.org/abs/2302.02971
    """
    if max_carry is not None:
        validation.positive(max_carry=max_carry)
    inner = validation.transformation(inner_clip=inner_clip)

    def wide(x):
        return x.dtype if jnp.finfo(x.dtype).bits >= 32 else jnp.float32

    def init_fn(params) -> Any:
        return CarryState(sharding.zeros_of(params), inner.init(params))

    def update_fn(updates, state, params=None, **extra_args) -> Any:
        def empty():
            return CarryState(sharding.zeros_of(updates), ())

        state = states.validate_state(state, empty, foreign=("inner_state",))
        found = pytrees.leaves_of(updates)
        carried = pytrees.matching(updates, state.carry)
        total = [
            # Zero carries are not added: -0 + 0 is +0, and XLA flushes subnormal sums.
            jnp.where(c == 0, x.astype(wide(x)), x.astype(wide(x)) + c.astype(wide(x)))
            for x, c in zip(found.leaves, carried, strict=True)
        ]
        out, inner_state = inner.update(
            found.rebuild(total), state.inner_state, params, **extra_args
        )
        done = pytrees.leaves_of(out)
        carry, new = [], []
        along = sharding.leaf_axes(axis_name, updates, found)
        for t, y, x, c, names in zip(
            total, done.leaves, found.leaves, carried, along, strict=True
        ):
            rounded = y.astype(x.dtype)
            rest = (t - rounded.astype(t.dtype)).astype(c.dtype)
            fine = sharding.on_all(jnp.all(jnp.isfinite(rest)), names)
            carry.append(jnp.where(fine, rest, c))
            new.append(rounded)
        if max_carry is not None:
            bound: Any = clip_by_global_norm(max_carry, axis_name=list(along))
            carry = list(bound.update(carry, bound.init(carry))[0])
        carry = pytrees.leaves_of(state.carry).rebuild(carry)
        return done.rebuild(new), CarryState(carry, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
