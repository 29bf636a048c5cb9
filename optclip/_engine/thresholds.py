"""Rules for thresholds given as a number, an array, a schedule or a map by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optclip._engine import grouping, validation
from optclip._engine.rule import Limit, Rule

__all__ = [
    "as_rule",
    "by_name",
    "constant",
    "fixed",
    "interval",
    "limit_at",
    "schedule",
    "stateless",
]


def stateless(
    limit_of: Callable[..., Any], name: str, *, needs_norms: bool = False
) -> Rule:
    return Rule(
        init=lambda norm: (),
        update=lambda norm, state, context: (limit_of(norm, context), state),
        name=name,
        needs_norms=needs_norms,
    )


def limit_at(threshold: jax.typing.ArrayLike, norm: jax.Array) -> Limit:
    value = jnp.asarray(threshold).astype(norm.dtype)
    return Limit(value, value)


def constant(value: jax.typing.ArrayLike) -> Rule:
    """Returns a rule whose threshold is always ``value``.

    Args:
        value: The threshold, in the units of the norm: a non-negative number, or an
            array that broadcasts against the norms (in leaf scope, one entry per leaf).
            0 clips everything to zero; inf clips nothing. The entries of a JAX array
            are not checked; negative or NaN entries are treated as 0.

    Returns:
        A stateless rule.

    Raises:
        ValueError: If a number is negative or NaN.
        TypeError: If ``value`` is not a number or an array.

    Example:
        >>> import optclip
        >>> tx = optclip.clip_by_rule(optclip.rules.constant(1.0))
    """
    validation.threshold(value=value)
    return stateless(lambda norm, context: limit_at(value, norm), "constant")


def _check_argument(fn: Callable) -> None:
    """Raises an error if ``fn`` can't be called with the step alone."""
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # built-in functions may not have a signature
        return
    try:
        signature.bind(0)
    except TypeError:
        name = getattr(fn, "__name__", type(fn).__name__)
        raise TypeError(
            "A function given as threshold is a schedule: it must take one argument, "
            f"the step, got `{name}{signature}`. A rule with a state is an "
            "`optclip.rules.Rule`, and a function that makes a rule must be called, as "
            "in `optclip.rules.constant(1.0)`."
        ) from None


def schedule(fn: Callable[[jax.Array], Any]) -> Rule:
    """Returns a rule whose threshold is ``fn(step)``, for any Optax schedule ``fn``.

    Args:
        fn: A function from the number of updates so far (int32, 0 at the first update)
            to the threshold. Negative or NaN values are treated as 0.

    Returns:
        A stateless rule; the clip counts the steps.

    Raises:
        TypeError: If ``fn`` can't be called with one argument.

    Example:
        >>> import optax, optclip
        >>> warm_up = optax.linear_schedule(10.0, 1.0, transition_steps=100)
        >>> tx = optclip.clip_by_rule(optclip.rules.schedule(warm_up))
    """
    if not callable(fn):
        raise TypeError(f"`fn` must be a function of the step, got {fn!r}.")
    _check_argument(fn)

    def limit_of(norm, context):
        value = fn(context.step)
        if isinstance(value, tuple):
            raise TypeError(
                "A function given as threshold is a schedule: it must return a number "
                f"for each step, got a {type(value).__name__}. If the function makes a "
                "rule, call it, as in `optclip.rules.constant(1.0)`."
            )
        return limit_at(value, norm)

    return stateless(limit_of, "schedule")


def interval(low: jax.typing.ArrayLike, high: jax.typing.ArrayLike) -> Rule:
    """Returns a rule that clips each entry to between ``low`` and ``high``.

    Args:
        low: The smallest allowed value.
        high: The largest allowed value.

    Returns:
        A stateless rule, for `scopes.element` and real leaves only.

    Raises:
        ValueError: If ``low`` is above ``high``, or either is NaN.
        TypeError: If either is not a number.
    """
    validation.ordered(low=low, high=high)

    def limit_of(norm, context):
        del context
        top, bottom = jnp.asarray(high, norm.dtype), jnp.asarray(low, norm.dtype)
        return Limit(jnp.maximum(jnp.abs(top), jnp.abs(bottom)), top, bottom)

    return stateless(limit_of, "interval")._replace(elements_only=True)


