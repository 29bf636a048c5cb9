"""`skip_steps` accepts new levels, skips rare spikes, and reports how many."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip

STEPS = 3000


@functools.cache
def runner(with_loss=False, **options):
    """Returns a function from norms[steps, runs] to (skips, last states)."""
    tx = optclip.skip_steps(optax.sgd(1.0), **options)

    @jax.jit
    def run(norms, losses):
        def update(norm, loss, state):
            extra = {"loss": loss} if with_loss else {}
            return tx.update(norm[None], state, **extra)[1]

        def step(states, rows):
            states = jax.vmap(update)(*rows, states)
            return states, states.skipped_run > 0

        first = jax.vmap(lambda _: tx.init(jnp.zeros(1)))(norms[0])
        return jax.lax.scan(step, first, (norms, losses))

    def skipped(norms, losses=None):
        losses = np.ones_like(norms) if losses is None else losses
        states, out = run(jnp.float32(norms), jnp.float32(losses))
        return np.asarray(out), states

    return skipped


def lognormal(seed, sigma, runs=1, steps=STEPS):
    return np.exp(sigma * np.random.default_rng(seed).normal(size=(steps, runs)))


def until_taken(lost, run=10):
    """Counts the steps lost before ``run`` consecutive ones are taken; all if never."""
    for k in range(len(lost) - run + 1):
        if not lost[k : k + run].any():
            return lost[:k].sum()
    return len(lost)


def test_new_data_source_is_accepted_permanently():
    cells = [
        (share, size, sigma)
        for share in (0.05, 0.15, 0.5)
        for size in (3, 10, 100)
        for sigma in (0.3, 1.5)
    ]
    share, size, sigma = np.array(cells).T
    rng = np.random.default_rng(0)
    norms = np.exp(sigma * rng.normal(size=(STEPS, len(cells))))
    new = (np.arange(STEPS)[:, None] >= 300) & (rng.random(norms.shape) < share)
    skipped, _ = runner()(np.where(new, size * norms, norms))
    for k, cell in enumerate(cells):
        lost = skipped[new[:, k], k]
        assert until_taken(lost) <= 20, cell
        assert lost[30:].mean() < 0.2, cell
        assert skipped[~new[:, k], k].mean() < 0.002, cell


def test_recurring_large_batches_are_eventually_accepted():
    norms = 1 + 0.2 * np.random.default_rng(0).random((1000, 1))
    norms[200::5] = 10
    skipped, _ = runner()(norms)
    assert skipped[200::5].sum() == 10
    assert not np.delete(skipped, np.arange(200, 1000, 5)).any()


def test_isolated_spikes_are_skipped():
    calm = lognormal(1, 0.3, 20)
    late = np.arange(STEPS)[:, None] >= 100
    spike = late & (np.random.default_rng(2).random(calm.shape) < 0.01)
    skipped, _ = runner()(np.where(spike, 10 * calm, calm))
    assert skipped[spike].mean() >= 0.95
    assert skipped[~spike].mean() < 1e-3


def test_heavy_tails_lose_at_most_one_percent_of_the_steps():
    skipped, _ = runner()(lognormal(3, 1.5, 20))
    assert skipped.mean() <= 0.01


@pytest.mark.parametrize("when", [None, optclip.rules.ema_ratio(1.05, decay=0.98)])
def test_at_most_two_percent_of_randomly_ordered_norms_are_skipped(when):
    rng = np.random.default_rng(4)
    heaviest = np.exp(np.clip(rng.standard_cauchy((STEPS, 20)), -60, 60))
    skipped, _ = runner(when=when)(heaviest)
    # Once 512 norms were seen, each is skipped with probability at most 10 in 513.
    assert skipped[512:].mean() <= 10 / 513


def test_few_steps_of_similar_norms_are_skipped_among_any_512():
    rng = np.random.default_rng(5)
    walk = np.exp(np.cumsum(rng.choice([0, 0.7, -0.6], (STEPS, 10)), axis=0) % 12)
    storm = walk * np.exp(2 * (rng.random(walk.shape) < 0.1))
    storm[rng.random(storm.shape) < 0.02] = np.nan
    when = optclip.rules.previous_norm(1.01)
    skipped, _ = runner(when=when, max_consecutive=None)(storm)
    assert skipped.mean() > 0.02
    for norms, out in zip(storm.T, skipped.T, strict=True):
        at = np.flatnonzero(out & np.isfinite(norms))
        for k in at:
            near = norms[at[(at <= k) & (at > k - 512)]] >= norms[k] / 2 * 1.0001
            assert near.sum() <= 10


def spikes_by_hand(values, window, signed, similar=10, recent=512):
    """Returns which values the rule's definition skips, in float64."""
    history, offered, skipped, run = [], [], [], 0
    for x in values:
        bound, past = np.inf, np.asarray(history[-window:])
        if len(history) >= window // 2 and signed:
            bound = past.mean() + 6 * max(past.std(ddof=1), 1e-6)
        elif len(history) >= window // 2:
            logs = np.log(past)
            bound = np.exp(logs.mean() + max(5 * logs.std(), np.log(2)))
        half = (x + bound) / 2 if signed else x / 2
        rare = np.sum(np.asarray(offered[-recent:]) >= half) < similar
        spike = x > bound and rare
        if spike and run >= 10:
            spike, history = False, []
        run = run + 1 if spike else 0
        skipped.append(spike)
        offered.append(x)
        if not spike:
            history.append(x)
    return np.array(skipped)


def test_matches_the_definition_step_by_step():
    rng = np.random.default_rng(6)
    norms = lognormal(6, 0.4, 6, 1500)
    norms[500:] *= np.where(rng.random((1000, 6)) < 0.05, 30, 1)
    norms[1000:] *= [1, 3, 8, 20, 100, 1e5]
    skipped, _ = runner()(norms)
    for got, column in zip(skipped.T, norms.T, strict=True):
        np.testing.assert_array_equal(got, spikes_by_hand(column, 128, False))
    assert skipped.sum() > 60


