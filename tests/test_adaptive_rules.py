"""The rules with memory, compared step by step with NumPy in float64."""

import adaptive
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rule_oracles as oracles

import optclip
from optclip import rules, scopes

inf = np.inf
CASES = {
    "adagc": (rules.ema_ratio(1.05, decay=0.98, warmup_steps=20, warmup_threshold=1.0),
              lambda: oracles.EmaRatio(1.05, 0.98, warmup=(20, 1.0))),
    "olmo": (rules.ema_ratio(1.5, decay=0.9), lambda: oracles.EmaRatio(1.5, 0.9)),
    "ema-raw": (rules.ema_ratio(1.5, decay=0.9, record="raw"),
                lambda: oracles.EmaRatio(1.5, 0.9, record="raw")),
    "previous": (rules.previous_norm(1.2), lambda: oracles.EmaRatio(1.2, 0.0)),
    "zscore": (rules.ema_zscore(), lambda: oracles.ZScore(2.5, 0.97, 25, escape=50)),
    "zscore-mean": (
        rules.ema_zscore(clip_option="mean", escape_steps=None, max_grad_norm=4.0),
        lambda: oracles.ZScore(2.5, 0.97, 25, option="mean", top=4.0)),
    "zscore-percentile": (
        rules.ema_zscore(2.0, mode="percentile", warmup_steps=10, escape_steps=10),
        lambda: oracles.ZScore(2.0, 0.97, 10, mode="percentile", escape=10)),
    "zscore-skip": (
        rules.ema_zscore(clip_factor=1.1, skip_update_on_spike=True, escape_steps=None),
        lambda: oracles.ZScore(2.5, 0.97, 25, factor=1.1, skip=True)),
    "sigma": (rules.ema_sigma(escape_steps=None),
              lambda: oracles.Sigma(3.0, 0.99, 1.0)),
    "sigma-escape": (rules.ema_sigma(first_cap=inf, escape_steps=5),
                     lambda: oracles.Sigma(3.0, 0.99, inf, escape=5)),
    "dual": (rules.dual_ema(escape_steps=4),
             lambda: oracles.Dual(2.0, 1.1, 0.9, 0.99, escape=4)),
    "window": (rules.window_percentile(30.0, window=40),
               lambda: oracles.Window(30.0, 40)),
    "window-past": (rules.window_percentile(90.0, window=40, include_current=False),
                    lambda: oracles.Window(90.0, 40, current=False)),
    "window-rank": (rules.window_percentile(25.0, window=40, by_rank=True),
                    lambda: oracles.Window(25.0, 40, rank=True)),
    "window-sigma": (rules.window_sigma(2.0, window=32),
                     lambda: oracles.WindowSigma(2.0, 32)),
    "log-window-sigma": (rules.log_window_sigma(2.0, window=32, min_ratio=1.5),
                         lambda: oracles.LogWindowSigma(2.0, 32, 1.5)),
    "quantile": (rules.geometric_quantile(),
                 lambda: oracles.Quantile(0.1, 2.0, 0.05, 5)),
    "smooth": (rules.smoothed_norm(), lambda: oracles.Smooth(0.7, 0.9, 0.0)),
    "olmo-eps": (rules.ema_ratio(1.5, decay=0.9, eps=2.0),
                 lambda: oracles.EmaRatio(1.5, 0.9, eps=2.0)),
    "zscore-eps": (
        rules.ema_zscore(eps=0.3, escape_steps=None),
        lambda: oracles.ZScore(2.5, 0.97, 25, eps=0.3)),
    "percentile-eps": (
        rules.ema_zscore(mode="percentile", eps=0.3, escape_steps=None),
        lambda: oracles.ZScore(2.5, 0.97, 25, mode="percentile", eps=0.3)),
    "window-sigma-floor": (rules.window_sigma(2.0, window=32, floor=0.5),
                           lambda: oracles.WindowSigma(2.0, 32, floor=0.5)),
    "smooth-eps": (rules.smoothed_norm(eps=0.5),
                   lambda: oracles.Smooth(0.7, 0.9, 0.5)),
}  # fmt: skip


def followed(rule, norms, **options):
    """Returns the limits, clipped norms and states of a rule inside a clip."""
    tx = optclip.clip_by_rule(rule, **options)
    direction = jnp.array([0.6, 0.8])

    def step(state, n):
        # Calls the rule itself on the previous state to get the limits.
        zero = jnp.zeros([], jnp.int32)
        context = rules.Context(zero, n, lambda: n)
        limit, _ = rule.update(n, state.rule_state[0], context)
        out, state = tx.update(direction * n, state)
        return state, (limit[:2], jnp.linalg.norm(out), state.rule_state[0])

    _, seen = jax.jit(lambda s, xs: jax.lax.scan(step, s, xs))(
        tx.init(direction), jnp.asarray(norms)
    )
    return jax.device_get(seen)


