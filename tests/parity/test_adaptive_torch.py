"""Clips with a memory of norms, compared step by step with their original packages."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from sequences import (
    BOTH,
    STEPS,
    all_close,
    close,
    gradients,
    parameters,
    put,
    run,
    runner,
    stacked,
    taken,
)

import optclip

torch = pytest.importorskip("torch")
torch.set_num_threads(1)  # the tensors are too small for threads to help

pytestmark = pytest.mark.parity

ZCLIPS = {
    "published": {},
    "unbounded": {"max_grad_norm": None},
    "bounded-late": {"max_grad_norm": 20.0},
    "mean": {"clip_option": "mean", "max_grad_norm": None},
    "mean-bounded": {"clip_option": "mean", "max_grad_norm": 3.0},
    "percentile": {"mode": "percentile", "max_grad_norm": None},
    "percentile-bounded": {"mode": "percentile", "max_grad_norm": 3.0},
    "percentile-tight": {"mode": "percentile", "z_thresh": 0.3, "max_grad_norm": None},
    "skip": {"skip_update_on_spike": True, "max_grad_norm": None},
    "skip-mean": {"skip_update_on_spike": True, "clip_option": "mean"},
    "factor": {"clip_factor": 0.7, "max_grad_norm": None},
    "factor-above": {"clip_factor": 1.3, "max_grad_norm": None, "z_thresh": 1.0},
    "slow": {"alpha": 0.99, "z_thresh": 2.0, "warmup_steps": 40, "max_grad_norm": None},
    "quick": {"alpha": 0.9, "warmup_steps": 1, "max_grad_norm": None},
}


def by_zclip(grads, **options):
    """Returns ZClip's clipped gradients, and its mean and variance at every step."""
    zclip = pytest.importorskip("zclip")
    params = parameters(torch, grads)
    model, clip = torch.nn.ParameterList(params), zclip.ZClip(**options)
    rows, means, variances = [], [], []
    for step in range(len(grads[0])):
        put(torch, params, grads, step)
        clip.step(model)
        rows.append(taken(params))
        means.append(np.nan if clip.mean is None else clip.mean)
        variances.append(np.nan if clip.var is None else clip.var)
    return stacked(rows), np.array(means), np.array(variances)


@pytest.mark.parametrize("options", ZCLIPS.values(), ids=ZCLIPS)
def test_zclip(options):
    follow = runner(optclip.zclip(**options, original=True))
    for grads in BOTH:
        peers, means, variances = by_zclip(grads, **options)
        ours, state = follow(grads)
        all_close(ours, peers)
        known = ~np.isnan(means)  # not in the warm-up
        assert known.sum() == STEPS + 1 - options.get("warmup_steps", 25)
        close(state.rule_state[0].mean_norm[known], means[known])
        spreads = state.rule_state[0].spread_norm[known]
        close(spreads, np.sqrt(variances[known]), atol=1e-6)


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_zclip_defaults_match_the_package_where_it_does_not_lock(
    max_grad_norm,
):
    grads = BOTH[0]  # without zeros, and no 50 spikes in a row
    peers, _, _ = by_zclip(grads, alpha=0.97, z_thresh=2.5, max_grad_norm=max_grad_norm)
    ours, _ = run(optclip.zclip(2.5, alpha=0.97, max_grad_norm=max_grad_norm), grads)
    all_close(ours, peers)


@pytest.mark.parametrize("mode", ["zscore", "percentile"])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("size", [0.5, 1e-7])
def test_zclip_does_not_clip_a_constant_norm(mode, max_grad_norm, size):
    grads = [np.full((60, 1), size, np.float32)]
    options = {"mode": mode, "max_grad_norm": max_grad_norm, "warmup_steps": 5}
    peers, _, _ = by_zclip(grads, **options)
    for original in (True, False):
        ours, _ = run(optclip.zclip(**options, original=original), grads)
        # During warm-up the original uses torch's clip, which is inexact near 1e-6.
        close(ours[0][5:], peers[0][5:])


def unrolled(state, step):
    """Returns the norms in the window after this step, oldest first."""
    ring, count = state.recent_norms[step], int(np.max(state.recorded[step]))
    window = ring.shape[-1]
    return ring[..., :count] if count < window else np.roll(ring, -count, axis=-1)


def past_percentile(percentile, window, scope):
    rule = optclip.rules.window_percentile(
        percentile, window=window, include_current=False, record_zeros=True
    )
    action = functools.partial(optclip.actions.rescale, eps=1e-6)
    return optclip.clip_by_rule(rule, scope=scope, action=action)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(("quantile", "window"), [(0.9, 1000), (0.5, 40), (0.1, 7)])
def test_quantile_clip_of_autoclip(quantile, window, together):
    autoclip = pytest.importorskip("autoclip.torch")
    scope = optclip.scopes.tree() if together else optclip.scopes.leaf()
    follow = runner(past_percentile(100 * quantile, window, scope))
    for grads in BOTH:
        params = parameters(torch, grads)
        peer = autoclip.QuantileClip(
            params, quantile=quantile, history_length=window, global_threshold=together
        )
        keys = ["global_history"] if together else params
        ours, state = follow(grads)
        rows = []
        for step in range(STEPS):
            put(torch, params, grads, step)
            peer.step()
            rows.append(taken(params))
            if step % 23 == 0:
                histories = [peer.state[k] for k in keys]
                histories = [h if together else h["history"] for h in histories]
                mine = unrolled(state.rule_state[0], step).reshape(len(keys), -1)
                close(mine, np.stack([h.numpy() for h in histories]))
        all_close(ours, stacked(rows))


