"""Every adaptive transformation, its scopes, and norms to test it with."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optclip
from optclip import scopes

SCOPES = {
    "tree": scopes.tree(),
    "leaf": scopes.leaf(),
    "layer": scopes.layer({"blocks": 1}),
    "unit": scopes.unit(),
    "label": scopes.label(lambda path: path[:1]),
}


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """A transformation with memory.

    Attributes:
        make: Makes the transformation from its options.
        scoped: Whether it takes ``scope``.
        policies: Whether it takes ``nonfinite``.
    """

    make: Callable
    scoped: bool = True
    policies: bool = True


def with_options(function, **fixed):
    return lambda **options: function(**fixed, **options)


ADAPTIVE = {
    "adagc": Adaptive(with_options(optclip.adagc, warmup_steps=3)),
    "adagn": Adaptive(optclip.adagn),
    "adamw_clip": Adaptive(optclip.adamw_clip, scoped=False),
    "autoclip": Adaptive(with_options(optclip.autoclip, window=8)),
    "autoclip-all": Adaptive(with_options(optclip.autoclip, window=None)),
    "cap_update": Adaptive(optclip.cap_update),
    "dual_ema_clip": Adaptive(optclip.dual_ema_clip),
    "ema_sigma_clip": Adaptive(optclip.ema_sigma_clip),
    "norm_growth_limiter": Adaptive(optclip.norm_growth_limiter),
    "percentile_clip": Adaptive(with_options(optclip.percentile_clip, window=8)),
    "quantile_clip": Adaptive(optclip.quantile_clip),
    "rolling_sigma_clip": Adaptive(with_options(optclip.rolling_sigma_clip, window=8)),
    "spam_clip": Adaptive(
        with_options(optclip.spam_clip, warmup_steps=2), scoped=False
    ),
    "stable_spam_clip": Adaptive(optclip.stable_spam_clip, scoped=False),
    "trust_ratio_clip": Adaptive(optclip.trust_ratio_clip),
    "zclip": Adaptive(with_options(optclip.zclip, warmup_steps=3, max_grad_norm=None)),
    "spectral_clip": Adaptive(
        with_options(optclip.spectral_clip, max_sigma=1.0), False
    ),
    "spectral_clip-soft": Adaptive(
        with_options(optclip.spectral_clip, max_sigma=1.0, method="soft"), False
    ),
    "spectral_clip-hardcap": Adaptive(
        with_options(optclip.spectral_clip, max_sigma=1.0, method="hardcap"), False
    ),
    "u_clip": Adaptive(
        lambda: optclip.u_clip(optclip.clip_by_global_norm(1.0)), False, False
    ),
    "scale_by_stable_adam": Adaptive(
        with_options(optclip.scale_by_stable_adam, weight_decay=0.1), False, False
    ),
    "skip_steps": Adaptive(
        lambda **options: optclip.skip_steps(
            optax.chain(optclip.zclip(**options), optax.sgd(1e-2)), **options
        ),
        False,
        False,
    ),
    "stabilize": Adaptive(
        lambda **options: optclip.stabilize(optax.adam(1e-2), **options), True, False
    ),
}
PAIRS = [
    (name, scope)
    for name, case in ADAPTIVE.items()
    for scope in (SCOPES if case.scoped else ["own"])
]


def build(name, scope="own", **options):
    if scope != "own":
        options["scope"] = SCOPES[scope]
    return ADAPTIVE[name].make(**options)


def params(dtype=jnp.float32):
    rng = np.random.default_rng(7)
    shapes = {"blocks": (2, 3, 2), "kernel": (3, 2), "bias": (2,), "scale": ()}
    return {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()}


def gradients(seed, size=1.0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(size * rng.normal(size=p.shape), dtype), params()
    )


def norms(seed=0, steps=300, zeros=True):
    """Returns norms with spikes, plateaus and, by default, zeros."""
    rng = np.random.default_rng(seed)
    values = np.exp(0.4 * rng.normal(size=steps) + 0.5)
    values[rng.choice(steps, 12, replace=False)] *= 50
    values[60:90] = 1.25
    values[90] = 1.3
    values[200:] *= 3
    if zeros:
        values[rng.choice(np.arange(5, steps), 6, replace=False)] = 0
    return values.astype(np.float32)
