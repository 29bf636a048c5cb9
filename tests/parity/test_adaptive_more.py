"""Per-entry, per-leaf and soft clips compared with other packages."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
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


def optimizers():
    return pytest.importorskip("pytorch_optimizer")


def test_stable_spam():
    # For a zero leaf, the package counts the step but does not update its averages.
    # Neither the official code, below, nor optclip does that.
    grads = gradients(0, zeros=False)
    params = parameters(torch, grads)
    # With this beta the first moment is the clipped gradient.
    peer = optimizers().StableSPAM(params, lr=0.0, betas=(0.0, 0.999))
    tx = optax.chain(optclip.stable_spam_clip(), optclip.adagn(original=True))
    ours, (adaclip, adagn) = run(tx, grads)
    rows, statistics = [], {"m_max_t": [], "m_norm_t": [], "v_norm_t": []}
    for step in range(STEPS):
        put(torch, params, grads, step)
        peer.step()
        states = [peer.state[p] for p in params]
        rows.append([s["exp_avg"].numpy().copy() for s in states])
        for key, found in statistics.items():
            found.append([float(s[key]) for s in states])
    all_close(ours, stacked(rows))
    levels = np.stack([s.ema_maximum for s in adaclip.rule_state], axis=1)
    close(levels, statistics["m_max_t"])
    close(adagn.rule_state[0].first_moment, statistics["m_norm_t"])
    close(adagn.rule_state[0].second_root, np.sqrt(statistics["v_norm_t"]))


def official_adaclip(grad, theta=0.999):
    """The first half of the official code without its reset, in float64."""
    top = 0.0
    for step, g in enumerate(np.asarray(grad, np.float64), 1):
        largest = np.abs(g).max()
        top = theta * top + (1 - theta) * largest
        limit = top / (1 - theta**step)
        yield np.where(np.abs(g) > limit, g / (largest or 1) * limit, g)


def official_adagn(grad, gamma1=0.7, gamma2=0.9, eps=1e-8):
    """The second half, which records the norm of a zero leaf too."""
    first = second = 0.0
    for step, g in enumerate(np.asarray(grad, np.float64), 1):
        norm = np.linalg.norm(g)
        first = gamma1 * first + (1 - gamma1) * norm
        second = gamma2 * second + (1 - gamma2) * norm**2
        mean = first / (1 - gamma1**step)
        size = np.sqrt(second / (1 - gamma2**step)) + eps
        yield g * (mean / size / norm) if norm > 0 else g


def test_adaclip_matches_official_stable_spam():
    follow = runner(optclip.stable_spam_clip())
    for grads in BOTH:
        for mine, grad in zip(follow(grads)[0], grads, strict=True):
            # optclip ignores a step without any gradient; the official code records it.
            seen = np.any(grad.reshape(STEPS, -1) != 0, axis=1)
            close(mine[seen], np.stack(list(official_adaclip(grad[seen]))))


def test_adagn_matches_official_stable_spam():
    follow = runner(optclip.adagn(original=True))
    for grads in BOTH:
        ours, _ = follow(grads)
        all_close(ours, [np.stack(list(official_adagn(g))) for g in grads])


def by_spam(grads, **options):
    """Returns SPAM's clipped gradients and the roots of its second moments."""
    params = parameters(torch, grads)
    fixed = {"lr": 0.0, "density": 1.0, "foreach": False}
    peer = optimizers().SPAM(params, **fixed, **options)
    rows, moments = [], []
    for step in range(STEPS):
        put(torch, params, grads, step)
        peer.step()
        states = [peer.state[p] for p in params]
        pairs = list(zip(states, params, strict=True))
        rows.append([s["exp_avg"].reshape(p.shape).numpy().copy() for s, p in pairs])
        moments.append([s["exp_avg_sq"].reshape(p.shape).sqrt() for s, p in pairs])
    return stacked(rows), stacked(moments)


SPAMS = {
    "published": (5000, 0.999, 20, None),
    "tight": (4, 0.99, 5, None),
    "at-once": (50, 0.9, 0, None),
    "reset": (30, 0.99, 20, 50),
}