def official_autoclip(grads, percentile):
    """The official code, which keeps all norms, this one included."""
    flat = np.concatenate([g.reshape(STEPS, -1) for g in grads], 1).astype(np.float64)
    norms = np.linalg.norm(flat, axis=1)
    limits = [np.percentile(norms[: i + 1], percentile) for i in range(STEPS)]
    scale = np.minimum(1, np.array(limits) / (norms + 1e-6))
    return [g * scale.reshape(-1, *[1] * (g.ndim - 1)) for g in grads]


@pytest.mark.parametrize("percentile", [0, 10, 37.5, 90, 100])
def test_autoclip_of_the_paper(percentile):
    follow = runner(optclip.autoclip(percentile, window=STEPS, original=True))
    for grads in BOTH:
        all_close(follow(grads)[0], official_autoclip(grads, percentile))


def by_bitsandbytes(grad, percentile):
    """Percentile clipping of one tensor in the last release, and its sorted window."""
    out, windows = [], []
    for step, g in enumerate(np.asarray(grad, np.float64), 1):
        square = np.square(g).sum()
        if step == 1:
            window = np.full(100, square)
        else:
            window[step % 100] = square
        limit = np.sqrt(np.sort(window)[percentile])
        norm = np.sqrt(square)
        out.append(g * (limit / norm) if norm > limit else g)
        windows.append(np.sqrt(np.sort(window)))
    return np.stack(out), np.stack(windows)


@pytest.mark.parametrize("percentile", [0, 5, 50, 99])
def test_percentile_clipping_of_bitsandbytes(percentile):
    follow = runner(optclip.percentile_clip(percentile, original=True))
    for grads in BOTH:
        ours, state = follow(grads)
        for leaf, grad in enumerate(grads):
            peer, windows = by_bitsandbytes(grad, percentile)
            close(ours[leaf], peer)
            # Norms are sorted because the order of the slots differs.
            close(np.sort(state.rule_state[0].recent_norms[:, leaf], -1), windows)


def by_adagc(grads, **options):
    """Returns AdaGC's clipped gradients and the averages behind its thresholds."""
    peers = pytest.importorskip("pytorch_optimizer")
    params = parameters(torch, grads)
    # With this beta the first moment is the clipped gradient.
    fixed = {"lr": 0.0, "betas": (0.0, 0.999), "weight_decay": 0.0, "foreach": False}
    peer = peers.AdaGC(params, **fixed, **options)
    rows, levels = [], []
    for step in range(len(grads[0])):
        put(torch, params, grads, step)
        peer.step()
        rows.append([peer.state[p]["exp_avg"].numpy().copy() for p in params])
        levels.append([float(peer.state[p]["gamma"]) for p in params])
    return stacked(rows), np.array(levels)


ADAGCS = {
    "published": {},
    "short": {"warmup_steps": 5, "beta": 0.9, "lambda_rel": 1.2},
    "none": {"warmup_steps": 0, "lambda_abs": 0.3},
    "late": {"warmup_steps": 40, "lambda_abs": 5.0, "lambda_rel": 2.0},
}


@pytest.mark.parametrize("options", ADAGCS.values(), ids=ADAGCS)
def test_adagc(options):
    follow = runner(optclip.adagc(**options, original=True))
    for grads in BOTH:
        peers, levels = by_adagc(grads, **options)
        ours, state = follow(grads)
        all_close(ours, peers)
        close(state.rule_state[0].ema_norm, levels)


def test_nan_breaks_package_zclip_but_not_optclip():
    grads = [g.copy() for g in gradients(5, zeros=False)]
    grads[0][100, 0, 0] = np.nan
    spikes = np.linalg.norm(grads[1][101:], axis=1) > 8
    assert spikes.any()
    options = {"max_grad_norm": None}
    peers, means, variances = by_zclip(grads, **options)
    assert np.isnan(means[100:]).all()
    assert np.isnan(variances[100:]).all()
    np.testing.assert_array_equal(peers[1][101:], grads[1][101:])  # no longer clips
    ours, state = run(optclip.zclip(**options), grads)
    assert np.isfinite(state.rule_state[0].mean_norm).all()
    assert np.isfinite(state.rule_state[0].spread_norm).all()
    lengths = np.linalg.norm(ours[1][101:], axis=1)[spikes]
    assert (lengths < 8).all()


def test_constant_warmup_locks_package_zclip_but_optclip_recovers():
    sizes = np.r_[np.full(25, 1.0), np.full(275, 1.5)]
    grads = [np.asarray(sizes[:, None], np.float32)]
    options = {"max_grad_norm": None}
    peers, _, variances = by_zclip(grads, **options)
    assert (variances[25:] == 0).all()
    close(peers[0][25:], np.ones((275, 1)))
    same, _ = run(optclip.zclip(**options, original=True), grads)
    close(same[0], peers[0])
    ours, _ = run(optclip.zclip(**options), grads)
    close(ours[0][25:74], np.ones((49, 1)))
    close(ours[0][80:], grads[0][80:])


def test_zero_gradient_stops_official_adagc_but_not_optclip():
    grads = [g.copy() for g in gradients(6, zeros=False)]
    grads[1][20] = 0
    peers, levels = by_adagc(grads)
    assert np.abs(peers[1][99:]).max() < 1e-6
    assert levels[-1, 1] < 1e-6
    ours, _ = run(optclip.adagc(), grads)
    lengths = np.linalg.norm(ours[1][99:], axis=1)
    assert lengths.min() > 1e-3
    assert jnp.isfinite(lengths).all()