def fixed(value: Any, name: str = "value") -> Rule:
    """Returns the rule for a threshold given as a number, a schedule or a map.

    Args:
        value: A number or array, as in `constant`; a function, as in `schedule`; or a
            map, as in `by_name`.
        name: The name of the value in error messages.

    Returns:
        The rule.

    Raises:
        ValueError: If a number is negative or NaN.
        TypeError: If ``value`` is none of these.

    Example:
        >>> import optclip
        >>> optclip.rules.fixed(1.0).name
        'constant'
    """
    if isinstance(value, Mapping):
        return by_name(value)
    if callable(value):
        return schedule(value)
    validation.threshold(**{name: value})
    return constant(value)


def as_rule(value: Any, name: str) -> Rule:
    """Returns ``value`` if it is a rule, else a rule with ``value`` as threshold."""
    if isinstance(value, Rule):
        return value
    if isinstance(value, tuple):
        raise TypeError(
            f"`{name}` must be a rule of `optclip.rules`, a number, an array, a "
            "schedule or a map from label or path pattern to one of these, got a "
            f"{type(value).__name__}."
        )
    return fixed(value, name)


def _rule_of(name: Any, value: Any) -> Rule:
    """Returns the rule for ``value``, the entry of a table for ``name``."""
    return as_rule(value, f"table[{name!r}]")


def _threshold_of(table: Any, name: Any) -> Any:
    """Looks up the threshold of a group in a table, by label and then by pattern."""
    if not isinstance(table, Mapping):
        return table(name)
    if name in table:
        return table[name]
    return grouping.lookup(table, name, "rule") if isinstance(name, str) else None


def _for_groups(table: Any, names: Sequence[Any]) -> Rule:
    """Returns the rule for groups with the given names, one per row of the norms."""
    values = [_threshold_of(table, name) for name in names]
    missing = [name for name, v in zip(names, values, strict=True) if v is None]
    if missing:
        keys = f" Its keys are {list(table)}." if isinstance(table, Mapping) else ""
        raise ValueError(
            f"`by_name` has no threshold for the group {missing[0]!r}.{keys} Add its "
            'label or a pattern that `re.search` finds in it; "" matches every name, '
            "and inf leaves a group unclipped."
        )
    distinct: list[Any] = []
    which = []
    for value in values:
        same = [k for k, v in enumerate(distinct) if v is value]
        which.append(same[0] if same else len(distinct))
        distinct += [] if same else [value]
    first_names = [names[which.index(k)] for k in range(len(distinct))]
    each = [_rule_of(name, v) for name, v in zip(first_names, distinct, strict=True)]
    if any(r.elements_only or r.for_groups for r in each) and len(each) > 1:
        raise ValueError(
            "`by_name` takes numbers, schedules and rules of norms, got "
            f"`{next(r.name for r in each if r.elements_only or r.for_groups)}`."
        )
    return each[0] if len(each) == 1 else _selected(each, np.asarray(which))


def _selected(each: list[Rule], which: np.ndarray) -> Rule:
    """Returns a rule that applies rule number ``which[i]`` to row i of the norms."""

    def init(norm):
        return tuple(rule.init(norm) for rule in each)

    def update(norm, state, context):
        row = which.reshape(-1, *(1,) * (norm.ndim - 1))
        limits, after = [], []
        for rule, old in zip(each, state, strict=True):
            limit, new = rule.update(norm, old, context)
            limits.append(limit)
            after.append(new)

        def pick(*values):
            out = jnp.broadcast_to(
                jnp.asarray(values[0]).astype(norm.dtype), norm.shape
            )
            for k, value in enumerate(values[1:], 1):
                out = jnp.where(row == k, jnp.asarray(value).astype(norm.dtype), out)
            return out

        return Limit(*map(pick, *(li[:2] for li in limits))), tuple(after)

    return Rule(init, update, "by_name")


