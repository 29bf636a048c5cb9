"""Contract 4: derivatives through a clip are finite everywhere and correct."""

import functools

import every
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import registry

import optclip

CASES = [n for n in registry.CLIPS if n != "clip-zero"]


def tree(size, dtype):
    rng = np.random.default_rng(3)
    shapes = {"blocks": (2, 2, 2), "w": (3, 2)}
    return {k: np.asarray(rng.normal(size=s) * size, dtype) for k, s in shapes.items()}


@functools.cache
def derivative(name):
    """Returns a jitted (updates, threshold, weights, params) -> (value, gradient)."""
    make = registry.CASES[name].make

    def inner(updates, threshold, weights, params):
        tx = make(threshold)
        out, _ = tx.update(updates, make(1.0).init(params), params)
        return sum(jnp.vdot(w, x) for w, x in zip(
            jax.tree.leaves(weights), jax.tree.leaves(out), strict=True))  # fmt: skip

    return jax.jit(jax.value_and_grad(inner))


@pytest.mark.parametrize("name", CASES)
def test_derivatives_equal_finite_differences(name, x64):
    del x64
    params = jax.tree.map(np.ones_like, tree(1.0, np.float64))
    weights = jax.tree.map(lambda x: np.sin(np.arange(x.size)).reshape(x.shape), params)
    way = jax.tree.map(lambda x: np.cos(np.arange(x.size)).reshape(x.shape), params)
    for size, threshold in ((1.0, 0.3), (1.0, 50.0), (1e150, 0.3)):
        updates, step = tree(size, np.float64), 1e-6 * size
        _, slope = derivative(name)(updates, threshold, weights, params)
        ends = [
            derivative(name)(
                jax.tree.map(lambda x, d, h=s * step: x + h * d, updates, way),
                threshold, weights, params,
            )[0]
            for s in (1, -1)
        ]  # fmt: skip
        wanted = float(ends[0] - ends[1]) / (2 * step)
        got = sum(np.vdot(slope[k], way[k]) for k in way)
        lost = 1e-8 * abs(float(ends[0])) / size  # rounding error of the difference
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=lost)


@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_finite_everywhere(name):
    ones = jax.tree.map(np.ones_like, tree(1.0, np.float32))
    zeros = jax.tree.map(np.zeros_like, ones)
    half = {"blocks": np.zeros_like(ones["blocks"]), "w": ones["w"]}
    points = [zeros, half, *(tree(s, np.float32) for s in (1e-30, 1.0, 1e30, 1e37))]
    # At the first point, one leaf's norm is above the largest float32, the other's
    # below.
    points += [jax.tree.map(lambda x, s=s: np.full_like(x, s), ones)
               for s in (1.3e38, 3e38)]  # fmt: skip
    for updates in points:
        for threshold in (0.0, 1.0, np.inf):
            tiny = np.max(updates["w"]) < 1e-20
            if name == "normalize_by_norm" and (tiny or threshold == np.inf):
                continue  # its derivative, target / norm, is beyond float32
            _, slope = derivative(name)(updates, np.float32(threshold), ones, ones)
            assert all(np.all(np.isfinite(s)) for s in slope.values()), threshold
            if threshold == np.inf and name != "normalize_by_norm":
                np.testing.assert_array_equal(slope["w"], ones["w"])


@pytest.mark.parametrize("name", ["clip", "clip-leaf", "soft_clip", "clip_by_value"])
def test_derivative_at_zero_is_that_of_the_identity(name):
    ones = jax.tree.map(np.ones_like, tree(1.0, np.float32))
    zeros = jax.tree.map(np.zeros_like, ones)
    _, slope = derivative(name)(zeros, np.float32(1.0), ones, ones)
    np.testing.assert_array_equal(slope["w"], ones["w"])


# Transformations with memory or an inner optimizer: one update from a warmed-up state.
REMEMBERING = [n for n in every.EVERY if n not in registry.CASES]
WAVE = jax.tree.map(
    lambda x: np.sin(1.0 + np.arange(x.size)).reshape(x.shape), every.numbers("float64")
)
WAY = jax.tree.map(
    lambda x: np.cos(np.arange(x.size)).reshape(x.shape), every.numbers("float64")
)


def memory(state):
    """Returns the state that affects later updates, without a clip's statistics."""

    def kept(node):
        if hasattr(node, "norm_rule_state"):
            return (node.norm_rule_state, memory(node.optimizer_state))
        return node.rule_state if hasattr(node, "rule_state") else node

    def stop(node):
        return hasattr(node, "rule_state") or hasattr(node, "norm_rule_state")

    leaves = jax.tree.leaves(jax.tree.map(kept, state, is_leaf=stop))
    return [x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]


