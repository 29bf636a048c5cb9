"""`cap_update`: the bound, its ramp, its floor, and its memory of persistent excess."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip
from optclip import rules, scopes


class Oracle:
    """The rule from its formula, in NumPy float64."""

    def __init__(self, ratio=0.04, ramp_steps=200, lasting=True):
        self.ratio, self.ramp_steps, self.lasting = ratio, ramp_steps, lasting
        self.mean, self.count = 1.0, 0

    def scale(self, r, w, floor):
        self.count += 1
        cap = self.ratio * max(w, floor)
        seen = min(r / cap, 3 * max(self.mean, 1))
        self.mean += (seen - self.mean) / self.count
        missing = max(0, 1 - self.count / max(self.ramp_steps, 1))
        factor = min(1, (cap - self.ratio * w * missing) / r)
        return min(factor, 1 / max(self.mean, 1)) if self.lasting else factor


def rms(x):
    return float(np.sqrt(np.mean(np.square(np.float64(x)))))


@pytest.mark.parametrize(
    "options", [{}, {"ramp_steps": 0}, {"lasting": False}, {"ratio": 0.5}]
)
def test_updates_match_the_formula(options):
    rng = np.random.default_rng(0)
    tx, oracle = optclip.cap_update(floor=0.1, **options), Oracle(**options)
    params = jnp.float32(rng.standard_normal(30))
    state, step = tx.init(params), jax.jit(tx.update)
    for k in range(300):
        size = np.exp(rng.normal(-2 - k / 100, 1.5))
        updates = np.float32(size * rng.standard_normal(30))
        out, state = step(updates, state, params)
        expected = updates * oracle.scale(rms(updates), rms(params), 0.1)
        np.testing.assert_allclose(out, expected, rtol=2e-6)
    np.testing.assert_allclose(state.rule_state[0].mean_excess, oracle.mean, rtol=2e-6)
    assert state.rule_state[0].recorded == 300


def test_bound_by_hand():
    params, updates = jnp.full(4, 2.0), jnp.full(4, 1.0)
    tx = optclip.cap_update(0.1, floor=0.5, ramp_steps=0, lasting=False)
    out, _ = tx.update(updates, tx.init(params), params)
    np.testing.assert_allclose(out, np.full(4, 0.2), rtol=1e-6)
    zeros = jnp.zeros(4)
    out, _ = tx.update(updates, tx.init(zeros), zeros)
    np.testing.assert_allclose(out, np.full(4, 0.05), rtol=1e-6)


def test_ramp_rises_linearly_but_not_for_zero_parameters():
    tx = optclip.cap_update(0.1, floor=1.0, ramp_steps=4, lasting=False)
    for size, expected in ((1.0, [0.025, 0.05, 0.075, 0.1, 0.1]), (0.0, [0.1] * 5)):
        params, got = jnp.full(3, size), []
        state = tx.init(params)
        for _ in range(5):
            out, state = tx.update(jnp.ones(3), state, params)
            got.append(float(out[0]))
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_persistent_excess_is_divided_out_so_that_a_schedule_still_decays_updates():
    tx = optclip.cap_update(0.1, floor=1.0, ramp_steps=0)
    params = jnp.ones(3)
    state, step = tx.init(params), jax.jit(tx.update)
    for _ in range(400):
        out, state = step(jnp.full(3, 5.0), state, params)
    before = float(out[0])
    assert before == pytest.approx(0.1, rel=0.05)
    # 100 times the cap is 2 times the previous updates, and 20 times is 0.4 times.
    out, _ = step(jnp.full(3, 2.0), state, params)
    assert float(out[0]) == pytest.approx(0.4 * before, rel=0.05)
    plain = optclip.cap_update(0.1, floor=1.0, ramp_steps=0, lasting=False)
    out, _ = plain.update(jnp.full(3, 2.0), plain.init(params), params)
    assert float(out[0]) == pytest.approx(0.1)


def test_average_excess_rises_no_faster_than_its_bound():
    tx, params = optclip.cap_update(floor=1.0), jnp.ones(3)
    state = tx.init(params)
    for k in range(1, 6):
        _, state = tx.update(jnp.full(3, 1e10), state, params)
        # 3, 6, 10, 15, 21: each step counts as three times the average.
        found = float(state.rule_state[0].mean_excess)
        assert found == pytest.approx((k + 1) * (k + 2) / 2)


def test_single_huge_update_hardly_affects_later_ones():
    tx = optclip.cap_update(0.1, floor=1.0, ramp_steps=0)
    params = jnp.ones(3)
    state, step = tx.init(params), jax.jit(tx.update)
    for k in range(50):
        out, state = step(jnp.full(3, 1e30 if k == 20 else 0.09), state, params)
    chex.assert_trees_all_equal(out, jnp.full(3, 0.09))


def test_default_floor_is_the_typical_initial_scale_of_each_shape():
    params = {"w": jnp.zeros((16, 16)), "b": jnp.zeros(16)}
    updates = jax.tree.map(jnp.ones_like, params)
    tx = optclip.cap_update(1.0, ramp_steps=0, lasting=False, scope=scopes.leaf())
    out, _ = tx.update(updates, tx.init(params), params)
    np.testing.assert_allclose(out["w"], np.full((16, 16), 0.25), rtol=1e-6)
    np.testing.assert_allclose(out["b"], np.full(16, 0.5), rtol=1e-6)
    tx = optclip.cap_update(1.0, ramp_steps=0, lasting=False)
    out, _ = tx.update(updates, tx.init(params), params)
    whole = np.sqrt((256 * 0.25**2 + 16 * 0.5**2) / 272)
    np.testing.assert_allclose(out["w"], np.full((16, 16), whole), rtol=1e-6)


@pytest.mark.parametrize("order", [1.0, 2.0, np.inf])
@pytest.mark.parametrize("scope", [scopes.leaf(), scopes.unit(), scopes.tree()])
def test_default_floor_has_the_order_of_the_norm(order, scope):
    params = {"w": jnp.zeros((16, 4)), "b": jnp.zeros(16)}
    updates = jax.tree.map(lambda p: 10 * jnp.ones_like(p), params)
    rule = rules.update_cap(1.0, ramp_steps=0, lasting=False)
    tx = optclip.clip_by_rule(rule, scope=scope, ord=order)
    out, _ = tx.update(updates, tx.init(params), params)
    sizes = {"w": 64**-0.25, "b": 0.5}
    if scope.name == "unit":
        sizes["w"] = 0.5  # a unit of `w` has 16 entries
    if scope.name == "tree":
        norms = [np.full(64, sizes["w"]), np.full(16, sizes["b"])]
        whole = np.linalg.norm(np.concatenate(norms), order)
        sizes = dict.fromkeys(sizes, whole / np.linalg.norm(np.ones(80), order))
    for name, size in sizes.items():
        np.testing.assert_allclose(out[name], np.full_like(params[name], size), 1e-5)


def test_default_floor_is_the_same_on_sharded_parameters():
    kind = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((4,), ("d",), axis_types=(kind,))
    params, updates = jnp.zeros((16, 16)), jnp.ones((16, 16))
    tx = optclip.cap_update(1.0, ramp_steps=0, lasting=False, axis_name="auto")
    spec = jax.sharding.PartitionSpec("d")
    run = jax.shard_map(
        lambda u, p: tx.update(u, tx.init(p), p)[0],
        mesh=mesh, in_specs=(spec, spec), out_specs=spec,
    )  # fmt: skip
    np.testing.assert_allclose(jax.jit(run)(updates, params), 0.25, rtol=1e-6)


@pytest.mark.parametrize(
    "scope",
    [scopes.tree(), scopes.leaf(), scopes.unit(), scopes.label({"w": 0, "b": 1})],
)
def test_metrics_report_the_largest_average_excess(scope):
    tx = optax.chain(optclip.clip_by_global_norm(1.0), optclip.cap_update(scope=scope))
    params = {"w": jnp.ones((4, 2)), "b": jnp.ones(2)}
    state = tx.init(params)
    assert float(optclip.metrics(state)["clip_2/mean_excess"]) == 1.0
    for size in (0.02, 0.02, 0.12):  # the cap is 0.04; so the excess is 0.5, 0.5 and 3
        updates = jax.tree.map(lambda x, s=size: jnp.full_like(x, s), params)
        _, state = jax.jit(tx.update)(updates, state, params)
    found = jax.jit(optclip.metrics)(state)
    np.testing.assert_allclose(found["clip_2/mean_excess"], 4 / 3, rtol=1e-6)
    assert "clip/mean_excess" not in found


def test_infinite_ratio_passes_updates_through():
    tx = optclip.cap_update(jnp.inf)
    params, updates = jnp.zeros(3), jnp.full(3, 1e20)
    out, state = tx.update(updates, tx.init(params), params)
    chex.assert_trees_all_equal(out, updates)
    assert state.clipped == 0


def trained(tx, loss, params, steps=300):
    """Returns the parameters after full-batch training."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=steps)
    return params