def test_loss_is_judged_by_the_same_definition():
    rng = np.random.default_rng(7)
    losses = 0.1 * rng.normal(size=(1500, 4)) + [3.0, -3.0, 0.0, 50.0]
    losses[400:] += np.where(rng.random((1100, 4)) < 0.08, 2, 0)
    losses[1000:] += [0, 2, 5, 100]
    norms = np.ones_like(losses)
    skipped, states = runner(with_loss=True)(norms, losses)
    for got, column in zip(skipped.T, np.float32(losses).T, strict=True):
        np.testing.assert_array_equal(got, spikes_by_hand(column, 128, True))
    assert skipped.sum() > 30
    assert np.isfinite(states.offered_losses).all()


def test_decreasing_loss_that_rises_to_a_new_level_is_followed():
    losses = 2 + 8 * np.exp(-np.arange(1500) / 100)[:, None]
    losses += 0.05 * np.random.default_rng(8).normal(size=losses.shape)
    losses[1200:] += 1.5
    skipped, _ = runner(with_loss=True)(np.ones_like(losses), losses)
    assert not skipped[:1200].any()
    assert skipped[1200:1210].all()
    assert skipped[1210:].sum() <= 2


def test_new_source_is_skipped_without_the_count_of_similar_values():
    norms = np.ones((1000, 1))
    norms[200::5] = 10
    skipped, states = runner(max_similar=None)(norms)
    assert skipped[200::5].all()
    assert states.offered_norms == states.offered_losses == ()
    skipped, _ = runner(max_similar=3)(norms)
    assert skipped[200::5].sum() == 3


@pytest.mark.parametrize("when", [5.0, lambda step: jnp.float32(5.0)])
def test_bound_without_memory_does_not_change(when):
    norms = np.ones((1000, 1))
    norms[200::5] = 10
    skipped, states = runner(when=when)(norms)
    assert skipped[200::5].all()
    assert states.offered_norms == ()


def test_two_tasks_are_learned_as_well_as_with_plain_adam():
    """The second task starts later: 15% of the batches, ten times the gradient."""
    rng = np.random.default_rng(9)
    x = jnp.asarray(rng.normal(size=(2, 64, 6)), jnp.float32)
    noise = jnp.asarray(rng.normal(size=(2, 64)), jnp.float32)
    wanted = jnp.asarray(rng.normal(size=(6, 2)), jnp.float32)
    # The tasks share features; each has one row of the last matrix.
    targets = jnp.einsum("tbi,it->tb", x, wanted) * jnp.array([[1.0], [3.0]]) + noise
    second = (np.arange(4000) >= 200) & (rng.random(4000) < 0.15)
    batches = rng.integers(0, 64, (4000, 16))
    params = {
        "shared": jnp.asarray(0.5 * rng.normal(size=(6, 8)), jnp.float32),
        "heads": jnp.asarray(0.5 * rng.normal(size=(2, 8)), jnp.float32),
    }

    def loss_of(params, task, rows):
        heads = jnp.einsum("bi,ij,j->b", x[task][rows], params["shared"],
                           params["heads"][task])  # fmt: skip
        return jnp.mean(jnp.square(heads - targets[task][rows]))

    def trained(tx):
        def step(carry, batch):
            params, state = carry
            task, rows = batch
            grads = jax.grad(loss_of)(params, task, rows)
            updates, state = tx.update(grads, state, params)
            norm = optax.tree.norm(grads)
            return (optax.apply_updates(params, updates), state), norm

        (last, _), norms = jax.jit(lambda c, b: jax.lax.scan(step, c, b))(
            (params, tx.init(params)),
            (jnp.asarray(second, jnp.int32), jnp.asarray(batches)),
        )
        everything = jnp.arange(64)
        return [float(loss_of(last, t, everything)) for t in (0, 1)], norms

    adam = optax.adam(optax.cosine_decay_schedule(1e-2, 4000))
    alone, norms = trained(adam)
    assert np.median(norms[200:][second[200:]][:20]) > 7 * np.median(norms[150:200])
    skipping, _ = trained(optclip.skip_steps(adam))
    np.testing.assert_allclose(skipping, alone, rtol=0.05)


def test_metrics_report_the_recent_skip_fraction_and_its_start():
    norms = np.ones((2000, 1))
    norms[[100, 900, 1000, 1300]] = 50
    tx = optclip.skip_steps(optax.sgd(1.0))

    @jax.jit
    def all_steps(norms):
        def step(state, norm):
            _, state = tx.update(norm[None], state)
            metrics = optclip.metrics(state)
            return state, [metrics[f"skip/recent_{k}"] for k in ("fraction", "since")]

        return jax.lax.scan(step, tx.init(jnp.zeros(1)), norms)[1]

    fraction, since = map(np.asarray, all_steps(jnp.float32(norms[:, 0])))
    np.testing.assert_allclose(fraction[[99, 100, 200]], [0, 1 / 101, 1 / 201])
    np.testing.assert_allclose(fraction[[611, 612, 1000, 1411, 1412]],
                               np.array([1, 0, 2, 3, 2]) / 512)  # fmt: skip
    assert since[[99, 100, 611, 612, 899, 900, 1811, 1812]].tolist() == [
        -1, 100, 100, -1, -1, 900, 900, -1,
    ]  # fmt: skip
    fresh = optclip.metrics(tx.init(jnp.zeros(1)))
    assert float(fresh["skip/recent_fraction"]) == 0
    assert int(fresh["skip/recent_since"]) == -1
