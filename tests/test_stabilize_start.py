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


OPTAX = {
    "adam": (lambda: optax.adam(1e-2), True),
    "adamw-large-eps": (lambda: optax.adamw(1e-2, eps=1e-3), True),
    "lion": (lambda: optax.lion(1e-3), True),
    "muon": (lambda: optax.contrib.muon(1e-2), True),
    "rmsprop": (lambda: optax.rmsprop(1e-2), True),
    "adafactor": (lambda: optax.adafactor(1e-2), True),
    "sign": (lambda: optax.sign_sgd(1e-2), True),
    "clip-adam": (
        lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
        True,
    ),
    "warm-up": (lambda: optax.adam(SCHEDULE), True),
    "injected": (OPTIMIZERS["injected"], True),
    "sgd": (lambda: optax.sgd(1e-2), False),
    "momentum": (OPTIMIZERS["sgd-momentum"], False),
    "partition": (OPTIMIZERS["partition"], False),  # one of two is SGD
    # The decay is added to the gradients.
    "l2": (
        lambda: optax.chain(optax.add_decayed_weights(0.1), optax.adam(1e-2)),
        False,
    ),
    # Its accumulator starts at 0.1.
    "adagrad": (lambda: optax.adagrad(1e-2), False),
    "frozen": (lambda: optax.set_to_zero(), False),
    "needs-the-loss": (lambda: optax.polyak_sgd(), False),
    "line-search": (lambda: optax.lbfgs(), False),
}


@pytest.mark.parametrize("name", OPTAX)
def test_gradients_are_normalized_if_the_optimizer_ignores_their_scale(name):
    make, ignores = OPTAX[name]
    assert int(optclip.stabilize(make()).init(PARAMS).normalizes) == ignores


@pytest.mark.parametrize("given", [True, False])
def test_normalize_overrides_the_test_of_the_optimizer(given):
    for make in (optax.adam, optax.sgd):
        tx = optclip.stabilize(make(1e-2), normalize=given)
        assert int(tx.init(PARAMS).normalizes) == given
    with pytest.raises(
        TypeError, match=r"`normalize` must be True, False or None, got"
    ):
        optclip.stabilize(optax.sgd(1e-2), normalize="yes")


def test_the_optimizer_is_tested_wherever_init_runs():
    tx = optclip.stabilize(optax.adam(1e-2))
    assert int(jax.jit(tx.init)(PARAMS).normalizes) == 1
    assert jax.eval_shape(tx.init, PARAMS).normalizes.shape == ()
    with jax.transfer_guard("disallow"):
        assert int(jax.device_get(jax.jit(tx.init)(PARAMS).normalizes)) == 1

    def flags(rate):  # a traced learning rate
        return [
            optclip.stabilize(make(rate)).init(PARAMS).normalizes
            for make in (optax.adam, optax.sgd)
        ]

    adam, sgd = jax.vmap(flags)(jnp.array([1e-3, 1.0]))
    assert adam.tolist() == [1, 1]
    assert sgd.tolist() == [0, 0]


def test_what_the_optimizer_receives_is_the_clipped_gradient_over_a_running_mean():
    rng = np.random.default_rng(0)
    norms = np.exp(rng.normal(size=300)) * np.geomspace(1e3, 1.0, 300)
    norms[[3, 50, 220]] *= 1e6
    norms[[10, 60]] = 0.0
    norms[[20, 250]] = np.nan
    # SGD without a cap returns what it receives.
    tx = optclip.stabilize(
        optax.sgd(-1.0), normalize=True, max_ratio=jnp.inf, warmup_steps=0
    )

    def step(state, norm):
        updates, state = tx.update(of_norm(norm), state, PARAMS)
        norm = jnp.sqrt(sum(jnp.sum(u**2) for u in updates.values()))
        return state, (norm, state.gradient_clip.norm_after)

    end, (received, clipped) = jax.lax.scan(
        step, tx.init(PARAMS), jnp.asarray(norms, jnp.float32)
    )
    mean, count, wanted = 0.0, 0, []
    for norm, after in zip(norms, np.asarray(clipped, np.float64), strict=True):
        if np.isfinite(norm) and norm > 0:
            count += 1
            change = max(0.1, 1 / count) * (np.log(after) - mean)
            mean += max(change, -0.002) if count > 200 else change
        wanted.append(after / np.exp(mean) if np.isfinite(norm) else 0.0)
    np.testing.assert_allclose(received, wanted, rtol=2e-5)
    assert int(end.averaged_norms) == count == 296
    np.testing.assert_allclose(end.log_norm, mean, rtol=1e-5)


def test_large_gradients_at_the_start_do_not_slow_adam_down():
    # The gradients of the first 20 steps fall by a factor of 1e4. In the second moment
    # of Adam, they outweigh all later ones for a thousand steps.
    sizes = jnp.concatenate([jnp.geomspace(1e4, 1.0, 20), jnp.ones(180)])

    def moved(tx):
        def step(carry, size):
            params, state = carry
            updates, state = tx.update({"w": jnp.full(3, size)}, state, params)
            return (optax.apply_updates(params, updates), state), None

        params = {"w": jnp.full(3, 100.0)}
        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), sizes)
        return float(100.0 - params["w"][0])

    adam = optax.adam(1e-2)
    constant = moved(optax.chain(optax.clip_by_global_norm(1.0), adam))
    assert moved(optclip.stabilize(adam)) > 0.9 * constant
    assert moved(optclip.stabilize(adam, normalize=False)) < 0.5 * constant


def test_adam_still_converges_at_a_constant_learning_rate():
    loss, state = regression(optclip.stabilize(optax.adam(1e-2)))(1.0)
    assert int(state.normalizes) == 1
    assert float(loss) < 1e-9


def test_an_optimizer_that_heeds_the_scale_receives_the_clipped_gradients():
    rng = np.random.default_rng(1)
    # Subnormal numbers would be flushed by a product with 1.
    grads = np.float32(rng.normal(size=(40, 3)) * [1e-39, 1.0, 1.0])
    assert (grads[:, 0] != 0).all()
    tx = optclip.stabilize(optax.identity(), max_ratio=jnp.inf)
    clip = optclip.quantile_clip(nonfinite="skip")
    state, clip_state = tx.init(PARAMS["w"]), clip.init(PARAMS["w"])
    unclipped = 0
    for grad in map(jnp.asarray, grads):
        out, state = tx.update(grad, state, PARAMS["w"])
        wanted, clip_state = clip.update(grad, clip_state)
        # Compared as bits, since a comparison of numbers may treat subnormals as 0.
        bits = [np.asarray(x).view(np.int32).tolist() for x in (out, wanted, grad)]
        assert bits[0] == bits[1]
        unclipped += bits[1] == bits[2]
    assert unclipped > 0
