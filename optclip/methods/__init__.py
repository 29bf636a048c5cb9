"""Clips by their published names; each is a few lines over `optclip.clip`."""

from optclip.methods._fixed import (
    clip_by_global_norm,
    clip_by_leaf_norm,
    clip_by_value,
    clip_per_layer,
)
from optclip.methods._relative import adaptive_grad_clip
from optclip.methods._torch import clip_grad_norm, clip_grad_value
from optclip.methods._units import (
    clip_by_block_rms,
    clip_by_unit_norm,
    normalize_by_norm,
    soft_clip,
)

__all__ = [
    "adaptive_grad_clip",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "clip_by_leaf_norm",
    "clip_by_unit_norm",
    "clip_by_value",
    "clip_grad_norm",
    "clip_grad_value",
    "clip_per_layer",
    "normalize_by_norm",
    "soft_clip",
]
