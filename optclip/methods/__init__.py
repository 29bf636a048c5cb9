"""Clips by their published names; each is a few lines over `optclip.clip`."""

from __future__ import annotations

from optclip.methods._fixed import (
    clip_by_global_norm,
    clip_by_leaf_norm,
    clip_by_value,
    clip_per_layer,
)
from optclip.methods._leafwise import adagc, adagn, norm_growth_limiter
from optclip.methods._moments import adamw_clip, spam_clip, stable_spam_clip
from optclip.methods._relative import adaptive_grad_clip, cap_update, trust_ratio_clip
from optclip.methods._running import dual_ema_clip, ema_sigma_clip, zclip
from optclip.methods._torch import clip_grad_norm, clip_grad_value
from optclip.methods._units import (
    clip_by_block_rms,
    clip_by_unit_norm,
    normalize_by_norm,
    soft_clip,
)
from optclip.methods._window import (
    autoclip,
    percentile_clip,
    quantile_clip,
    rolling_sigma_clip,
)

__all__ = [
    "adagc",
    "adagn",
    "adamw_clip",
    "adaptive_grad_clip",
    "autoclip",
    "cap_update",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "clip_by_leaf_norm",
    "clip_by_unit_norm",
    "clip_by_value",
    "clip_grad_norm",
    "clip_grad_value",
    "clip_per_layer",
    "dual_ema_clip",
    "ema_sigma_clip",
    "norm_growth_limiter",
    "normalize_by_norm",
    "percentile_clip",
    "quantile_clip",
    "rolling_sigma_clip",
    "soft_clip",
    "spam_clip",
    "stable_spam_clip",
    "trust_ratio_clip",
    "zclip",
]
