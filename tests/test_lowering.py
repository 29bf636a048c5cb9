"""Every public transformation lowers for every platform, without leaving XLA.

A jitted AdamW step is exported as one module for all platforms. The module must not
contain Python callbacks or custom calls.
"""

import inspect
import re

import adaptive
import jax
import jax.numpy as jnp
import optax
import pytest
from jax import export, lax
from jax.extend.core import jaxprs_in_params

import optclip
from optclip import actions, rules, scopes

PLATFORMS = ["cpu", "cuda", "rocm", "tpu"]

# Names of `optclip.__all__` that are not transformations: modules, states, readers.
READERS = {
    "nonfinite_leaves", "diagnose", "leaf_metrics", "metrics", "clipped_grad", "report",
    "state_specs", "step_taken", "suggest_threshold", "tap",
}  # fmt: skip
# Stateless functions of gradients.
PURE = {
    "clip_grad_norm": lambda g: optclip.clip_grad_norm(g, 1.0)[0],
    "clip_grad_value": lambda g: optclip.clip_grad_value(g, 1.0),
}
EVERY_SCOPE = {
    "tree": scopes.tree(),
    "leaf": scopes.leaf(),
    "layer": scopes.layer({"blocks": 1}),
    "unit": scopes.unit(),
    "element": scopes.element(),
    "label": scopes.label(lambda path: path[:1]),
}
SAMPLES = {
    "adaptive_grad_clip": [lambda: optclip.adaptive_grad_clip(0.01)],
    "clip_by_rule": [
        *(lambda s=s: optclip.clip_by_rule(1.0, scope=s) for s in EVERY_SCOPE.values()),
        *(
            lambda p=p: optclip.clip_by_rule(1.0, nonfinite=p, scope=scopes.leaf())
            for p in ("zero", "drop", "skip")
        ),
        lambda: optclip.clip_by_rule(optax.linear_schedule(2.0, 1.0, 10), ord=3),
        lambda: optclip.clip_by_rule(
            rules.relative_to_params(0.1), action=actions.zero
        ),
        lambda: optclip.clip_by_rule(1.0, update_dtype=jnp.float32, ord=1),
        lambda: optclip.clip_by_rule(1.0, ord=float("inf")),
    ],
    "clip_by_block_rms": [lambda: optclip.clip_by_block_rms(1.0)],
    "clip_by_global_norm": [
        lambda: optclip.clip_by_global_norm(1.0),
        lambda: optclip.clip_by_global_norm(1.0, eps=1e-6),
    ],
    "clip_by_leaf_norm": [lambda: optclip.clip_by_leaf_norm(1.0)],
    "clip_by_unit_norm": [lambda: optclip.clip_by_unit_norm(1.0)],
    "clip_by_value": [
        lambda: optclip.clip_by_value(1.0),
        lambda: optclip.clip_by_value((-1.0, 2.0)),
    ],
    "clip_per_layer": [lambda: optclip.clip_per_layer(1.0, {"blocks": 1})],
    "record_norms": [optclip.record_norms],
    "normalize_by_norm": [lambda: optclip.normalize_by_norm(1.0)],
    **{
        name.split("-")[0]: [case.make]
        for name, case in adaptive.ADAPTIVE.items()
        if not name.startswith("spectral_clip")
    },
    "soft_clip": [
        lambda kind=kind: optclip.soft_clip(1.0, kind=kind)
        for kind in ("rational", "tanh", "atan", "sqrt")
    ],
}
PARAMS = {
    "blocks": jnp.ones((3, 4, 5)),
    "kernel": jnp.ones((4, 5)),
    "kernel_too": jnp.ones((4, 5)),
    "bias": jnp.ones(5),
    "half": jnp.ones(5, jnp.bfloat16),
    "scale": jnp.ones([]),
}


def public_transformations():
    names = [n for n in optclip.__all__ if inspect.isfunction(getattr(optclip, n))]
    return set(names) - READERS


