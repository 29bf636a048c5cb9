"""Gradient clipping for JAX and Optax: right in every dtype, adaptive, observable.

Every transformation is an `optax.GradientTransformationExtraArgs`: it chains, jits,
scans, vmaps, shards and checkpoints as Optax's own.

    tx = optax.chain(optclip.clip_by_global_norm(1.0), optax.adamw(3e-4))
    ...
    optclip.metrics(opt_state)  # {"clip/norm_before": ..., "clip/scale": ..., ...}
"""

from optclip import actions, norms, rules, scopes
from optclip.clipping import ClipState, GroupStats, clip
from optclip.methods import (
    adaptive_grad_clip,
    clip_by_block_rms,
    clip_by_global_norm,
    clip_by_leaf_norm,
    clip_by_unit_norm,
    clip_by_value,
    clip_grad_norm,
    clip_grad_value,
    clip_per_layer,
    normalize_by_norm,
    soft_clip,
)
from optclip.monitoring import MonitorState, monitor
from optclip.telemetry import Culprit, culprits, leaf_metrics, metrics

__version__ = "0.1.0"

__all__ = [
    "ClipState",
    "Culprit",
    "GroupStats",
    "MonitorState",
    "actions",
    "adaptive_grad_clip",
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
    "leaf_metrics",
    "metrics",
    "monitor",
    "normalize_by_norm",
    "norms",
    "rules",
    "scopes",
    "soft_clip",
]
