"""Common mistakes raise errors that say what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip
from optclip import rules, scopes

PARAMS = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}


def made(update, init=jnp.zeros_like):
    return optclip.clip_by_rule(rules.Rule(init, update, "mine"))


def run(tx):
    return tx.update(PARAMS, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize("value", [-1.0, np.nan])
@pytest.mark.parametrize("scope", [scopes.tree(), scopes.leaf(), scopes.element()])
def test_rule_that_returns_a_negative_or_nan_threshold_clips_to_zero(scope, value):
    rule = rules.Rule(
        lambda norm: (),
        lambda norm, state, context: (rules.Limit(norm * value, norm * value), state),
    )
    out, state = run(optclip.clip_by_rule(rule, scope=scope))
    assert float(optclip.norms.global_norm(out)) == 0
    assert float(state.threshold) == 0


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (lambda n, s, c: rules.Limit(n, n), r"must return \(Limit, state\)"),
        (lambda n, s, c: ((n, n), s), r"must return \(Limit, state\)"),
        (
            lambda n, s, c: (rules.Limit(n, n), (s, s)),
            "state of the structure and shapes",
        ),
        (lambda n, s, c: (rules.Limit(jnp.ones(7), n), s), "must broadcast against"),
    ],
)
def test_invalid_rule_result_raises_an_error_naming_the_rule(update, message):
    with pytest.raises(ValueError, match=message) as caught:
        run(made(update))
    assert "`mine`" in str(caught.value)


def test_state_of_another_transformation_raises_an_error():
    adam = optax.adam(1e-3).init(PARAMS)
    with pytest.raises(TypeError, match="`ClipState` that `init` returned"):
        optclip.clip_by_rule(1.0).update(PARAMS, adam)
    other = optclip.clip_by_global_norm(1.0).init(PARAMS)
    with pytest.raises(ValueError, match="Call `init` again"):
        optclip.norm_growth_limiter(scope=scopes.tree()).update(PARAMS, other)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: optclip.clip_by_rule(optclip.clip_by_rule(1.0)),
            TypeError,
            "`rule` must be a rule",
        ),
        (lambda: optclip.clip_by_rule("abc"), TypeError, "`rule` must be a number"),
        (
            lambda: run(optclip.clip_by_rule(rules.constant)),
            TypeError,
            "makes a rule, call it",
        ),
        (
            lambda: run(optclip.clip_by_rule(rules.window_sigma)),
            TypeError,
            "makes a rule, call it",
        ),
        (
            lambda: optclip.clip_by_rule(1.0, action=optclip.actions.soften),
            TypeError,
            r"call it, as in `action=actions.soften\(\)`",
        ),
        (lambda: optclip.stabilize(1e-3), TypeError, "`optimizer` must be an Optax"),
        (lambda: optclip.u_clip(1.0), TypeError, "`inner_clip` must be an Optax"),
        (lambda: optclip.adagc(-1.0), ValueError, "`lambda_rel` must be >= 0"),
        (lambda: optclip.adagc(beta=1.0), ValueError, "`beta` must be >= 0 and < 1"),
        (lambda: optclip.norm_growth_limiter(-1.0), ValueError, "`gamma` must be"),
        (lambda: optclip.adagn(-1.0), ValueError, "`gamma1` must be >= 0 and < 1"),
        (lambda: optclip.stable_spam_clip(-1.0), ValueError, "`theta` must be"),
        (
            lambda: optclip.stabilize(optax.sgd(1.0), max_ratio=-1.0),
            ValueError,
            "`max_ratio` must be >= 0",
        ),
    ],
)
def test_error_messages_use_the_names_the_user_wrote(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_reader_errors_name_the_missing_argument():
    tx = optclip.clip_by_rule(1.0)
    with pytest.raises(TypeError, match="got the optimizer itself"):
        optclip.metrics(tx)
    adam = optax.adam(1e-3).init(PARAMS)
    message = "no state of a clip.* It contains: ScaleByAdamState, EmptyState"
    assert optclip.metrics(adam) == {}  # as in the run without a clip
    with pytest.raises(ValueError, match=message):
        optclip.nonfinite_leaves(adam, PARAMS)
    with pytest.raises(ValueError, match="It contains: a dict"):
        optclip.nonfinite_leaves(PARAMS)
    with pytest.raises(ValueError, match=r"no metrics per leaf.* contains: ClipState"):
        optclip.leaf_metrics(tx.init(PARAMS), PARAMS)
    leafwise = optclip.clip_by_leaf_norm(1.0).init(PARAMS)
    for reader in (optclip.nonfinite_leaves, optclip.leaf_metrics):
        with pytest.raises(ValueError, match="call it outside of jit"):
            jax.jit(lambda s, r=reader: r(s, PARAMS) and None)(leafwise)


def test_patterns_that_match_no_leaf_raise_errors():
    tree = {"blocks": jnp.ones((2, 3)), "head": jnp.ones(3)}
    with pytest.raises(ValueError, match="`stack_axes` has no pattern that matches"):
        optclip.clip_per_layer(1.0, {"block_s": 1}).init(tree)
    with pytest.raises(ValueError, match="`axis` has no pattern that matches a leaf"):
        optclip.clip_by_unit_norm(1.0, axis={"kernel": 0}).init(tree)
    optclip.clip_per_layer(1.0, {"block_s": 1, "blocks": 1}).init(tree)
    optclip.clip_per_layer(1.0, {}).init(tree)


def test_none_label_raises_an_error_that_suggests_masked():
    scope = optclip.scopes.label(lambda path: path if "w" in path else None)
    with pytest.raises(ValueError, match=r"got None for `b`.*`optax.masked`"):
        optclip.clip_by_rule(1.0, scope=scope).init(
            {"w": jnp.ones(2), "b": jnp.ones(2)}
        )


@pytest.mark.parametrize(
    "make",
    [
        lambda fn: optclip.cap_update(fn),
        lambda fn: optclip.quantile_clip(margin=fn),
        lambda fn: optclip.zclip(max_grad_norm=fn),
        lambda fn: optclip.stabilize(optax.sgd(1.0), max_ratio=fn),
    ],
)
def test_schedules_raise_an_error_where_a_number_is_required(make):
    with pytest.raises(TypeError, match=r"got a function.*`optax.inject_hyperparams`"):
        make(lambda step: 1.0)


def test_schedule_for_per_example_clip_raises_an_actionable_error():
    with pytest.raises(TypeError, match="call `clipped_grad` within the step"):
        optclip.clipped_grad(lambda p, x: p, lambda step: 1.0)


def test_mapping_raises_an_error_where_one_number_is_required():
    with pytest.raises(TypeError, match=r"got a map\..*rules\.by_name"):
        optclip.adaptive_grad_clip({"kernel": 0.01})


def test_rule_that_changes_integer_state_to_float_raises_an_error():
    def update(norm, state, context):
        del context
        return optclip.rules.Limit(norm, norm), state + 0.5

    rule = optclip.rules.Rule(lambda n: jnp.zeros(n.shape, jnp.int32), update, "mine")
    tx = optclip.clip_by_rule(rule)
    with pytest.raises(ValueError, match="the rule `mine` returns real numbers where"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