@pytest.mark.parametrize(
    ("threshold", "decay", "warmup", "reset"), SPAMS.values(), ids=SPAMS
)
def test_spam(threshold, decay, warmup, reset):
    tx = optclip.spam_clip(
        threshold, decay=decay, warmup_steps=warmup, reset_every=reset, original=True
    )
    follow = runner(tx)
    for grads in BOTH:
        grads = [g.copy() for g in grads]
        grads[0][:60, 1] = 0  # entries that initially have no gradient
        peers, roots = by_spam(
            grads, threshold=threshold, betas=(0.0, decay), grad_accu_steps=warmup,
            update_proj_gap=reset or 10**6,
        )  # fmt: skip
        ours, state = follow(grads)
        all_close(ours, peers)
        all_close([s.root_moment for s in state.rule_state], roots)


def test_spam_keeps_an_entry_at_zero_but_optclip_releases_it():
    grads = gradients(2, zeros=False)
    grads[0][:60, 1] = 0
    fixed = {"threshold": 5000, "betas": (0.0, 0.999), "update_proj_gap": 10**6}
    peers, _ = by_spam(grads, **fixed)
    assert np.all(peers[0][:, 1] == 0)
    ours, _ = run(optclip.spam_clip(5000), grads)
    assert np.all(ours[0][60:, 1] != 0)


@pytest.mark.parametrize(
    ("ratio", "decay", "floor"),
    [(3.0, 0.999, 1e-10), (2.0, 0.9, 0.01), (1.5, 0.99, 1.0)],
)
def test_adamwclip(ratio, decay, floor):
    peers = pytest.importorskip("AdamWClip")
    options = {"clip_grad_adapt": ratio, "clip_grad_min": floor}
    follow = runner(optclip.adamw_clip(ratio, decay=decay, floor=floor, original=True))
    for grads in BOTH:
        params = parameters(torch, grads)
        peer = peers.AdamWClip(params, lr=0.0, betas=(0.0, decay), **options)
        rows, moments = [], []
        for step in range(STEPS):
            put(torch, params, grads, step)
            peer.step()
            rows.append(taken(params))
            states = [peer.state[p] for p in params]
            moments.append([s["sum_grad_grad"].sqrt().numpy() for s in states])
        ours, state = follow(grads)
        all_close(ours, stacked(rows))
        all_close([s.root_moment for s in state.rule_state], stacked(moments))


def train(tx, grads):
    """Returns the parameters, which start at 1, and the states of all steps."""

    def step(carry, grad):
        params, state = carry
        updates, state = tx.update(grad, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state)

    params = [jnp.ones(g.shape[1:]) for g in grads]
    start = params, tx.init(params)
    return jax.jit(lambda s, g: jax.lax.scan(step, s, g)[1])(start, grads)


def by_optimi(params, **options):
    package = pytest.importorskip("optimi")
    return package.StableAdamW(
        params, **options, kahan_sum=False, foreach=False, triton=False
    )


def by_pytorch_optimizer(params, **options):
    return optimizers().StableAdamW(params, **options, kahan_sum=False, foreach=False)


@pytest.mark.parametrize("grads", BOTH, ids=["moving", "zeros"])
@pytest.mark.parametrize("make", [by_optimi, by_pytorch_optimizer])
@pytest.mark.parametrize(
    ("decay", "betas", "eps"),
    [(0.0, (0.9, 0.99), 1e-6), (0.1, (0.9, 0.99), 1e-6), (0.1, (0.95, 0.999), 1e-3)],
)
def test_stable_adamw(make, decay, betas, eps, grads):
    params = parameters(torch, grads)
    peer = make(params, lr=1e-2, betas=betas, eps=eps, weight_decay=decay)
    rows, firsts, seconds = [], [], []
    for step in range(STEPS):
        put(torch, params, grads, step)
        peer.step()
        states = [peer.state[p] for p in params]
        rows.append([p.detach().numpy().copy() for p in params])
        firsts.append([s["exp_avg"].numpy().copy() for s in states])
        seconds.append([s["exp_avg_sq"].numpy().copy() for s in states])
    adam = optclip.scale_by_stable_adam(*betas, eps, weight_decay=decay)
    tx = optax.chain(adam, optax.scale_by_learning_rate(1e-2))
    ours, (state, _) = train(tx, grads)
    for leaf in range(len(grads)):
        # Moments cross zero, so the tolerance is relative to their mean magnitude.
        close(ours[leaf], stacked(rows)[leaf], atol=2e-6)
        size = np.abs(stacked(firsts)[leaf]).mean()
        close(state.stable_mu[leaf], stacked(firsts)[leaf], atol=1e-5 * size)
        close(state.stable_nu[leaf], stacked(seconds)[leaf], atol=1e-30)


