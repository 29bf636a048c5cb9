"""``original=True`` matches the published code, in NumPy, at every magnitude.

Each function here is that code for a single number: it takes the norms of all steps and
yields the clipped norms.
"""

import adaptive
import jax
import numpy as np
import pytest

import optclip


def adagc(norms, beta=0.98, relative=1.05, absolute=1.0, warmup=100, eps=1e-8):
    level = None
    for t, n in enumerate(norms, 1):
        if t < warmup or level is None:
            n = n * min(absolute / (n + eps), 1.0)
            level = n if level is None else min(level, n)
        else:
            n = n * min(relative * max(level, eps) / max(n, eps), 1.0)
            level = beta * level + (1 - beta) * n
        yield n


def adagn(norms, gamma1=0.7, gamma2=0.9, eps=1e-8):
    m = q = 0.0
    for t, n in enumerate(norms, 1):
        m, q = gamma1 * m + (1 - gamma1) * n, gamma2 * q + (1 - gamma2) * n * n
        size = np.sqrt(q / (1 - gamma2**t)) + eps
        yield m / (1 - gamma1**t) / size if n > 0 else 0.0


def adamwclip(norms, ratio=3.0, beta2=0.999, floor=1e-10):
    v = 0.0
    for t, g in enumerate(norms, 1):
        correction = 1 / (1 - beta2 ** (t - 1)) if t > 1 else 1.0
        limit = max(ratio * np.sqrt(v * correction), floor)
        g = min(max(g, -limit), limit)
        v = beta2 * v + (1 - beta2) * g * g
        yield g


def autoclip(norms, percentile=10.0):
    for t, n in enumerate(norms, 1):
        limit = np.percentile(norms[:t], percentile)
        yield n * min(1.0, limit / (n + 1e-6))


def fira(norms, gamma=1.01):
    last = None
    for n in norms:
        if last is not None:
            n = n / (max(n / (last + 1e-8), gamma) / gamma)
        last = n
        yield n


def levanter(norms, window=128, sigmas=3.0):
    kept = []
    for n in norms:
        limit = np.inf
        if len(kept) >= max(2, window // 2):
            past = kept[-window:]
            limit = np.mean(past) + sigmas * max(np.std(past), 1e-6)
        kept.append(n)
        yield limit if n > limit else n


def open_sora(norms, decay=0.99):
    mean, var = None, 0.0
    for n in norms:
        if mean is None:
            mean = min(3 * n, 1.0)
            yield n
            continue
        limit = mean + 3 * np.sqrt(var)
        if n > limit:
            yield n * limit / (n + 1e-6)
            continue
        mean = decay * mean + (1 - decay) * n
        var = decay * var + (1 - decay) * (mean - n) ** 2
        yield n


def pde_transformer(norms, first=0.9, second=0.99, trigger=2.0, target=1.1):
    fast = slow = 0.0
    for t, n in enumerate(norms):
        most, end = 10000.0, 1.0
        if slow > 0:
            most = trigger * slow / (1 - second**t)
            end = target * fast / (1 - first**t)
        seen = end if n > most and slow > 0 else n
        yield n * min(end / (n + 1e-6), 1.0) if n > most else n
        fast = first * fast + (1 - first) * seen
        slow = second * slow + (1 - second) * seen


def zclip(norms, alpha=0.97, thresh=2.5, warmup=25, eps=1e-6):
    mean = var = None
    for t, n in enumerate(norms, 1):
        if t <= warmup:
            if t == warmup:
                mean, var = np.mean(norms[:t]), np.var(norms[:t])
            yield n
            continue
        std = np.sqrt(var)
        z = (n - mean) / (std + eps)
        end = mean + thresh * std / (z / thresh) if z > thresh else n
        mean = alpha * mean + (1 - alpha) * end
        var = alpha * var + (1 - alpha) * (end - mean) ** 2
        yield n * end / (n + 1e-6) if n > end else n


CASES = {
    "adagc": (optclip.adagc, {}, adagc),
    "adagn": (optclip.adagn, {}, adagn),
    "adamw_clip": (optclip.adamw_clip, {}, adamwclip),
    "autoclip": (optclip.autoclip, {}, autoclip),
    "dual_ema_clip": (optclip.dual_ema_clip, {}, pde_transformer),
    "ema_sigma_clip": (optclip.ema_sigma_clip, {}, open_sora),
    "norm_growth_limiter": (optclip.norm_growth_limiter, {}, fira),
    "rolling_sigma_clip": (optclip.rolling_sigma_clip, {}, levanter),
    "zclip": (optclip.zclip, {"max_grad_norm": None}, zclip),
}


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_originals_follow_the_published_code_at_every_size(name, zeros):
    make, options, published = CASES[name]
    tx = make(**options, original=True)

    @jax.jit
    def run(norms):
        first = tx.init(norms[:1])
        step = lambda s, n: tx.update(n[None], s)[::-1]  # noqa: E731
        return jax.lax.scan(step, first, norms)[1][:, 0]

    for size in (1e-9, 1e-7, 1e-6, 1.0, 1e5):
        norms = np.float32(size) * adaptive.norms(3, zeros=zeros)
        wanted = list(published(norms.astype(np.float64)))
        np.testing.assert_allclose(run(norms), wanted, rtol=2e-5, atol=1e-6 * size)


def test_fast_average_is_recorded_even_if_the_norm_is_smaller():
    norms = np.float32([1.0] * 60 + [1.6] + [1.2, 1.4, 9.0] * 3)
    tx = optclip.dual_ema_clip(1.5, 3.0, original=True)
    out = jax.lax.scan(
        lambda s, n: tx.update(n[None], s)[::-1], tx.init(norms[:1]), norms
    )[1]
    wanted = list(pde_transformer(norms.astype(float), trigger=1.5, target=3.0))
    np.testing.assert_allclose(out[:, 0], wanted, rtol=1e-5)
