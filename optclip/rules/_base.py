"""The interface of a rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["Context", "Limit", "Rule", "hold"]


class Limit(NamedTuple):
    """What a rule allows each group; arrays that broadcast against the norms.

    Attributes:
        threshold: A group is clipped where its norm is above this.
        target: The norm that such a group is brought to; most rules give the threshold.
        low: Element scope only: the smallest value allowed, where it is not
            ``-target``.
    """

    threshold: jax.Array
    target: jax.Array
    low: jax.Array | None = None


class Context(NamedTuple):
    """What a rule may look at beside the norms.

    Attributes:
        step: int32 scalar. How many updates came before this one.
        tree_norm: The norm of the whole tree; 0 where it is not finite.
        params_norm: Function without arguments that returns the norms of the
            parameters, one for each group; raises ValueError where ``params`` were not
            given to ``update``.
        across: Function of an array that returns, entry by entry, its largest value
            over all devices that hold a part of the norms. The norms of groups are
            whole on each device: only a rule that looks at several entries of the
            element scope at once needs it.
    """

    step: jax.Array
    tree_norm: jax.Array
    params_norm: Callable[[], jax.Array]
    across: Callable[[jax.Array], jax.Array] = lambda x: x


class Rule(NamedTuple):
    """A way to find thresholds: a pair of pure functions on one array of norms.

    The engine calls ``update`` once for each array of norms: a scalar in tree scope, a
    vector in leaf and label scope, one array for each kind (shape) of leaf in layer and
    unit scope, one a leaf in element scope. A group that is not finite is handed over
    as 0, and its state is kept as it was.

    Attributes:
        init: Function of the norms (zeros, of the right shape and dtype) that returns
            the state: a tree of arrays, each of which begins with the norms' shape.
        update: Function of (norm, state, context) that returns (`Limit`, new state).
        name: How messages call it.
        signed: Whether it fits numbers that may be negative, such as losses:
            `skip_steps` asks no other rule about these.
        elements_only: Whether it makes sense in the element scope alone.
        needs_norms: Whether ``update`` looks at the norms or the context's tree norm,
            and not at shapes, dtypes and the step alone. In element scope, a clip that
            records nothing measures nothing for a rule that does not.
        for_groups: For a rule that differs by group, as `by_name` does: function of the
            names of the groups, a label or a path for each row of the norms, that
            returns the rule for these rows. None for all others.
    """

    init: Callable[[jax.Array], Any]
    update: Callable[[jax.Array, Any, Context], tuple[Limit, Any]]
    name: str = "clip"
    signed: bool = False
    elements_only: bool = False
    needs_norms: bool = True
    for_groups: Callable[[Sequence[Any]], Rule] | None = None


def hold(kept: jax.Array, old: Any, new: Any, across: Callable = lambda x: x) -> Any:
    """Returns a rule's new state, but the old one of the groups that are ``kept``.

    What a state has for all groups at once is kept if all of them are, on all devices
    (``across`` as in `Context`).
    """

    def choose(before, after):
        mask = kept
        if before.ndim < kept.ndim:
            mask = across(jnp.any(~kept).astype(jnp.int32)) == 0
        elif before.ndim > kept.ndim:
            mask = kept.reshape(kept.shape + (1,) * (before.ndim - kept.ndim))
        return jnp.where(mask, before, jnp.asarray(after).astype(before.dtype))

    return jax.tree.map(choose, old, new)