@functools.cache
def stepper(name, dtype):
    """Returns (step, states): the derivative of an update, and states to take it at.

    The step is a jitted (updates, state, share) -> ((value, new state), gradient): the
    value is a weighted sum of the updates, and ``share`` times that of the new memory.
    The states are a fresh one, and one after some steps.
    """
    make = every.EVERY.get(name) or every.VARIANTS[name]
    tx, params = make(), every.numbers(dtype, seed=9)

    def inner(updates, state, share):
        out, after = tx.update(updates, state, params)
        value = sum(jnp.vdot(WAVE[k].astype(x.dtype), x) for k, x in out.items())
        return value + share * sum(jnp.sum(x) for x in memory(after)), after

    step = jax.jit(jax.value_and_grad(inner, has_aux=True))
    states = [tx.init(params)]
    for i in range(8):
        size = 1 + i / 8
        grads = every.numbers(dtype, size, seed=20 + i)
        (_, after), _ = step(grads, states[-1], np.float32(1))
        states = [states[0], after]
    return step, states


def quickly(*quick):
    return [
        pytest.param(n, marks=() if n in quick else pytest.mark.exhaustive)
        for n in REMEMBERING
    ]


def points(dtype="float32"):
    ones = every.numbers(dtype, seed=3)
    zeros = jax.tree.map(np.zeros_like, ones)
    yield 0.0, zeros
    yield 0.5, {**ones, "kernel": zeros["kernel"], "bias": zeros["bias"]}
    for size in (1e-38, 1e-30, 1e-20, 1e-5, 1.0, 1e2, 1e10, 1e20, 1e30, 1e37):
        yield size, every.numbers(dtype, size, seed=3)
    yield 3e38, jax.tree.map(lambda x: np.full_like(x, 3e38), ones)


@pytest.mark.parametrize(
    "name",
    quickly(
        "adamw_clip", "scale_by_stable_adam", "skip_steps", "spectral_clip",
        "spectral_clip-hardcap", "spectral_clip-soft", "stable_spam_clip", "zclip",
    ),
)  # fmt: skip
def test_derivatives_through_a_memory_are_finite_everywhere(name):
    step, states = stepper(name, "float32")
    for state, start in zip(states, ("fresh", "warmed up"), strict=True):
        for size, updates in points():
            _, slope = step(updates, state, np.float32(1))
            assert all(np.all(np.isfinite(x)) for x in slope.values()), (start, size)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", every.VARIANTS)
def test_derivatives_through_options_are_finite_everywhere(name):
    test_derivatives_through_a_memory_are_finite_everywhere(name)


@pytest.mark.parametrize(
    "name", quickly("autoclip", "spectral_clip-hardcap", "stable_spam_clip", "zclip")
)
def test_derivatives_through_a_memory_equal_finite_differences(name, x64):
    del x64
    step, (_, state) = stepper(name, "float64")
    # Stable Adam computes in float32, whatever the gradients are.
    narrow = name == "scale_by_stable_adam"
    nudge, rtol = (1e-3, 1e-3) if narrow else (1e-4, 1e-4)
    for size in (0.1, 1.7, 30.0):
        updates = every.numbers("float64", size, seed=3)
        _, slope = step(updates, state, np.float32(0))
        ends = [
            step(
                jax.tree.map(lambda x, d, h=s * nudge * size: x + h * d, updates, WAY),
                state, np.float32(0),
            )[0][0]
            for s in (1, -1)
        ]  # fmt: skip
        wanted = float(ends[0] - ends[1]) / (2 * nudge * size)
        got = sum(np.vdot(slope[k], WAY[k]) for k in WAY)
        np.testing.assert_allclose(got, wanted, rtol=rtol, atol=1e-9, err_msg=f"{size}")


def example_loss(params, x):
    return jnp.sum(jnp.tanh(params["w"] * x)) + params["b"] * x[0]


def test_derivatives_through_per_example_clip(x64):
    """Derivatives with respect to the parameters, as a meta-optimizer needs them."""
    del x64
    f = optclip.clipped_grad(example_loss, 1.0, microbatch_size=2)

    @jax.jit
    @jax.value_and_grad
    def value_and_slope(params, x):
        grads, _ = f(params, x)
        return jnp.vdot(np.sin([1.0, 2.0, 3.0]), grads["w"]) + grads["b"]

    params = {"w": np.float64([0.3, -0.2, 0.1]), "b": np.float64(0.5)}
    for size in (0.0, 1e-30, 1.0, 1e30):
        x = size * np.random.default_rng(0).normal(size=(5, 3))
        _, slope = value_and_slope(params, x)
        assert all(np.all(np.isfinite(s)) for s in slope.values()), size
        for key, way in (("w", np.cos(np.arange(3))), ("b", 1.0)):
            ends = [
                value_and_slope(params | {key: params[key] + h * way}, x)[0]
                for h in (1e-6, -1e-6)
            ]
            wanted = float(ends[0] - ends[1]) / 2e-6
            np.testing.assert_allclose(np.vdot(slope[key], way), wanted, 1e-6, 1e-8)