class _ByName:
    """The `Rule.for_groups` function of `by_name`.

    It maps the names of groups to their rule.
    """

    def __init__(self, table: Any):
        self.table = table

    def __call__(self, names: Sequence[Any]) -> Rule:
        return _for_groups(self.table, names)

    def check_keys(self, names: Sequence[Any]) -> None:
        """Raises an error if a key is not used by any group, which is likely a typo."""
        table = self.table
        if not isinstance(table, Mapping) or not names:
            return
        # A key that matches every name is a default, which may be unused.
        wide = {k for k in table if isinstance(k, str) and grouping.matches(k, "")}
        keys = {k: k for k in table}
        used = {_threshold_of(keys, name) for name in names}
        unused = [k for k in table if k not in used | wide]
        if unused:
            shown = ", ".join(map(str, names[:5])) + (", ..." if len(names) > 5 else "")
            raise ValueError(
                f"The threshold with the key {unused[0]!r} belongs to no group: the "
                f"groups are {shown}, and the first key that matches a group counts. "
                "Correct the key, put it before a key that matches more, or remove it."
            )


def by_name(table: Mapping[Any, Any] | Callable[[Any], Any]) -> Rule:
    """Returns a rule that gives each group the threshold for its label or path.

    `optclip.clip_by_rule` and clips with a fixed threshold use this rule if the
    threshold is a map, as in ``clip_by_leaf_norm({"embedding": 0.1, "": 1.0})``.

    | scope                   | the key of a group                                    |
    | ----------------------- | ----------------------------------------------------- |
    | label                   | its label, or a pattern that matches its label        |
    | leaf, layer, unit       | a pattern that matches the path of its leaf           |
    | element                 | a pattern that matches the path of its leaf           |
    | tree                    | an error: there is only one group                     |

    A key that equals the name of the group takes precedence. If there is none, the
    first key that matches as a regular expression (with `re.search`) is used; ``""``
    matches every name. A key that is not used for any group is an error, unless it
    matches every name. `optclip.leaf_metrics` returns the threshold of each leaf.

    Args:
        table: A map from labels or patterns to numbers, schedules or rules, or a
            function of the name that returns one of these.

    Returns:
        A rule whose state contains the state of each rule in ``table`` for all groups.

    Raises:
        TypeError: If ``table`` is neither a map nor a function.
        ValueError: If ``table`` is empty or contains a negative number. In ``init``, if
            a group has no threshold, or a key is not used for any group.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> scope = optclip.scopes.label(lambda path: path.split("/")[0])
        >>> tx = optclip.clip_by_rule({"encoder": 5.0, "decoder": 1.0}, scope=scope)
        >>> grads = {"encoder": jnp.array([8.0]), "decoder": jnp.array([8.0])}
        >>> out, _ = tx.update(grads, tx.init(grads))
        >>> float(out["encoder"][0]), float(out["decoder"][0])
        (5.0, 1.0)
    """
    if isinstance(table, Mapping):
        if not table:
            raise ValueError("`table` must have a threshold for each group, got {}.")
        for name, value in table.items():
            _rule_of(name, value)
    elif not callable(table):
        raise TypeError(
            "`table` must be a map from label or pattern to a threshold, or a function "
            f"from the name of a group to its threshold, got {table!r}."
        )

    def unbound(*args):
        raise ValueError(
            "Thresholds by name need groups that have names, which there are not here. "
            "Use them in `optclip.clip_by_rule` and the named clips, in any scope but "
            "`scopes.tree()`."
        )

    return Rule(unbound, unbound, "by_name", for_groups=_ByName(table))
