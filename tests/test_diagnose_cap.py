"""A cap on the update that holds training back is a finding, one that helps is not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip
from optclip.diagnosis._outside import excess_of

RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 64, 8)).astype(np.float32)
BATCHES = [(x, (x @ np.arange(1.0, 9.0)).astype(np.float32)) for x in X]


def loss_fn(params, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["first"])
    return jnp.mean(jnp.square((hidden @ params["last"])[:, 0] - y))


def trained(tx, steps):
    """Returns (params, opt_state) after some steps."""
    keys = jax.random.split(jax.random.key(0))
    params = {
        "first": jax.random.normal(keys[0], (8, 32)) / 8**0.5,
        "last": jax.random.normal(keys[1], (32, 1)) / 32**0.5,
    }
    state = tx.init(params)

    @jax.jit
    def step(params, state, batch):
        updates, state = tx.update(jax.grad(loss_fn)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    for number in range(steps):
        params, state = step(params, state, BATCHES[number % 8])
    return params, state


def diagnosed(tx, steps=60):
    params, state = trained(tx, steps)
    return optclip.diagnose(
        loss_fn, params, BATCHES, optimizer=tx, opt_state=state, progress=False
    )


@pytest.mark.parametrize(
    "tx",
    [
        optclip.stabilize(optax.adam(1e-2), max_ratio=1e-4),
        optax.chain(optax.adam(1e-2), optclip.cap_update(1e-4)),
    ],
    ids=["stabilize", "cap_update"],
)
def test_a_cap_that_is_too_low_is_found(tx):
    found = diagnosed(tx)
    assert [f.cause for f in found.findings] == ["update_cap"]
    (finding,) = found.findings
    ((kind, amount),) = [(r.kind, r.amount) for r in finding.remedies]
    assert (kind, amount) == ("scale_cap", 100.0)
    assert "with updates 100 times as large" in finding.evidence
    assert "`max_ratio` of `optclip.stabilize`" in finding.remedy
    # The update of Adam is about 1e-2, and the cap 1e-4 of parameters of about 0.3.
    assert 100 < found.signals["update_relative_to_cap"] < 1000
    # The remedy does what the finding says.
    losses = found.signals["rehearsals_above_cap"][100.0]
    assert len(losses) == 12
    assert np.mean(losses[-4:]) < np.mean(found.signals["rehearsals"][1.0][-4:])


def test_a_cap_that_prevents_divergence_is_not_a_finding():
    tx = optclip.stabilize(optax.sgd(10.0))
    assert excess_of(trained(tx, 400)[1]) > 2
    causes = [f.cause for f in diagnosed(tx, 400).findings]
    assert "update_cap" not in causes


def test_a_cap_that_is_not_active_is_not_tried():
    found = diagnosed(optclip.stabilize(optax.adam(1e-3)))
    assert found.healthy, str(found)
    assert found.signals["rehearsals_above_cap"] == {}
    assert excess_of(optax.adam(1e-3).init(jnp.ones(3))) == 1