@pytest.mark.parametrize("name", CASES)
def test_rules_follow_their_formulas_step_by_step(name):
    rule, make = CASES[name]
    norms = adaptive.norms()
    (thresholds, targets), lengths, _ = followed(rule, norms)
    oracle = make()
    wanted = np.array([oracle.step(float(n)) for n in norms])
    positive = norms > 0
    np.testing.assert_allclose(thresholds[positive], wanted[positive, 0], rtol=1e-5)
    over = norms > wanted[:, 0] * (1 + 1e-5)
    np.testing.assert_allclose(targets[over], wanted[over, 1], rtol=1e-5)
    np.testing.assert_allclose(lengths[over], wanted[over, 1], rtol=2e-5)
    under = positive & (norms < wanted[:, 0] * (1 - 1e-5))
    np.testing.assert_allclose(lengths[under], norms[under], rtol=1e-6)
    assert over.sum() > 3 or name.startswith("smooth")


@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1e20, 1e37])
def test_deviations_of_log_norms_are_scale_invariant_and_do_not_overflow(scale):
    norms = 1 + 0.1 * (np.arange(100, dtype=np.float32) % 5)
    rule = rules.log_window_sigma(window=16)
    (wanted, _), _, _ = followed(rule, norms)
    (scaled, _), _, states = followed(rule, norms * np.float32(scale))
    np.testing.assert_allclose(scaled[8:], wanted[8:] * scale, rtol=2e-5)
    assert np.isfinite(states.recent_norms).all()
    wild = np.where(np.arange(100) % 2, 2e-38, 3e38).astype(np.float32)
    (limits, _), _, _ = followed(rule, wild)
    assert np.isinf(limits[:8]).all()
    assert np.isfinite(limits[8:]).all()
    assert limits[8:].min() >= 3e38


@pytest.mark.parametrize("norm", [0.0, 1e-38])
def test_log_norm_rule_records_neither_zero_nor_subnormal_norms(norm):
    rule = rules.log_window_sigma(window=16)
    norms = np.where(np.arange(40) % 2, norm, 1.0).astype(np.float32)
    (limits, _), _, states = followed(rule, norms)
    # Every second norm is recorded, so half the window fills after 16 steps.
    assert np.isinf(limits[:15]).all()
    np.testing.assert_allclose(limits[16:], 2.0, rtol=1e-6)
    assert states.recorded[-1] == 20


def test_states_match_the_oracles():
    norms = adaptive.norms()

    def last(name):
        oracle = CASES[name][1]()
        for n in norms:
            oracle.step(float(n))
        return oracle, jax.tree.map(lambda x: x[-1], followed(CASES[name][0], norms)[2])

    oracle, state = last("zscore")
    np.testing.assert_allclose(state.mean_norm, oracle.mean, rtol=1e-5)
    np.testing.assert_allclose(state.spread_norm, np.sqrt(oracle.var), rtol=1e-5)
    oracle, state = last("adagc")
    np.testing.assert_allclose(state.ema_norm, oracle.level, rtol=1e-5)
    assert state.recorded == oracle.count
    oracle, state = last("window-rank")
    np.testing.assert_allclose(
        np.sort(state.recent_norms), np.sort(oracle.kept), rtol=1e-6
    )
    oracle, state = last("quantile")
    np.testing.assert_allclose(state.log_quantile, oracle.log, rtol=1e-5)


@pytest.mark.parametrize("percentile", [0.0, 10.0, 50.0, 90.0, 100.0])
def test_histogram_is_within_one_bin_of_the_exact_percentile(percentile):
    norms = adaptive.norms(zeros=False)
    (thresholds, _), _, _ = followed(rules.log_histogram_percentile(percentile), norms)
    width = 2.0 ** (80 / 1000)
    for t in range(1, len(norms) + 1):
        low, high = (
            np.percentile(norms[:t], percentile, method=m) for m in ("lower", "higher")
        )
        assert low / width <= thresholds[t - 1] <= high * width


def test_histogram_forgets_old_norms():
    rule = rules.log_histogram_percentile(50.0, forgetting=0.05)
    norms = np.r_[np.ones(200), np.full(100, 8.0)]
    (thresholds, _), _, _ = followed(rule, norms.astype(np.float32))
    np.testing.assert_allclose(thresholds[[199, 299]], [1.0, 8.0], rtol=0.06)