def classification():
    """Returns the loss of a logistic regression on separable data."""
    rng = np.random.default_rng(0)
    x = jnp.float32(rng.standard_normal((1000, 20)))
    y = jnp.sign(x @ jnp.float32(rng.standard_normal(20)))
    return lambda w: jnp.mean(jax.nn.softplus(-y * (x @ w)))


def test_weights_that_start_at_zero_learn_as_fast_as_without_a_cap():
    loss = classification()

    def final_loss(tx):
        return float(loss(trained(tx, loss, jnp.zeros(20))))

    plain = final_loss(optax.adam(1e-2))
    assert final_loss(optclip.stabilize(optax.adam(1e-2))) < 1.02 * plain


@pytest.mark.parametrize("rate", [3e-3, 1e-2, 2e-2])
def test_low_rank_adapter_that_starts_at_zero_learns_as_fast_as_without_a_cap(rate):
    rng = np.random.default_rng(0)
    weights = jnp.float32(rng.standard_normal((32, 32)) / np.sqrt(32))
    change = rng.standard_normal((32, 2)) @ rng.standard_normal((2, 32)) / 32
    x = jnp.float32(rng.standard_normal((256, 32)))
    noise = 0.1 * rng.standard_normal((256, 32))
    wanted = x @ (weights + jnp.float32(change)) + jnp.float32(noise)
    params = {
        "a": jnp.float32(rng.standard_normal((32, 4)) / np.sqrt(32)),
        "b": jnp.zeros((4, 32)),
    }

    def loss(params):
        return jnp.mean(jnp.square(x @ (weights + params["a"] @ params["b"]) - wanted))

    def final_loss(tx):
        # So few steps that the loss still falls: with the cap of 0.1.0 it is 2.4 times
        # as large at the two higher rates.
        return float(loss(trained(tx, loss, params, steps=50)))

    plain = final_loss(optax.adamw(rate))
    assert final_loss(optclip.stabilize(optax.adamw(rate))) < 1.05 * plain


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_training_with_adam_does_not_depend_on_the_scale_of_the_loss(factor):
    loss = classification()
    tx = optclip.stabilize(optax.adam(0.3, eps=0.0))  # the cap is active

    def end(scale):
        return trained(tx, lambda w: scale * loss(w), jnp.ones(20), steps=100)

    chex.assert_trees_all_close(end(factor), end(1.0), rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": -1.0}, "`ratio` must be >= 0"),
        ({"floor": -1.0}, "`floor` must be >= 0"),
        ({"ramp_steps": -1}, "`ramp_steps` must be"),
    ],
)
def test_arguments_out_of_range_raise_errors(options, message):
    with pytest.raises(ValueError, match=message):
        optclip.cap_update(**options)