def adamw_step(tx):
    optimizer = optax.chain(tx, optax.adamw(1e-3))

    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, optclip.metrics(state)

    return step, optimizer.init


def assert_lowers_everywhere(step, *arguments):
    # Export itself rejects callbacks and unstable custom calls.
    exported = export.export(jax.jit(step), platforms=PLATFORMS)(*arguments)
    assert list(exported.platforms) == PLATFORMS
    # Locations contain function names, including the name of this test.
    lines = exported.mlir_module().splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#loc"))
    text = re.sub(r"loc\(.*\)", "", text)
    assert "stablehlo." in text
    assert "custom_call" not in text
    assert "callback" not in text


def test_every_public_transformation_has_a_sample():
    # The spectral clip needs a decomposition, which is a custom call.
    assert public_transformations() == {*SAMPLES, *PURE, "spectral_clip"}


EACH = [
    pytest.param(make, id=f"{name}-{i}")
    for name, makers in SAMPLES.items()
    for i, make in enumerate(makers)
]


@pytest.mark.parametrize("make", EACH)
def test_step_lowers_for_every_platform_without_custom_calls(make):
    step, init = adamw_step(make())
    state = jax.eval_shape(init, PARAMS)
    assert_lowers_everywhere(step, PARAMS, state, PARAMS)


def conditions(jaxpr, platform):
    """Returns the conditions that remain when a program is lowered for a platform."""
    found = []
    for eqn in jaxpr.eqns:
        inside = list(jaxprs_in_params(eqn.params))
        platforms = eqn.params.get("branches_platforms")
        if eqn.primitive.name == "cond" and platforms is None:
            found.append(eqn)
        elif platforms is not None:
            chosen = [p is None or platform in p for p in platforms].index(True)
            inside = [eqn.params["branches"][chosen].jaxpr]
        for inner in inside:
            found += conditions(getattr(inner, "jaxpr", inner), platform)
    return found


def conditions_of(make, platform):
    step, init = adamw_step(make())
    state = jax.eval_shape(init, PARAMS)
    return conditions(jax.make_jaxpr(step)(PARAMS, state, PARAMS).jaxpr, platform)


# On a GPU, several sums over columns need more than one pass, so each array of norms
# per column has a condition. `adaptive_grad_clip` also measures parameters.
COLUMNS = {"clip_by_rule-3": 1, "clip_by_unit_norm-0": 1, "adaptive_grad_clip-0": 2}


@pytest.mark.parametrize("make", EACH)
def test_step_has_no_condition_on_an_accelerator(make, request):
    # With a condition, the host would wait to learn which branch to launch.
    assert not conditions_of(make, "tpu")
    by_column = COLUMNS.get(request.node.callspec.id, 0)
    assert len(conditions_of(make, "cuda")) == by_column


def test_condition_is_detected():
    jaxpr = jax.make_jaxpr(lambda x: lax.cond(x > 0, lambda: x, lambda: -x))(1.0).jaxpr
    assert conditions(jaxpr, "cuda")


@pytest.mark.parametrize("name", PURE)
def test_pure_functions_lower_for_every_platform_without_custom_calls(name):
    assert_lowers_everywhere(PURE[name], PARAMS)


@pytest.mark.parametrize("method", ["hardcap", "soft"])
def test_spectral_clips_by_matrix_products_lower_everywhere(method):
    step, init = adamw_step(optclip.spectral_clip(1.0, method=method))
    state = jax.eval_shape(init, PARAMS)
    assert_lowers_everywhere(step, PARAMS, state, PARAMS)


def test_custom_call_is_detected():
    def orthogonal(x):
        return jnp.linalg.qr(x)

    with pytest.raises(AssertionError, match="custom_call"):
        assert_lowers_everywhere(orthogonal, PARAMS["kernel"])


def test_callback_is_detected():
    def calling_back(x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(lambda x: x, shape, x)

    with pytest.raises(NotImplementedError, match="callback"):
        assert_lowers_everywhere(calling_back, PARAMS["kernel"])
