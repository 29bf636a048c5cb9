"""The thresholds of rules, and errors for invalid arguments."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip
from optclip import rules, scopes

CONTEXT = rules.Context(jnp.int32(2), jnp.float32(9.0), lambda: jnp.array([4.0, 0.0]))
NORM = jnp.array([1.0, 2.0])


def threshold(rule, norm=NORM, context=CONTEXT):
    limit, _ = rule.update(norm, rule.init(norm), context)
    np.testing.assert_array_equal(limit.threshold, limit.target)
    return np.broadcast_to(limit.threshold, norm.shape)


def test_constant_applies_to_every_group():
    np.testing.assert_array_equal(threshold(rules.constant(0.5)), [0.5, 0.5])
    np.testing.assert_array_equal(
        threshold(rules.constant(np.array([1.0, 3.0]))), [1, 3]
    )


def test_negative_and_nan_thresholds_on_device_are_treated_as_zero():
    grads = [jnp.ones(2), jnp.ones(3)]
    for rule in (
        rules.constant(jnp.array([-1.0, jnp.nan])),
        rules.schedule(lambda step: -1.0),
        rules.relative_to_params(jnp.float32(-1.0)),
    ):
        tx = optclip.clip_by_rule(rule, scope=scopes.leaf())
        out, state = tx.update(grads, tx.init(grads), grads)
        np.testing.assert_array_equal(state.groups.group_threshold, [0, 0])
        np.testing.assert_array_equal(np.concatenate(out), np.zeros(5))


def test_schedule_is_evaluated_at_the_current_step():
    rule = rules.schedule(optax.linear_schedule(8.0, 0.0, 4))
    np.testing.assert_array_equal(threshold(rule), [4, 4])


def test_relative_thresholds_are_relative_to_the_parameter_norm_or_the_floor():
    rule = rules.relative_to_params(0.5, floor=0.1)
    np.testing.assert_allclose(threshold(rule), [2.0, 0.05], rtol=1e-6)


def test_interval_bounds_entries_on_both_sides():
    x = jnp.array([-5.0, -0.5, 0.5, 5.0])
    tx = optclip.clip_by_rule(rules.interval(-1.0, 2.0), scope=scopes.element())
    np.testing.assert_array_equal(tx.update(x, tx.init(x))[0], [-1, -0.5, 0.5, 2])


@pytest.mark.parametrize("bounds", [(1.0, 3.0), (-3.0, -1.0)])
def test_interval_need_not_contain_zero(bounds):
    x = jnp.array([-5.0, 0.0, 2.0, 5.0])
    tx = optclip.clip_by_value(bounds)
    np.testing.assert_array_equal(tx.update(x, tx.init(x))[0], np.clip(x, *bounds))


def test_interval_rejects_complex_leaves():
    tx = optclip.clip_by_value((-1.0, 1.0))
    x = jnp.array([1j])
    with pytest.raises(ValueError, match="between two values needs real updates"):
        tx.update(x, tx.init(x))


@pytest.mark.parametrize("value", [-1.0, np.nan, -np.inf, np.array([1.0, -1.0])])
def test_negative_constants_are_errors(value):
    with pytest.raises(ValueError, match="`value` must be >= 0, got"):
        rules.constant(value)


@pytest.mark.parametrize("value", ["1", None, True, 1j])
def test_non_numeric_constants_raise_errors(value):
    with pytest.raises(TypeError, match="`value` must be a number >= 0, got"):
        rules.constant(value)


@pytest.mark.parametrize(
    ("arguments", "name"), [((-0.1, 1.0), "ratio"), ((0.1, -1.0), "floor")]
)
def test_negative_ratios_and_floors_are_errors(arguments, name):
    with pytest.raises(ValueError, match=f"`{name}` must be >= 0, got"):
        rules.relative_to_params(arguments[0], floor=arguments[1])


def test_schedule_must_be_a_function():
    with pytest.raises(TypeError, match="`fn` must be a function of the step"):
        rules.schedule(1.0)


@pytest.mark.parametrize("fn", [lambda: 1.0, lambda norm, state, context: norm])
def test_schedule_with_other_arguments_than_the_step_is_rejected(fn):
    with pytest.raises(TypeError, match="must take one argument, the step, got `<lam"):
        optclip.clip_by_rule(fn)


def test_intervals_must_be_ordered_numbers():
    with pytest.raises(ValueError, match="`low` must be at most `high`"):
        rules.interval(2.0, 1.0)
    with pytest.raises(ValueError, match="must not be NaN"):
        rules.interval(np.nan, 1.0)
    with pytest.raises(TypeError, match="`high` must be a number"):
        rules.interval(0.0, None)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: optclip.adaptive_grad_clip(), "adaptive_grad_clip"),
        (
            lambda: optclip.clip_by_rule(rules.relative_to_params(0.1)),
            "relative_to_params",
        ),
    ],
)
def test_missing_params_raise_an_error_naming_the_transformation(make, name):
    x = jnp.ones(2)
    tx = make()
    with pytest.raises(ValueError, match=f"`{name}` compares the updates"):
        tx.update(x, tx.init(x))


def test_params_of_another_structure_raise_an_error():
    tx = optclip.adaptive_grad_clip()
    x = {"a": jnp.ones(2)}
    with pytest.raises(ValueError, match="`params` must have the structure"):
        tx.update(x, tx.init(x), {"b": jnp.ones(2)})
