"""Gradient clipping for JAX and Optax: accurate in every dtype, adaptive, observable.

Every transformation is an `optax.GradientTransformationExtraArgs`. It works with
`optax.chain`, `jax.jit`, `jax.lax.scan`, `jax.vmap`, sharding and checkpoints like
those of Optax.

    tx = optax.chain(optclip.clip_by_global_norm(1.0), optax.adamw(3e-4))
    ...
    optclip.metrics(opt_state)  # {"clip/norm_before": ..., "clip/scale": ..., ...}
"""

import difflib as _difflib
import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from optclip import actions, norms, rules, scopes, states
from optclip.clipping import clip_by_rule
from optclip.methods.adagc import adagc
from optclip.methods.adagn import adagn
from optclip.methods.adamw_clip import adamw_clip
from optclip.methods.agc import adaptive_grad_clip
from optclip.methods.autoclip import autoclip
from optclip.methods.block_rms import clip_by_block_rms
from optclip.methods.cap_update import cap_update
from optclip.methods.dual_ema import dual_ema_clip
from optclip.methods.ema_sigma import ema_sigma_clip
from optclip.methods.global_norm import clip_by_global_norm
from optclip.methods.leaf_norm import clip_by_leaf_norm
from optclip.methods.norm_growth_limiter import norm_growth_limiter
from optclip.methods.normalized import normalize_by_norm
from optclip.methods.per_layer import clip_per_layer
from optclip.methods.percentile import percentile_clip
from optclip.methods.quantile import quantile_clip
from optclip.methods.rolling_sigma import rolling_sigma_clip
from optclip.methods.soft import soft_clip
from optclip.methods.spam import spam_clip
from optclip.methods.spectral import spectral_clip
from optclip.methods.stable_adam import scale_by_stable_adam
from optclip.methods.stable_spam import stable_spam_clip
from optclip.methods.torch import clip_grad_norm, clip_grad_value
from optclip.methods.trust_ratio import trust_ratio_clip
from optclip.methods.unit_norm import clip_by_unit_norm
from optclip.methods.value import clip_by_value
from optclip.methods.zclip import zclip
from optclip.sharding import state_specs
from optclip.telemetry import (
    NonfiniteLeaf,
    leaf_metrics,
    metrics,
    nonfinite_leaves,
    record_norms,
)
from optclip.wrappers.clipped_grad import ExampleStats, clipped_grad
from optclip.wrappers.skip_steps import skip_steps
from optclip.wrappers.stabilize import stabilize
from optclip.wrappers.step_taken import step_taken
from optclip.wrappers.u_clip import u_clip

if _TYPE_CHECKING:
    from optclip import diagnosis
    from optclip.diagnosis import diagnose

__version__ = "0.2.0.dev0"

__all__ = [
    "ExampleStats",
    "NonfiniteLeaf",
    "actions",
    "adagc",
    "adagn",
    "adamw_clip",
    "adaptive_grad_clip",
    "autoclip",
    "cap_update",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "clip_by_leaf_norm",
    "clip_by_rule",
    "clip_by_unit_norm",
    "clip_by_value",
    "clip_grad_norm",
    "clip_grad_value",
    "clip_per_layer",
    "clipped_grad",
    "diagnose",
    "diagnosis",
    "dual_ema_clip",
    "ema_sigma_clip",
    "leaf_metrics",
    "metrics",
    "nonfinite_leaves",
    "norm_growth_limiter",
    "normalize_by_norm",
    "norms",
    "percentile_clip",
    "quantile_clip",
    "record_norms",
    "rolling_sigma_clip",
    "rules",
    "scale_by_stable_adam",
    "scopes",
    "skip_steps",
    "soft_clip",
    "spam_clip",
    "spectral_clip",
    "stabilize",
    "stable_spam_clip",
    "state_specs",
    "states",
    "step_taken",
    "trust_ratio_clip",
    "u_clip",
    "zclip",
]


# What other libraries call some of these functions.
_ALIASES = {
    "agc": "adaptive_grad_clip",
    "clip_by_norm": "clip_by_global_norm",
    "clip_grad_norm_": "clip_grad_norm",
    "clip_grad_value_": "clip_grad_value",
    "clip_global_norm": "clip_by_global_norm",
}


def __getattr__(name: str) -> _Any:
    # Imported on first use: `optclip.diagnosis` takes as long to import as all the
    # rest.
    if name == "diagnosis":
        return _importlib.import_module("optclip.diagnosis")
    if name == "diagnose":
        return _importlib.import_module("optclip.diagnosis").diagnose
    if name == "clip":
        raise AttributeError(
            "optclip has no `clip`. For `optax.clip`, which bounds each entry, use "
            "`optclip.clip_by_value`. To clip by a rule, a scope and an action, use "
            "`optclip.clip_by_rule`."
        )
    message = f"module 'optclip' has no attribute {name!r}"
    alias = _ALIASES.get(name)
    near = [alias] if alias else _difflib.get_close_matches(name, __all__, 2)
    if near:
        message += f". Did you mean {' or '.join(f'`optclip.{n}`' for n in near)}?"
    raise AttributeError(message)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
