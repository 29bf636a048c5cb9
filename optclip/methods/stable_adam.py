"""Adam with update clipping, as in StableAdamW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optclip._engine import pytrees, sharding, validation
from optclip._engine import state as states
from optclip._engine.numerics import increment, root_of
from optclip.methods._history import ema_weight_sum

__all__ = ["StableAdamState", "scale_by_stable_adam"]


class StableAdamState(NamedTuple):
    """State of `scale_by_stable_adam`.

    Attributes:
        stable_count: int32 scalar. The number of updates so far.
        stable_mu: float32, with the structure of the parameters. The first moments.
        stable_nu: float32, with the structure of the parameters. The second moments.
        largest_rms: float32 scalar. The largest ``rms`` of any leaf at the last update.
            If it is above 1, the update of that leaf was divided by it.
    """

    stable_count: jax.Array
    stable_mu: Any
    stable_nu: Any
    largest_rms: jax.Array


def scale_by_stable_adam(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.99,
    eps: jax.typing.ArrayLike = 1e-6,
    *,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Scales updates by Adam, with update clipping as in StableAdamW.

    For each leaf, let g be its gradient, w its parameters, and m and v its first and
    second moments, including the current step. The update u' is computed as

        rms = sqrt(mean(g**2 / max(v, eps**2)))
        u'  = (m / (sqrt(v) + eps) + weight_decay * w) / max(1, rms)

    Chained with a learning rate, this is StableAdamW. Dividing by max(1, rms) lowers
    both the learning rate and the weight decay of a leaf. To correct the bias of the
    averages, step t uses the decay rate b' = (b**t - b) / (b**t - 1) instead of b. If
    the gradient of a leaf is not finite, or its square overflows float32, the moments
    of the leaf do not change and its update is zero.

    Args:
        b1: Decay rate of the first moment, at least 0 and below 1.
        b2: Decay rate of the second moment, at least 0 and below 1.
        eps: Value added to sqrt(v), above 0.
        weight_decay: Coefficient of the decoupled weight decay, at least 0. If it is
            not 0, ``params`` must be passed to ``update``.
        mask: Which leaves to decay, as in `optax.add_decayed_weights`: a pytree of
            booleans, or a function of the parameters that returns one. None decays all
            leaves.
        axis_name: As in `optclip.clip_by_rule`.

    Returns:
        A gradient transformation whose state is a `StableAdamState`. Chain
        `optax.scale_by_learning_rate` after it.

    Raises:
        ValueError: If an argument is out of range, if ``params`` is required but
            missing, or if a parameter is complex.

    Example:
        >>> import optax, optclip
        >>> adam = optclip.scale_by_stable_adam(weight_decay=0.01)
        >>> tx = optax.chain(adam, optax.scale_by_learning_rate(1e-3))

    Reference:
        Wortsman et al., Stable and low-precision training for large-scale
        vision-language models, 2023, https://arxiv.org/abs/2304.13013
    """
    validation.decay(b1=b1, b2=b2)
    validation.positive(eps=eps)
    validation.non_negative(weight_decay=weight_decay)
    decays = not (isinstance(weight_decay, (int, float)) and weight_decay == 0)

    def init_fn(params) -> Any:
        if any(jnp.iscomplexobj(x) for x in pytrees.leaves_of(params).leaves):
            raise ValueError(
                "`scale_by_stable_adam` needs real parameters, got a complex leaf. "
                "Exclude complex leaves with `optax.masked`."
            )
        count = jnp.zeros([], jnp.int32)
        return StableAdamState(
            count,
            sharding.zeros_of(params),
            sharding.zeros_of(params),
            jnp.zeros([], jnp.float32),
        )

    def update_fn(updates, state, params=None, **extra_args) -> Any:
        del extra_args
        if decays and params is None:
            raise ValueError(
                "`scale_by_stable_adam` needs `params` for its weight decay, got None: "
                "call `update(updates, state, params)`."
            )
        state = states.validate_state(state, lambda: init_fn(updates))
        count = increment(state.stable_count)
        # 1 - b' = (1 - b) / (1 - b**t), computed to full precision even for b near 1.
        new1 = (1 - b1) / ema_weight_sum(b1, count, jnp.float32)
        new2 = (1 - b2) / ema_weight_sum(b2, count, jnp.float32)
        found = pytrees.leaves_of(updates)
        mus = pytrees.matching(updates, state.stable_mu)
        nus = pytrees.matching(updates, state.stable_nu)
        weights: list = [None] * len(mus)
        if decays:
            which = mask(params) if callable(mask) else mask
            if which is None:
                which = jax.tree.map(lambda _: True, updates)
            weights = pytrees.matching(updates, params)
            used = pytrees.matching(updates, which)
            weights = [jnp.where(w, p, 0.0) for w, p in zip(used, weights, strict=True)]
        out, new_mu, new_nu, sizes = [], [], [], []
        along = sharding.leaf_axes(axis_name, updates, found)
        for g, m, v, w, names in zip(
            found.leaves, mus, nus, weights, along, strict=True
        ):
            wide = g.astype(jnp.float32)
            fine = jnp.all(jnp.isfinite(wide)) & jnp.all(jnp.isfinite(jnp.square(wide)))
            fine = sharding.on_all(fine, names)
            wide = jnp.where(fine, wide, 0.0)
            m_next = m + new1 * (wide - m)
            v_next = v + new2 * (jnp.square(wide) - v)
            root = root_of(v_next)
            share = jnp.square(wide / jnp.maximum(root, eps))
            sums, devices = jnp.sum(share), 1
            if names:
                sums, devices = lax.psum(sums, names), lax.psum(1, names)
            rms = root_of(sums / max(g.size * devices, 1))
            step = m_next / (root + eps)
            if w is not None:
                step = step + weight_decay * w.astype(jnp.float32)
            step = step / jnp.maximum(1.0, rms)
            out.append(jnp.where(fine, step, 0.0).astype(g.dtype))
            # The state stays float32 even if a decay rate is a float64 array.
            new_mu.append(jnp.where(fine, m_next, m).astype(m.dtype))
            new_nu.append(jnp.where(fine, v_next, v).astype(v.dtype))
            sizes.append(jnp.where(fine, rms, 0.0).astype(jnp.float32))
        largest = jnp.max(jnp.stack(sizes)) if sizes else state.largest_rms
        return found.rebuild(out), StableAdamState(
            count,
            pytrees.leaves_of(state.stable_mu).rebuild(new_mu),
            pytrees.leaves_of(state.stable_nu).rebuild(new_nu),
            largest,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
