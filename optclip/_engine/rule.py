"""The interface of rules, and validation of their results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["Context", "Limit", "Rule", "apply_rule", "keep_where"]


class Limit(NamedTuple):
    """The limits of each group, as arrays that broadcast against the norms.

    Attributes:
        threshold: A group is clipped if its norm is above this.
        target: The norm that a clipped group is scaled to. In most rules, it is equal
            to the threshold.
        low: In element scope only: the smallest allowed value, if not ``-target``.
    """

    threshold: jax.Array
    target: jax.Array
    low: jax.Array | None = None


class Context(NamedTuple):
    """Additional inputs that a rule may use.

    Attributes:
        step: int32 scalar. The number of updates before this one.
        tree_norm: The norm of the whole tree, with non-finite norms treated as 0.
        params_norm: A function without arguments that returns the norms of the
            parameters, one per group. It raises a ValueError if ``params`` were not
            passed to ``update``.
        across: A function that returns the elementwise maximum of an array over all
            devices that the norms are sharded over. Only rules that combine several
            entries in element scope need it: in all other scopes, the norms passed to a
            rule are complete on every device.
        initial_norm: A function without arguments that returns the norms that
            parameters of these shapes typically have at initialization, one per group.
            For a leaf with N entries, the magnitude of each entry is taken to be
            N**(-1/4), so its 2-norm is N**(1/4). For a square matrix, this magnitude is
            one over the square root of the number of inputs. It depends neither
            on the order of the axes nor on how a leaf is sharded.
    """

    step: jax.Array
    tree_norm: jax.Array
    params_norm: Callable[[], jax.Array]
    across: Callable[[jax.Array], jax.Array] = lambda x: x
    initial_norm: Callable[[], jax.Array] = lambda: jnp.ones(())


class Rule(NamedTuple):
    """A way to find thresholds: a pair of pure functions on one array of norms.

    ``update`` is called once per array of norms. This array is a scalar in tree scope
    and a vector in leaf and label scope. In layer and unit scope, there is one array
    per leaf shape, and in element scope, one per leaf. A non-finite norm is passed as
    0, and the state of its group does not change.

    Attributes:
        init: A function of the norms (zeros of the right shape and dtype) that returns
            the state: a pytree of arrays whose shapes begin with the shape of the
            norms.
        update: A function of (norm, state, context) that returns (`Limit`, new state).
        name: The name of the rule in error messages.
        signed: Whether the rule also works for numbers that may be negative, such as
            losses. `skip_steps` requires such a rule for losses.
        elements_only: Whether the rule works only in element scope.
        needs_norms: Whether ``update`` uses the norms or ``context.tree_norm``, instead
            of only shapes, dtypes and the step. If not, a clip in element scope with
            ``record=False`` does not compute any norms.
        for_groups: A function of the names of the groups (the label or path of each row
            of the norms) that returns the rule for these rows, if the rule differs
            between groups, as `by_name` does. None for all other rules.
    """

    init: Callable[[jax.Array], Any]
    update: Callable[[jax.Array, Any, Context], tuple[Limit, Any]]
    name: str = "clip"
    signed: bool = False
    elements_only: bool = False
    needs_norms: bool = True
    for_groups: Callable[[Sequence[Any]], Rule] | None = None


def keep_where(
    kept: jax.Array,
    old: Any,
    new: Any,
    max_over_devices: Callable[..., Any] = lambda x: x,
) -> Any:
    """Returns a rule's new state, with the groups in ``kept`` left unchanged.

    An array that all groups share is kept if all groups on all devices are kept.
    ``max_over_devices`` is ``across`` of the `Context`.
    """

    def choose(before, after):
        mask = kept
        if before.ndim < kept.ndim:
            mask = max_over_devices(jnp.any(~kept).astype(jnp.int32)) == 0
        elif before.ndim > kept.ndim:
            mask = kept.reshape(kept.shape + (1,) * (before.ndim - kept.ndim))
        return jnp.where(mask, before, jnp.asarray(after).astype(before.dtype))

    return jax.tree.map(choose, old, new)


def _shapes(tree: Any) -> Any:
    return jax.tree.structure(tree), [jnp.shape(x) for x in jax.tree.leaves(tree)]


def _is_integer(x: Any) -> bool:
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
    """Calls ``rule.update``, checks its result, and returns (limit, state).

    A threshold or target that is negative or NaN is treated as 0, so that clipping
    never flips a sign. Negative values are allowed only if the rule is applied to
    numbers other than norms (``signed``). A limit may have a lower bound only in
    element scope (``elements``).
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
            f"and shapes that it was given, {_shapes(state)}, got {_shapes(after)}."
        )
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True)
    if any(_is_integer(old) and not _is_integer(new) for old, new in pairs):
        raise ValueError(
            f"`update` of the rule `{rule.name}` returns real numbers where its state "
            "holds integers, so they would be truncated. Return a float32 array from "
            "`init`."
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
            f"The rule `{rule.name}` allows values between two bounds, which applies "
            "to single entries and not to norms. Give "
            "`scope=optclip.scopes.element()`, or use `optclip.clip_by_value`."
        )
    if limit.low is None and not signed:
        same = limit.target is limit.threshold
        threshold, target = (jnp.where(jnp.asarray(v) > 0, v, 0.0) for v in limit[:2])
        limit = Limit(threshold, threshold if same else target)
    return limit, after