@pytest.mark.parametrize("first", [1e-25, 1e25])
def test_histogram_restarts_after_norms_leave_its_range(first):
    rule = rules.log_histogram_percentile(50.0)
    norms = np.r_[first, np.full(100, 5.0)].astype(np.float32)
    (thresholds, _), _, state = followed(rule, norms)
    assert not 0.5 < thresholds[49] < 50  # stuck at the end of its range
    np.testing.assert_allclose(thresholds[50:], 5.0, rtol=0.06)
    # A single extreme norm does not reset the histogram.
    norms = np.r_[np.full(100, 5.0), 1e25, np.full(100, 5.0)].astype(np.float32)
    (thresholds, _), _, state = followed(rule, norms)
    assert state.norm_counts[-1].sum() == 201
    np.testing.assert_allclose(thresholds, 5.0, rtol=0.06)


def test_histogram_counts_stay_correct_beyond_sixteen_million_steps():
    """The percentile stays correct although float32 counts stop growing at 2**24."""
    rule = rules.log_histogram_percentile(50.0)
    state = rule.init(jnp.zeros([]))
    counts = state.norm_counts.at[500].set(2.0**24)
    state = state._replace(norm_counts=counts)
    limit, after = rule.update(
        jnp.float32(1.0),
        state,
        rules.Context(jnp.int32(0), jnp.float32(1), lambda: None),
    )
    np.testing.assert_allclose(limit.threshold, 1.0, rtol=0.06)
    chex.assert_tree_all_finite(after)


def moment(ratio, decay, debias, warmup):
    v, count = np.zeros(3), 0

    def step(g):
        nonlocal v, count
        size = np.sqrt(v / (1 - decay**count)) if debias and count else np.sqrt(v)
        limit = np.where((v > 0) & (count >= warmup), ratio * size, np.inf)
        out = np.sign(g) * np.minimum(np.abs(g), limit)
        v, count = decay * v + (1 - decay) * out**2, count + 1
        return out

    return step


@pytest.mark.parametrize(
    ("tx", "oracle"),
    [
        (optclip.adamw_clip(3.0), moment(3.0, 0.999, True, 0)),
        (optclip.spam_clip(4.0, decay=0.9), moment(2.0, 0.9, False, 19)),
    ],
)
def test_second_moment_clips_follow_their_formula(tx, oracle):
    rng = np.random.default_rng(2)
    grads = (rng.normal(size=(100, 3)) * np.exp(rng.normal(size=(100, 1)))).astype("f")
    grads[:10, 2] = 0  # an entry that starts with zero gradients
    _, outs = jax.jit(
        lambda s, xs: jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], s, xs)
    )(tx.init(jnp.zeros(3)), grads)
    np.testing.assert_allclose(outs, [oracle(g) for g in grads], rtol=2e-5)


def test_max_ema_scales_the_largest_entry_to_the_average_and_the_others_with_it():
    tx = optclip.stable_spam_clip(0.5)
    state = tx.init(jnp.zeros(3))
    out, state = tx.update(jnp.float32([1.0, -0.5, 0.1]), state)
    np.testing.assert_array_equal(out, np.float32([1.0, -0.5, 0.1]))
    # T = (0.5 * 0.5 + 0.5 * 4) / (1 - 0.25) = 3
    out, state = tx.update(jnp.array([4.0, -3.5, 0.1]), state)
    np.testing.assert_allclose(out, [3.0, -2.625, 0.1], rtol=1e-6)


