"""`step_taken`: state outside the optimizer can ignore a skipped step."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip

PARAMS = {"a": jnp.ones(2), "b": jnp.ones(3)}
GOOD = PARAMS
BAD_A = {"a": jnp.full(2, jnp.nan), "b": jnp.ones(3)}
BAD_B = {"a": jnp.ones(2), "b": jnp.full(3, jnp.inf)}
WRAP = {
    "skip_steps": lambda tx=None: optclip.skip_steps(tx or optax.adam(0.1)),
    "stabilize": lambda tx=None: optclip.stabilize(tx or optax.adam(0.1)),
}
INSIDE = {
    "chain": lambda tx: optax.chain(optax.identity(), tx),
    "injected": lambda tx: optax.inject_hyperparams(lambda rate: optax.chain(
        tx, optax.scale(rate)))(rate=1.0),
    "partition": lambda tx: optax.partition(
        {"x": tx, "y": WRAP["skip_steps"]()}, {"a": "x", "b": "y"}),
    "within": lambda tx: optclip.skip_steps(tx, when=jnp.inf),
    "around": lambda tx: optclip.stabilize(optax.chain(tx)),
}  # fmt: skip


@pytest.mark.parametrize(
    ("wrapper", "inside"),
    [("stabilize", "chain"), *(("skip_steps", k) for k in INSIDE)],
)
def test_step_taken_works_for_any_nesting_and_inside_jit(wrapper, inside):
    tx = INSIDE[inside](WRAP[wrapper]())

    @jax.jit
    def step(grads, state):
        _, state = tx.update(grads, state, PARAMS)
        return state, optclip.step_taken(state)

    state = tx.init(PARAMS)
    assert bool(optclip.step_taken(state))
    for grads in (GOOD, BAD_A, GOOD, BAD_B, BAD_B, GOOD):
        state, taken = step(grads, state)
        assert taken.dtype == bool
        assert bool(taken) == bool(optclip.step_taken(state)) == (grads is GOOD)


def test_gradient_too_large_to_square_is_not_taken_by_stabilize():
    tx = optclip.stabilize(optax.sgd(0.1))
    huge = jax.tree.map(lambda x: 1e25 * x, PARAMS)
    _, state = jax.jit(tx.update)(huge, tx.init(PARAMS), PARAMS)
    assert not bool(optclip.step_taken(state))
    assert int(optclip.metrics(state)["clip/nonfinite_steps"]) == 0


def test_step_taken_inside_multi_steps_refers_to_the_last_complete_step():
    tx = optax.MultiSteps(optclip.skip_steps(optax.adam(0.1), when=10.0), 2)
    state, taken, step = tx.init(PARAMS), [], jax.jit(tx.update)
    for size in (1.0, 100.0, 1.0, 1.0):
        _, state = step(jax.tree.map(lambda x, n=size: n * x, GOOD), state, PARAMS)
        taken.append(bool(optclip.step_taken(state)))
    assert taken == [True, False, False, True]


def test_step_taken_of_batched_states_is_batched():
    tx = WRAP["skip_steps"]()
    state = jax.vmap(lambda _: tx.init(PARAMS))(jnp.arange(3))
    grads = jax.tree.map(lambda *x: jnp.stack(x), GOOD, BAD_A, GOOD)
    _, state = jax.jit(jax.vmap(lambda g, s: tx.update(g, s, PARAMS)))(grads, state)
    assert optclip.step_taken(state).tolist() == [True, False, True]


@pytest.mark.parametrize(
    "make", [lambda: optclip.clip_by_rule(1.0), lambda: optax.adam(0.1), optax.identity]
)
def test_missing_wrapper_raises_an_error_naming_the_expected_ones(make):
    with pytest.raises(ValueError, match="the state of a `skip_steps` or a `stabilize"):
        optclip.step_taken(make().init(PARAMS))


def test_optimizer_is_not_its_state():
    with pytest.raises(TypeError, match="got the optimizer itself"):
        optclip.step_taken(optclip.skip_steps(optax.adam(0.1)))


# --- recipes, as docs/bad-steps.md gives them -----------------------------------------


def data(bad):
    rng = np.random.default_rng(0)
    batches = [
        (rng.normal(2, 3, (16, 4)).astype(np.float32),
         rng.normal(size=(16, 1)).astype(np.float32)) for _ in range(5)
    ]  # fmt: skip
    worst = np.full((16, 4), np.nan, np.float32), batches[0][1]
    return [*batches[:2], worst, *batches[2:]] if bad else batches


@pytest.mark.parametrize(
    "wrapper", ["skip_steps", pytest.param("stabilize", marks=pytest.mark.slow)]
)
def test_batch_statistics_of_nnx_ignore_a_nan_batch(wrapper):
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.out = nnx.Linear(4, 1, rngs=rngs)

        def __call__(self, x):
            return self.out(self.norm(x))

    @nnx.jit
    def step(model, optimizer, x, y):
        before = jax.tree.map(jnp.copy, nnx.state(model, nnx.BatchStat))

        def loss_fn(model):
            return jnp.mean((model(x) - y) ** 2)

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        if wrapper == "skip_steps":
            optimizer.update(model, grads, loss=loss)
        else:
            optimizer.update(model, grads)
        taken = optclip.step_taken(optimizer.opt_state)
        after = nnx.state(model, nnx.BatchStat)
        nnx.update(
            model, jax.tree.map(lambda b, a: jnp.where(taken, a, b), before, after)
        )
        return loss

    def trained(batches):
        model = Net(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, WRAP[wrapper](), wrt=nnx.Param)
        for x, y in batches:
            step(model, optimizer, x, y)
        return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))

    without, after = trained(data(False)), trained(data(True))
    chex.assert_tree_all_finite(after)
    chex.assert_trees_all_equal(after, without)
    assert np.any(after["norm"]["mean"] != 0)


def test_batch_statistics_of_linen_ignore_a_nan_batch():
    linen = pytest.importorskip("flax.linen")

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(1)(linen.BatchNorm(use_running_average=False)(x))

    net, tx = Net(), WRAP["skip_steps"]()
    first = net.init(jax.random.key(0), data(False)[0][0])

    @jax.jit
    def step(params, stats, opt_state, x, y):
        def loss_fn(params):
            out, new = net.apply(
                {"params": params, "batch_stats": stats}, x, mutable=["batch_stats"]
            )
            return jnp.mean((out - y) ** 2), new["batch_stats"]

        (loss, new), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params, loss=loss)
        taken = optclip.step_taken(opt_state)
        stats = jax.tree.map(lambda a, b: jnp.where(taken, a, b), new, stats)
        return optax.apply_updates(params, updates), stats, opt_state

    def trained(batches):
        params, stats = first["params"], first["batch_stats"]
        state = tx.init(params)
        for x, y in batches:
            params, stats, state = step(params, stats, state, x, y)
        return params, stats

    without, after = trained(data(False)), trained(data(True))
    chex.assert_tree_all_finite(after)
    chex.assert_trees_all_equal(after, without)


def test_external_parameter_average_and_schedule_ignore_a_skipped_step():
    tx = WRAP["skip_steps"](optax.sgd(0.1))
    schedule = optax.linear_schedule(1.0, 0.0, 10)

    @jax.jit
    def step(params, average, steps, opt_state, grads):
        updates, opt_state = tx.update(grads, opt_state, params)
        scale = schedule(steps)
        updates = jax.tree.map(lambda u: scale * u, updates)
        params = optax.apply_updates(params, updates)
        taken = optclip.step_taken(opt_state)
        weight = jnp.where(taken, 0.1, 0.0)
        average = optax.incremental_update(params, average, weight)
        return params, average, steps + taken, opt_state

    def trained(batches):
        carry = PARAMS, PARAMS, jnp.int32(0), tx.init(PARAMS)
        for grads in batches:
            carry = step(*carry, grads)
        return carry[:3]

    without, after = (
        trained([GOOD] * 4),
        trained([GOOD, BAD_A, GOOD, BAD_B, GOOD, GOOD]),
    )
    chex.assert_trees_all_equal(after, without)
    assert int(after[2]) == 4
