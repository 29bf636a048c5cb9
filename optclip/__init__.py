"""Gradient clipping for JAX and Optax: right in every dtype, adaptive, observable.

Every transformation is an `optax.GradientTransformationExtraArgs`: it chains, jits,
scans, vmaps, shards and checkpoints as Optax's own.

    tx = optax.chain(optclip.clip_by_global_norm(1.0), optax.adamw(3e-4))
    ...
    optclip.metrics(opt_state)  # {"clip/norm_before": ..., "clip/scale": ..., ...}
"""

from optclip import actions, norms, rules, scopes
from optclip.attribution import Culprit, culprits
from optclip.clipping import ClipState, GroupStats, UnrecordedState, clip
from optclip.diagnosis.diagnose import diagnose
from optclip.diagnosis.findings import Action, Finding, Report
from optclip.diagnosis.page import report
from optclip.diagnosis.taps import Site, Taps, tap
from optclip.diagnosis.thresholds import Suggestion, suggest_threshold
from optclip.feedback import CarryState, u_clip
from optclip.methods import (
    adagc,
    adagn,
    adamw_clip,
    adaptive_grad_clip,
    autoclip,
    cap_update,
    clip_by_block_rms,
    clip_by_global_norm,
    clip_by_leaf_norm,
    clip_by_unit_norm,
    clip_by_value,
    clip_grad_norm,
    clip_grad_value,
    clip_per_layer,
    dual_ema_clip,
    ema_sigma_clip,
    norm_growth_limiter,
    normalize_by_norm,
    percentile_clip,
    quantile_clip,
    rolling_sigma_clip,
    soft_clip,
    spam_clip,
    stable_spam_clip,
    trust_ratio_clip,
    zclip,
)
from optclip.monitoring import MonitorState, monitor
from optclip.per_example import ExampleStats, per_example_clip
from optclip.sharding import state_specs
from optclip.skipping import BadSteps, SkipState, skip_steps
from optclip.spectral import spectral_clip
from optclip.stabilize import StabilizeState, stabilize
from optclip.stable_adam import StableAdamState, scale_by_stable_adam
from optclip.taken import step_taken
from optclip.telemetry import leaf_metrics, metrics

__version__ = "0.1.0"

__all__ = [
    "Action",
    "BadSteps",
    "CarryState",
    "ClipState",
    "Culprit",
    "ExampleStats",
    "Finding",
    "GroupStats",
    "MonitorState",
    "Report",
    "Site",
    "SkipState",
    "StabilizeState",
    "StableAdamState",
    "Suggestion",
    "Taps",
    "UnrecordedState",
    "actions",
    "adagc",
    "adagn",
    "adamw_clip",
    "adaptive_grad_clip",
    "autoclip",
    "cap_update",
    "clip",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "clip_by_leaf_norm",
    "clip_by_unit_norm",
    "clip_by_value",
    "clip_grad_norm",
    "clip_grad_value",
    "clip_per_layer",
    "culprits",
    "diagnose",
    "dual_ema_clip",
    "ema_sigma_clip",
    "leaf_metrics",
    "metrics",
    "monitor",
    "norm_growth_limiter",
    "normalize_by_norm",
    "norms",
    "per_example_clip",
    "percentile_clip",
    "quantile_clip",
    "report",
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
    "step_taken",
    "suggest_threshold",
    "tap",
    "trust_ratio_clip",
    "u_clip",
    "zclip",
]