def test_raw_spike_raises_the_average_far_more_than_a_clipped_one():
    norms = np.float32([1, 1, 1, 100, 1])
    after = {
        record: followed(rules.ema_ratio(1.1, decay=0.9, record=record), norms)[2]
        for record in ("raw", "clipped")
    }
    assert after["raw"].ema_norm[-1] > 8
    assert after["clipped"].ema_norm[-1] < 1.02


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: rules.ema_ratio(-1.0, decay=0.9), "`ratio` must be >= 0"),
        (lambda: rules.ema_ratio(1.0, decay=1.0), "`decay` must be >= 0 and < 1"),
        (
            lambda: rules.ema_ratio(1.0, decay=0.9, record="x"),
            "`record` must be one of",
        ),
        (lambda: rules.ema_ratio(1.0, decay=0.9, escape_steps=-1), "`escape_steps`"),
        (lambda: rules.ema_zscore(0.0), "`z_thresh` must be > 0"),
        (lambda: rules.ema_zscore(warmup_steps=0), "`warmup_steps` must be > 0"),
        (lambda: rules.ema_zscore(mode="x"), "`mode` must be one of 'zscore'"),
        (lambda: rules.ema_zscore(clip_option="x"), "`clip_option` must be one of"),
        (lambda: rules.ema_sigma(first_cap=0.0), "`first_cap` must be > 0"),
        (lambda: rules.window_percentile(101.0), "between 0 and 100"),
        (
            lambda: rules.window_percentile(5.0, window=0),
            "`window` must be an int >= 1",
        ),
        (lambda: rules.window_sigma(window=1), "`window` must be an int >= 2"),
        (lambda: rules.log_window_sigma(window=1), "`window` must be an int >= 2"),
        (lambda: rules.log_window_sigma(min_ratio=0.0), "`min_ratio` must be > 0"),
        (lambda: rules.geometric_quantile(1.5), "`quantile` must be between 0 and 1"),
        (lambda: rules.geometric_quantile(rate=0.0), "`rate` must be > 0"),
        (lambda: rules.log_histogram_percentile(np.nan), "between 0 and 100"),
        (lambda: rules.second_moment(1.0, reset_every=0), "`reset_every` must be > 0"),
        (lambda: rules.max_ema(2.0), "`decay` must be >= 0 and < 1"),
        (lambda: optclip.cap_update(-1.0), "`ratio` must be >= 0"),
        (lambda: optclip.spectral_clip(-1.0), "`max_sigma` must be >= 0"),
        (lambda: optclip.spectral_clip(1.0, method="x"), "`method` must be one of"),
        (lambda: optclip.u_clip(optclip.clip_by_rule(1.0), max_carry=0), "`max_carry`"),
        (lambda: optclip.scale_by_stable_adam(eps=0.0), "`eps` must be > 0"),
    ],
)
def test_invalid_arguments_raise_errors_at_construction(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_traced_window_raises_an_actionable_error():
    with pytest.raises(ValueError, match=r"static_args=\(\"window\",\)"):
        rules.window_percentile(5.0, window=jnp.int32(3))


def test_rules_with_memory_work_on_every_shape_of_norms():
    for rule, _ in CASES.values():
        for shape in ((), (3,), (2, 3)):
            norm = jnp.ones(shape)
            context = rules.Context(jnp.int32(0), jnp.float32(1), lambda: None)
            state = rule.init(jnp.zeros(shape))
            _, after = jax.eval_shape(
                lambda n, s, u=rule.update, c=context: u(n, s, c), norm, state
            )
            chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


def test_adagc_warmup_is_shared_by_all_leaves():
    tx = optclip.adagc(lambda_abs=1.0)
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    out, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose([out["a"][0], out["b"][0]], [0.6, 0.8], rtol=1e-6)


def test_element_rules_keep_statistics_per_leaf_or_entry():
    tx = optclip.clip_by_rule(rules.max_ema(), scope=scopes.element())
    state = tx.init({"a": jnp.zeros((2, 3)), "b": jnp.zeros(4)})
    assert [s.ema_maximum.shape for s in state.rule_state] == [(), ()]


WIDE = {
    "adagc": optclip.adagc(lambda_abs=np.inf, warmup_steps=0),
    "autoclip": optclip.autoclip(50.0, window=8),
    "autoclip-all": optclip.autoclip(50.0, window=None),
    "dual_ema_clip": optclip.dual_ema_clip(),
    "ema_sigma_clip": optclip.ema_sigma_clip(),
    "norm_growth_limiter": optclip.norm_growth_limiter(),
    "percentile_clip": optclip.percentile_clip(50.0, window=8),
    "quantile_clip": optclip.quantile_clip(),
    "rolling_sigma_clip": optclip.rolling_sigma_clip(window=8),
    "zclip": optclip.zclip(warmup_steps=3, max_grad_norm=None),
}


@pytest.mark.parametrize("name", WIDE)
def test_float64_norms_beyond_the_range_of_float32(name, x64):
    """Too large norms count as the largest float32, too small ones as zero."""
    del x64
    tx = WIDE[name]
    follow = jax.jit(
        lambda s, xs: jax.lax.scan(lambda s, g: tx.update(g[None], s)[::-1], s, xs)
    )
    first = tx.init(jnp.zeros(1, jnp.float64))
    tiny = np.full(20, 1e-100)
    state, out = follow(first, tiny)
    np.testing.assert_array_equal(out[:, 0], tiny)  # unchanged and not recorded
    chex.assert_trees_all_equal(state.rule_state, first.rule_state)
    state, out = follow(first, np.r_[np.full(10, 1e100), 1e300, np.full(9, 1e100)])
    chex.assert_tree_all_finite((state.rule_state, out))
    assert np.all(out > 0)
    assert np.max(out[10:]) < 1e39  # the largest float32 bounds the updates
