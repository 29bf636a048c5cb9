"""The interface of a rule, and the check of what one returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["Context", "Limit", "Rule", "apply_rule", "keep_where"]


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


def keep_where(
    kept: jax.Array, old: Any, new: Any, across: Callable[..., Any] = lambda x: x
) -> Any:
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


def _shapes(tree: Any) -> Any:
    return jax.tree.structure(tree), [jnp.shape(x) for x in jax.tree.leaves(tree)]


def _is_whole(x: Any) -> bool:
    return not jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def apply_rule(
    rule: Rule,
    norm: jax.Array,
    state: Any,
    context: Context,
    *,
    signed: bool = False,
    elements: bool = False,
) -> tuple[Limit, Any]:
    """Returns (limit, state) of a rule, once it is known to be what a rule returns.

    A threshold or target that is negative or NaN counts as 0: it never flips a sign.
    Where numbers other than norms are judged, ``signed``, it may be negative. A limit
    may have a lower bound only in the element scope, ``elements``.
    """
    result = rule.update(norm, state, context)
    pair = isinstance(result, tuple) and len(result) == 2
    if not pair or not isinstance(result[0], Limit):
        raise ValueError(
            f"`update` of the rule `{rule.name}` must return (Limit, state), got a "
            f"{type(result).__name__}."
        )
    limit, after = result
    if _shapes(after) != _shapes(state):
        raise ValueError(
            f"`update` of the rule `{rule.name}` must return a state of the structure "
            f"and shapes that it was given: {_shapes(state)}, got {_shapes(after)}."
        )
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True)
    if any(_is_whole(old) and not _is_whole(new) for old, new in pairs):
        raise ValueError(
            f"`update` of the rule `{rule.name}` returns real numbers where its state "
            "holds whole ones, which would be cut off. Let `init` give a float32 array."
        )
    for value in limit[:2]:
        fits = jnp.ndim(value) <= norm.ndim and all(
            n in (1, own)
            for n, own in zip(jnp.shape(value)[::-1], norm.shape[::-1], strict=False)
        )
        if not fits:
            raise ValueError(
                f"The limits of the rule `{rule.name}` must broadcast against the "
                f"norms of shape {norm.shape}, got {jnp.shape(value)}."
            )
    if limit.low is not None and not elements:
        raise ValueError(
            f"The rule `{rule.name}` allows values between two bounds, which is about "
            "entries and not about norms: give `scope=optclip.scopes.element()`, or "
            "use `optclip.clip_by_value`."
        )
    if limit.low is None and not signed:
        same = limit.target is limit.threshold
        threshold, target = (jnp.where(jnp.asarray(v) > 0, v, 0.0) for v in limit[:2])
        limit = Limit(threshold, threshold if same else target)
    return limit, after