@pytest.mark.parametrize("clipping", [1e-3, 0.01, 0.3])
def test_agc(clipping):
    rng = np.random.default_rng(0)
    shapes = {"conv": (5, 3, 2, 4), "stack": (3, 6, 4), "dense": (6, 4), "bias": (6,)}
    weights, grads = (
        {n: np.asarray(rng.normal(size=s) * f, np.float32) for n, s in shapes.items()}
        for f in (0.5, 0.1)
    )
    axis = {"conv": (1, 2, 3), "stack": 1, "dense": 1}
    tx = optclip.adaptive_grad_clip(clipping, axis=axis)
    ours, _ = tx.update(grads, tx.init(weights), weights)
    for name, grad in grads.items():
        both = torch.tensor(weights[name]), torch.tensor(grad)
        peer = optimizers().agc(*both, agc_clip_val=clipping)
        close(ours[name], peer.numpy())


def heavyball():
    pytest.importorskip("heavyball")
    from heavyball import utils

    utils.compile_mode = None
    return utils


LEAF, ELEMENT = optclip.scopes.leaf(), optclip.scopes.element()

HEAVYBALLS = {
    "l2_clip_": (optclip.clip_by_leaf_norm, {}),
    "rmsnorm_clip_": (optclip.clip_by_block_rms, {}),
    "global_l2norm_clip": (optclip.clip_by_global_norm, {}),
    "global_rmsnorm_clip": (optclip.clip_by_global_norm, {"ord": "rms"}),
}


def draws(scale):
    return [x[3] * np.float32(scale) for x in gradients(7, zeros=False)]


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("clip", HEAVYBALLS)
@pytest.mark.parametrize("limit", [0.3, 2.0])
def test_hard_clips_of_heavyball(clip, limit, scale):
    make, options = HEAVYBALLS[clip]
    grads = draws(scale)
    peers = getattr(heavyball(), clip)([torch.tensor(g) for g in grads], limit)
    tx = make(limit, **options)
    all_close(tx.update(grads, tx.init(grads))[0], [p.numpy() for p in peers])


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_per_leaf_agc_of_heavyball(scale):
    grads = draws(scale)
    weights = [np.full(g.shape, 0.1, np.float32) for g in grads]
    tensors = [[torch.tensor(x) for x in xs] for xs in (weights, grads)]
    peers = heavyball().adaptive_gradient_clipping_(*tensors, 0.5)
    tx = optclip.clip_by_rule(optclip.rules.relative_to_params(0.5), scope=LEAF)
    ours, _ = tx.update(grads, tx.init(weights), weights)
    all_close(ours, [p.numpy() for p in peers])


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_soft_clips_of_heavyball(scale):
    grads, utils = draws(scale), heavyball()
    # Its softsign is 2 * x / (1 + |x|), so it equals that of 2 * x with a bound of 2.
    peers = utils.softsign_compress([torch.tensor(g) for g in grads])
    tx = optclip.soft_clip(2.0, kind="rational", scope=ELEMENT)
    doubled = [2 * g for g in grads]
    all_close(tx.update(doubled, tx.init(grads))[0], [p.numpy() for p in peers])
    # Only the hyperbolic tangent, without the logarithm.
    peers = utils.trust_region_clip_([torch.tensor(g) for g in grads], 1.0, 1.5)
    tx = optclip.soft_clip(1.5, kind="tanh", scope=ELEMENT)
    all_close(tx.update(grads, tx.init(grads))[0], [p.numpy() for p in peers])
