"""`stabilize` survives a bad start with any optimizer."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip

SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 50, 2000)
OPTIMIZERS = {
    "adam": lambda: optax.adam(1e-2),
    "adamw-schedule": lambda: optax.adamw(SCHEDULE, weight_decay=1e-4),
    "sgd-momentum": lambda: optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "multi-steps": lambda: optax.MultiSteps(
        optax.adam(1e-2), 2
    ).gradient_transformation(),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(1e-2),
    # The `init` of this one copies the parameters.
    "schedule-free": lambda: optax.contrib.schedule_free_sgd(1e-2),
    "partition": lambda: optax.partition(
        {"a": optax.adam(1e-2), "b": optax.sgd(1e-2)}, {"w": "a", "b": "b"}
    ),
}  # fmt: skip


def regression(tx, steps=2000, bad=3):
    """Returns a function from the scale of the first gradients to the last loss."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(256, 10)), jnp.float32)
    wanted = x @ jnp.asarray(rng.normal(size=10), jnp.float32) + 0.5
    rows = jnp.asarray(rng.integers(0, 256, (steps, 32)))

    def loss_of(params, rows):
        return jnp.mean(jnp.square(x[rows] @ params["w"] + params["b"] - wanted[rows]))

    @jax.jit
    def last(size):
        def step(carry, batch):
            params, state = carry
            t, rows = batch
            grads = jax.grad(loss_of)(params, rows)
            grads = jax.tree.map(lambda g: jnp.where(t < bad, size * g, g), grads)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        params = {"w": jnp.full(10, 0.1), "b": jnp.zeros([])}
        (params, state), _ = jax.lax.scan(
            step, (params, tx.init(params)), (jnp.arange(steps), rows)
        )
        return loss_of(params, jnp.arange(256)), state

    return last


QUICK = ("adam", "adamw-schedule", "sgd-momentum", "schedule-free")


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in OPTIMIZERS],
)
def test_three_too_large_initial_gradients_are_forgotten(name):
    last = regression(optclip.stabilize(OPTIMIZERS[name]()))
    without, _ = last(1.0)
    for size in (100.0, 1e4, 1e12, 1e30):
        loss, state = last(size)
        assert float(loss) < 1.5 * float(without) + 1e-8, size
        assert int(state.restarts) == (size < 1e18)  # otherwise these steps are skipped
    if name == "adam":  # as good as a fixed, suitable bound
        clipped = optax.chain(optax.clip_by_global_norm(1.0), OPTIMIZERS[name]())
        assert float(loss) < float(regression(clipped)(1e4)[0]) + 1e-9


PARAMS = {"w": jnp.ones(3), "b": jnp.ones(2)}


def of_norm(norm):
    return {"w": jnp.array([0.0, 0.6, 0.0]) * norm, "b": jnp.array([0.8, 0]) * norm}


ADAMW = optclip.stabilize(optax.adamw(1e-2))
STEP = jax.jit(lambda g, s: ADAMW.update(g, s, PARAMS))


def stepped(norms):
    state = ADAMW.init(PARAMS)
    for norm in norms:
        _, state = STEP(of_norm(norm), state)
    return state


def test_optimizer_restarts_from_its_initial_state_after_a_bad_start():
    late = stepped([1e4, 3e4, 1.0, 2.0, 1.5])
    fresh = stepped([1.0, 2.0, 1.5])
    chex.assert_trees_all_equal(late.optimizer_state, fresh.optimizer_state)
    assert int(late.restarts) == 1
    assert int(fresh.restarts) == 0
    # The cap starts over as well: neither its ramp nor its average sees the bad start.
    chex.assert_trees_all_equal(late.update_cap.rule_state, fresh.update_cap.rule_state)
    assert int(late.update_cap.rule_state[0].recorded) == 3


@pytest.mark.parametrize(
    ("norms", "restarts"),
    [
        ([1.0, 0.3, 2.0, 0.25, 0.9, 1.0], 0),  # noise
        ([0.0, 1.0, 0.0, 1.0, 1.0, 1.0], 0),  # zeros carry no information
        ([1.0, 1.0, 1.0, 1.0, 1.0, 0.001], 0),  # after the warm-up
        ([1e-20, 1e20, 1.0, 1.0, 1.0, 1.0], 0),  # large, but not the first
        ([1e6, 1e3, 1.0, 1.0, 1.0, 1.0], 2),
        ([jnp.nan, 1e3, jnp.inf, 1.0, 1.0, 1.0], 1),
    ],
)
def test_what_counts_as_a_bad_start(norms, restarts):
    assert int(stepped(norms).restarts) == restarts


def test_hyperparameters_set_by_the_training_loop_are_kept():
    inner = optax.chain(
        optax.clip_by_global_norm(1e6),
        optax.inject_hyperparams(
            lambda rate: optax.chain(
                optax.scale_by_adam(),
                optax.inject_hyperparams(optax.scale)(step_size=-1.0),
                optax.scale(rate),
            )
        )(rate=0.1),
    )
    tx = optclip.stabilize(inner)
    state = tx.init(PARAMS)
    inside = state.optimizer_state[1]
    inside.hyperparams["rate"] = jnp.float32(0.3)
    inside.inner_state[1].hyperparams["step_size"] = jnp.float32(-2.0)
    for norm in (1e3, 1.0):
        _, state = jax.jit(tx.update)(of_norm(norm), state, PARAMS)
    assert int(state.restarts) == 1
    inside = state.optimizer_state[1]
    assert float(inside.hyperparams["rate"]) == np.float32(0.3)
    assert float(inside.inner_state[1].hyperparams["step_size"]) == -2
    assert int(inside.inner_state[0].count) == 1


def test_counters_saturate():
    end = jnp.int32(np.iinfo(np.int32).max)
    state = ADAMW.init(PARAMS)._replace(
        least_norm=jnp.float32(1.0), taken_steps=end, skipped_run=end, restarts=end
    )
    for norm in (jnp.nan, 1e-3):
        _, state = STEP(of_norm(norm), state)
    assert int(state.taken_steps) == int(state.restarts) == end
    assert int(state.skipped_run) == 0
    _, state = STEP(of_norm(jnp.nan), state._replace(skipped_run=end))
    assert int(state.skipped_run) == end


def test_missing_parameters_raise_an_actionable_error():
    tx = optclip.stabilize(optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"call `update\(grads, state, params\)` in"):
        tx.update(PARAMS, tx.init(PARAMS))


def test_optimizers_with_a_line_search_work_without_a_cap():
    curvature = jnp.array([1.0, 10.0, 100.0])

    def loss_of(w):
        return jnp.sum(curvature * jnp.square(w - 3.0))

    def last(tx):
        @jax.jit
        def step(carry, _):
            w, state = carry
            value, grads = jax.value_and_grad(loss_of)(w)
            updates, state = tx.update(
                grads, state, w, value=value, grad=grads, value_fn=loss_of
            )
            return (optax.apply_updates(w, updates), state), None

        first = jnp.ones(3), tx.init(jnp.ones(3))
        return float(loss_of(jax.lax.scan(step, first, None, length=20)[0][0]))

    assert last(optclip.stabilize(optax.lbfgs())) > 50  # as its docstring says
    assert last(optclip.stabilize(optax.lbfgs(), max_ratio=jnp.inf)) < 1e-6
