"""The report names the operation in which numbers stop being finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optclip
from optclip.diagnosis._origins import origin_of

ONES = jnp.ones(3)


def log_of_zero(params, x):
    return jnp.sum(x * jnp.log(params - x))


def distance(params, x):
    return jnp.sqrt(jnp.sum(jnp.square(params - x)))


def untaken(params, x):
    safe = params > 1
    return jnp.sum(jnp.where(safe, jnp.log(params - x), 0.0))


def labels(params, x):
    scores = jnp.outer(x, params)
    return jnp.mean(jnp.take_along_axis(scores, jnp.array([[0], [1], [7]]), axis=1))


def in_a_scan(params, x):
    def step(state, number):
        return jnp.sin(params) * state + 1 / (3 - number), None

    return jnp.sum(jax.lax.scan(step, x, jnp.arange(6.0))[0])


def in_a_reversed_scan(params, x):
    def step(state, number):
        return jnp.sin(params) * state + 1 / (3 - number), None

    return jnp.sum(jax.lax.scan(step, x, jnp.arange(6.0), reverse=True)[0])


def in_a_branch(params, x):
    return jax.lax.cond(
        params[0] > 0, lambda p: jnp.sum(jnp.exp(1000 * p)), lambda p: jnp.sum(p), x
    )


def in_a_checkpoint(params, x):
    return jax.checkpoint(lambda p: jnp.sum(jax.lax.rsqrt(p - x)))(params)


def intended_infinity(params, x):
    scores = jnp.where(jnp.arange(3) > 1, -jnp.inf, params * x)
    shares = jax.nn.softmax(scores)
    return jnp.sum(shares * jnp.log(shares))


@jax.custom_vjp
def doubled(params):
    return 2 * params


doubled.defvjp(lambda p: (2 * p, p), lambda p, g: (g / (p - 1),))


def in_a_custom_derivative(params, x):
    return jnp.sum(doubled(params) * x)


CASES = [
    (log_of_zero, "log", "inf", False, "return jnp.sum(x * jnp.log(params - x))"),
    (distance, "div", "NaN", True, "return jnp.sqrt(jnp.sum(jnp.square(params - x)))"),
    (untaken, "div", "NaN", True, "return jnp.sum(jnp.where(safe, jnp.log(params - x)"),
    (labels, "gather", "NaN", False, "return jnp.mean(jnp.take_along_axis(scores"),
    (in_a_scan, "div", "inf", False, "return jnp.sin(params) * state + 1 / (3 - num"),
    (in_a_reversed_scan, "div", "inf", False, "return jnp.sin(params) * state + 1 /"),
    (in_a_branch, "exp", "inf", False, "params[0] > 0, lambda p: jnp.sum(jnp.exp(10"),
    (in_a_checkpoint, "rsqrt", "inf", False, "return jax.checkpoint(lambda p: jnp.s"),
    (intended_infinity, "log", "NaN", False, "return jnp.sum(shares * jnp.log(share"),
    (in_a_custom_derivative, "div", "inf", True, ""),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].__name__)
def test_the_first_operation_is_found(case):
    loss_fn, primitive, kind, backward, code = case
    origin = origin_of(loss_fn, ONES, ONES)
    assert origin is not None
    assert origin.primitive == primitive
    assert origin.backward == backward
    assert origin.kind == kind
    assert origin.code.startswith(code)
    if code:
        assert "test_diagnose_origins.py" in origin.line
        assert loss_fn.__name__ in origin.line


def test_finite_functions_have_no_origin():
    assert origin_of(lambda p, x: jnp.sum(p * x), ONES, ONES) is None
    # An infinity that becomes finite again is not an origin.
    assert origin_of(lambda p, x: jnp.sum(p) / jnp.sum(x / 0.0), ONES, ONES) is None


def test_the_report_names_the_line_and_what_to_do():
    found = optclip.diagnose(
        distance, ONES, [ONES] * 4, optimizer=optax.sgd(0.1), progress=False
    )
    (finding,) = found.findings
    assert finding.cause == "not_finite"
    assert finding.basis == "measured"
    words = " ".join(str(finding).split())
    assert "the NaN begins in the derivative of line" in words.replace("The", "the")
    assert "of test_diagnose_origins.py (distance), `return jnp.sqrt(" in words
    assert "apply `jnp.where` to the argument" in words
    assert found.signals["origin"].backward


def test_a_bad_batch_is_named_with_its_operation():
    rng = np.random.default_rng(0)

    def loss_fn(params, batch):
        x, y = batch
        scores = jax.nn.log_softmax(x @ params)
        return -jnp.mean(jnp.take_along_axis(scores, y[:, None], axis=1))

    batches = [
        (rng.normal(size=(16, 4)).astype(np.float32), rng.integers(0, 3, 16))
        for _ in range(8)
    ]
    batches[5][1][2] = 3  # there are three classes
    found = optclip.diagnose(
        loss_fn, jnp.ones((4, 3)), batches, optimizer=optax.sgd(0.1), progress=False
    )
    (finding,) = found.findings
    assert finding.cause == "bad_batch"
    assert finding.where == ("batch 5",)
    assert "`gather` (an index that is out of range)" in finding.evidence


def test_a_flax_model_names_the_line_of_the_loss():
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)

    def loss_fn(params, x):
        out = nnx.merge(graph, params)(x)
        return jnp.sum(jnp.log(0 * out))

    origin = origin_of(loss_fn, params, ONES)
    assert origin is not None
    assert origin.primitive == "log"
    assert origin.code == "return jnp.sum(jnp.log(0 * out))"
