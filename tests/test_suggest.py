"""`suggest_threshold`: the suggestion, excluded norms, and when it declines."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import optclip
from optclip.diagnosis.findings import CAUSES, Diagnosis, Finding
from optclip.diagnosis.thresholds import suggest_threshold

TYPICAL = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0]
GRADS = [jnp.array([3.0, 4.0]) * (1 + i % 3) for i in range(30)]


def found(cause, severity="high"):
    return Diagnosis((Finding(cause, (), "seen", (), severity),), {})


def after(transformation, grads):
    """Returns the state after these gradients."""
    params = jnp.ones(2)
    state = transformation.init(params)
    update = jax.jit(transformation.update)
    for g in grads:
        _, state = update(g, state, params)
    return state


# --- the number -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantile", "expected"), [(0.0, 1.0), (0.1, 2.0), (0.5, 6.0), (1.0, 11.0)]
)
def test_proposes_the_quantile(quantile, expected):
    suggestion = suggest_threshold(TYPICAL, quantile=quantile)
    assert suggestion.max_norm == pytest.approx(expected)
    assert (suggestion.samples, suggestion.outliers, suggestion.nonfinite) == (11, 0, 0)
    assert suggestion.declined is None


def test_spread_and_drift_are_decades():
    # Exponents are evenly spaced: the 10% quantile is 10**0.1, the 90% one 10**0.9.
    norms = 10.0 ** (np.arange(11) / 10)
    suggestion = suggest_threshold(norms)
    assert suggestion.spread == pytest.approx(0.8)
    # The medians of the first five and the last five: exponents 0.2 and 0.8.
    assert suggestion.drift == pytest.approx(0.6)
    assert suggest_threshold(norms[::-1]).drift == pytest.approx(-0.6)
    spread, drift = suggestion.warnings
    assert "spread over a factor of 6.31" in spread
    assert "rose by a factor of 3.98 meanwhile" in drift
    assert "fell by" in suggest_threshold(norms[::-1]).warnings[-1]


def test_quiet_norms_have_no_warnings():
    suggestion = suggest_threshold([1.0, 1.1] * 20)
    assert suggestion.warnings == ()
    assert suggestion.spread == pytest.approx(np.log10(1.1))


def test_values_far_above_the_median_are_excluded():
    suggestion = suggest_threshold([*TYPICAL, 1e6, 1e9])
    assert suggestion.max_norm == 6.0
    assert (suggestion.outliers, suggestion.samples) == (2, 13)
    assert "do not count: there are 2" in suggestion.warnings[0]


def test_at_most_a_quarter_is_excluded():
    norms = [1.0] * 30
    assert suggest_threshold([*norms, *[1e3] * 10]).outliers == 10
    many = suggest_threshold([*norms, *[1e3] * 11])
    assert many.outliers == 0
    assert many.spread == pytest.approx(3.0)


def test_eleven_times_the_median_is_excluded_but_nine_times_is_not():
    assert suggest_threshold([1.0] * 20 + [9.0]).outliers == 0
    assert suggest_threshold([1.0] * 20 + [11.0]).outliers == 1
    # If norms are widely spread, 11 times the median is typical.
    assert suggest_threshold([0.1, 1.0, 10.0] * 7 + [11.0]).outliers == 0


def test_nonfinite_and_zero_norms_are_excluded():
    suggestion = suggest_threshold([*TYPICAL, np.nan, np.inf, None, 0.0])
    assert suggestion.max_norm == 6.0
    assert (suggestion.nonfinite, suggestion.samples) == (3, 15)
    assert "Not finite: 3 of 15 norms" in suggestion.warnings[0]
    assert "Norms of 0 do not count: there are 1" in suggestion.warnings[1]


norm_lists = st.lists(st.floats(1e-20, 1e20), min_size=14, max_size=40)


@settings(deadline=None, max_examples=60)
@given(norm_lists, st.integers(-30, 30), st.floats(0, 1), st.randoms())
def test_laws(norms, octaves, quantile, random):
    suggestion = suggest_threshold(norms, quantile=quantile)
    assert min(norms) <= suggestion.max_norm <= max(norms)
    # Scale and non-finite norms do not matter, and order only matters for the drift.
    scaled = suggest_threshold(np.array(norms) * 2.0**octaves, quantile=quantile)
    assert scaled.max_norm == pytest.approx(suggestion.max_norm * 2.0**octaves)
    assert scaled.spread == pytest.approx(suggestion.spread, abs=1e-9)
    assert scaled.drift == pytest.approx(suggestion.drift, abs=1e-9)
    with_nan = suggest_threshold([*norms, np.nan, np.nan], quantile=quantile)
    assert with_nan.max_norm == suggestion.max_norm
    shuffled = random.sample(norms, len(norms))
    assert suggest_threshold(shuffled, quantile=quantile).max_norm == pytest.approx(
        suggestion.max_norm
    )


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(1, 2), min_size=10, max_size=40), st.floats(100, 1e300))
def test_one_spike_of_any_size_changes_nothing(norms, spike):
    suggestion = suggest_threshold([*norms, spike])
    assert suggestion.max_norm == suggest_threshold(norms).max_norm
    assert suggestion.outliers == 1


# --- declining ------------------------------------------------------------------------


def test_declines_with_few_norms():
    suggestion = suggest_threshold([1.0] * 9)
    assert suggestion.max_norm is None
    assert "9 usable norms are too few" in suggestion.declined
    assert suggest_threshold([1.0] * 10).max_norm == 1.0


def test_declines_when_more_than_a_quarter_is_not_finite():
    assert suggest_threshold([1.0] * 30 + [np.nan] * 10).max_norm == 1.0
    suggestion = suggest_threshold([1.0] * 30 + [np.inf] * 11)
    assert suggestion.max_norm is None
    assert "11 of 41 norms are not finite" in suggestion.declined


@pytest.mark.parametrize("cause", CAUSES)
def test_declines_while_a_cause_is_open_that_changes_the_norm(cause):
    suggestion = suggest_threshold(TYPICAL, diagnosis=found(cause))
    kept = {
        "recurrence",
        "learning_rate",
        "update_cap",
        "warm_up",
        "precision",
        "unknown",
    }
    if cause in kept:
        assert suggestion.max_norm == 6.0
    else:
        assert suggestion.max_norm is None
        assert f"an open finding ({CAUSES[cause]})" in suggestion.declined
        assert suggestion.spread is not None


def test_does_not_decline_because_of_informational_findings():
    report = found("initialization", "low")
    assert suggest_threshold(TYPICAL, diagnosis=report).max_norm == 6.0
    assert suggest_threshold(TYPICAL, diagnosis=Diagnosis((), {})).max_norm == 6.0


def test_text():
    text = str(suggest_threshold([*TYPICAL, 1e6]))
    assert text.startswith("Clip at 6 (from 12 norms)\n  left out: 1 far above")
    assert "from the 10% to the 90% quantile" in text
    assert "drift:    a factor of " in text
    assert "warning:  Norms more than ten times the median" in text
    declined = str(suggest_threshold([1.0] * 3))
    assert declined.startswith("No threshold is suggested: 3 usable norms")


# --- from states ----------------------------------------------------------------------


def test_reads_the_window_of_a_rule_in_order():
    state = after(optax.chain(optclip.autoclip(window=20), optax.sgd(0.1)), GRADS)
    suggestion = suggest_threshold(state)
    # Steps 10 to 29: seven norms of 10, seven of 15 and six of 5.
    assert (suggestion.max_norm, suggestion.samples) == (10.0, 20)
    rising = [jnp.array([3.0, 4.0]) * 1.1**i for i in range(30)]
    norms = [5 * 1.1**i for i in range(10, 30)]
    window = suggest_threshold(after(optclip.autoclip(window=20), rising))
    assert window.drift == pytest.approx(suggest_threshold(norms).drift, rel=1e-5)
    assert window.drift == pytest.approx(15 * np.log10(1.1), rel=1e-5)


def test_reads_the_window_of_skip_steps_and_reports_excluded_steps():
    grads = [*GRADS[:20], jnp.array([jnp.nan, 1.0]), *GRADS[:9]]
    state = after(optclip.skip_steps(optax.sgd(0.1)), grads)
    suggestion = suggest_threshold(state)
    assert (suggestion.max_norm, suggestion.samples) == (10.0, 29)
    assert suggestion.nonfinite == 1
    assert suggestion.warnings[0].startswith("1 of 30 steps were left out")


def test_reads_a_histogram_to_six_percent():
    rule = optclip.rules.log_histogram_percentile(10.0)
    suggestion = suggest_threshold(after(optclip.clip_by_rule(rule), GRADS))
    assert suggestion.max_norm == pytest.approx(10.0, rel=0.06)
    assert (suggestion.samples, suggestion.drift) == (30, None)


def test_counts_nonfinite_steps_of_a_state():
    bad = [jnp.array([jnp.nan, 1.0])] * 11
    clip = optclip.autoclip(nonfinite="skip")
    suggestion = suggest_threshold(after(clip, [*GRADS, *bad]))
    assert suggestion.max_norm is None
    assert "11 of 41 norms are not finite" in suggestion.declined


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optclip.clip_by_global_norm(1.0), "holds the last norm only"),
        (optclip.record_norms, "holds the last norm only"),
        (optclip.zclip, "keeps only a running mean of the norms, now"),
        (optclip.quantile_clip, "keeps only a running quantile of the norms, now"),
    ],
    ids=["constant", "record_norms", "mean", "quantile"],
)
def test_declines_states_without_a_history(make, message):
    suggestion = suggest_threshold(after(make(), GRADS[:12]))
    assert suggestion.max_norm is None
    assert message in suggestion.declined
    assert 'Record `optclip.metrics(state)["clip/norm_before"]`' in suggestion.declined


def test_declines_per_group_norms():
    clip = optclip.clip_by_rule(
        optclip.rules.window_percentile(10.0, window=20), scope=optclip.scopes.leaf()
    )
    state = clip.init({"a": jnp.ones(2), "b": jnp.ones(3)})
    assert "norms of parts, not of all leaves" in suggest_threshold(state).declined


def test_stabilize_names_its_quantile():
    state = after(optclip.stabilize(optax.sgd(0.1)), GRADS[:12])
    assert "running quantile" in suggest_threshold(state).declined


# --- errors ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norms", "error", "message"),
    [
        ([], ValueError, "must hold norms, got none"),
        ([1.0, -2.0], ValueError, r"norms, which are >= 0, got -2 at place 1"),
        (np.ones((3, 2)), ValueError, r"one axis, got the shape \(3, 2\)"),
        (3.0, ValueError, r"one axis, got the shape \(\)"),
        ("norms", TypeError, "optimizer state with a clip of optclip in it, got str"),
        ([True], TypeError, "must be gradient norms"),
        ([[1.0], [1.0, 2.0]], TypeError, "one number a step"),
        ({"norm": [1.0]}, TypeError, "got dict"),
        (optax.adam(0.1), TypeError, "got the optimizer itself"),
        (optax.adam(0.1).init(jnp.ones(2)), TypeError, "got tuple"),
    ],
)
def test_invalid_norms_raise_errors(norms, error, message):
    with pytest.raises(error, match=message):
        suggest_threshold(norms)


def test_invalid_options_raise_errors():
    with pytest.raises(ValueError, match="`quantile` must be between 0 and 1, got 2"):
        suggest_threshold(TYPICAL, quantile=2.0)
    with pytest.raises(TypeError, match="`diagnosis` must be a Diagnosis of"):
        suggest_threshold(TYPICAL, diagnosis=[])


def test_traced_norms_raise_an_error():
    with pytest.raises(ValueError, match="call `suggest_threshold` outside of jit"):
        jax.jit(lambda x: suggest_threshold(x).max_norm)(jnp.ones(20))


def test_batched_states_raise_an_error():
    state = jax.vmap(optclip.autoclip().init)(jnp.ones((3, 2)))
    with pytest.raises(ValueError, match="a batch of states"):
        suggest_threshold(state)
