"""Scales of each action compared with the oracle, over norms of all magnitudes."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from optclip import actions, rules

NORMS = np.array([0, 1e-37, 1e-20, 1e-3, 0.5, 1, 2, 1e3, 1e7, 1e20, 3e38], np.float32)
ACTIONS = {
    "rescale": actions.rescale,
    "normalize": actions.normalize,
    "zero": actions.zero,
    **{f"soften-{k}": actions.soften(k) for k in ("rational", "tanh", "atan", "sqrt")},
}


def scales(action, threshold):
    limit = rules.Limit(jnp.float32(threshold), jnp.float32(threshold))
    limit = rules.Limit(*(jnp.broadcast_to(v, NORMS.shape) for v in limit[:2]))
    return np.asarray(action(jnp.asarray(NORMS), limit))


@pytest.mark.parametrize("name", ACTIONS)
@pytest.mark.parametrize("threshold", [0.0, 1e-30, 1.0, 1e30, np.inf])
def test_scales_match_the_formula(name, threshold):
    if name == "normalize" and threshold == np.inf:
        return
    got = scales(ACTIONS[name], threshold)
    top = float(np.finfo(np.float32).max)
    wanted = [
        min(
            float(
                oracle.scale(name, oracle.WIDE(n), oracle.WIDE(np.float32(threshold)))
            ),
            top,
        )
        for n in NORMS
    ]
    np.testing.assert_allclose(got, wanted, rtol=3e-6, atol=2e-38)


def test_eps_of_torch_is_added_to_the_norm():
    limit = rules.Limit(jnp.float32(1.0), jnp.float32(1.0))
    got = actions.rescale(jnp.float32(3.0), limit, eps=1.0)
    np.testing.assert_allclose(got, 0.25)
    np.testing.assert_allclose(
        actions.normalize(jnp.float32(3.0), limit, eps=1.0), 0.25
    )
    # Within the threshold, but above it once eps is added.
    np.testing.assert_allclose(actions.rescale(jnp.float32(0.5), limit, eps=1.5), 0.5)


@pytest.mark.parametrize("name", ACTIONS)
def test_derivatives_of_scales_are_finite(name):
    def total(norms):
        limit = rules.Limit(jnp.ones_like(norms), jnp.ones_like(norms))
        return jnp.sum(ACTIONS[name](norms, limit))

    slopes = jax.grad(total)(jnp.asarray(NORMS[NORMS > 1e-20]))
    assert np.all(np.isfinite(slopes))
    assert np.isfinite(jax.grad(total)(jnp.zeros(1))[0])


@pytest.mark.parametrize("name", [n for n in ACTIONS if n != "zero"])
def test_scales_are_invariant_to_rescaling(name):
    norms = jnp.asarray(NORMS[3:9])
    for factor in (2.0**-20, 2.0**20):
        plain = ACTIONS[name](norms, rules.Limit(jnp.ones(6), jnp.ones(6)))
        unit = jnp.full(6, factor)
        np.testing.assert_allclose(
            ACTIONS[name](norms * factor, rules.Limit(unit, unit)), plain, rtol=2e-6
        )


def test_unknown_curve_raises_an_error():
    with pytest.raises(ValueError, match="`kind` must be one of 'rational', 'tanh'"):
        actions.soften("cubic")
