"""The third act: gradients whose squares overflow, clipped to a norm of 1."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optclip
from optclip.demo import model, training
from optclip.demo.options import Options, Sizes

__all__ = ["BOUND", "HUGE", "Overflow", "measure"]

BOUND, HUGE = 1.0, 1e25
CLIPS = {
    "optax": optax.clip_by_global_norm(BOUND),
    "optclip": optclip.clip_by_global_norm(BOUND),
}


class Overflow(NamedTuple):
    """The norms of one gradient before and after clips, at many scales.

    Attributes:
        before: By dtype, the norms before the clip.
        after: By package and dtype, the norms after it.
        huge: By package, the norm after clipping a float32 gradient of norm `HUGE`.
    """

    before: dict[str, np.ndarray]
    after: dict[tuple[str, str], np.ndarray]
    huge: dict[str, float]


def _scaled(grads: Any, norm: Any, dtype: Any) -> Any:
    """Returns gradients of a given norm, without an intermediate overflow."""
    typical = jnp.float32(np.linalg.norm([np.linalg.norm(np.ravel(g)) for g in grads]))
    return [(g * (norm / typical)).astype(dtype) for g in grads]


def _norm(grads: Any) -> float:
    return float(
        np.linalg.norm(np.concatenate([np.ravel(np.float64(g)) for g in grads]))
    )


def measure(options: Options, sizes: Sizes, codes: Any) -> Overflow:
    """Clips the first gradient of the demo's network, scaled to many norms."""
    params = jax.tree.map(lambda x: x[0], model.create(*sizes[:2], jnp.arange(1)))
    windows = training.windows_at(jnp.asarray(codes), 0, 0, sizes)
    definition = model.define(sizes.symbols, sizes.hidden)
    grads = jax.tree.leaves(jax.grad(model.loss)(params, definition, windows))
    before, after = {}, {}
    # The largest entry of a float16 gradient must be below 65504.
    for dtype, most in ((jnp.float32, 36.0), (jnp.float16, 4.5)):
        name = jnp.dtype(dtype).name
        before[name] = np.logspace(-1, most, 75)
        rows = [_scaled(grads, norm, dtype) for norm in before[name]]
        for package, clip in CLIPS.items():
            state = clip.init(rows[0])
            update = jax.jit(lambda g, s, clip=clip: clip.update(g, s)[0])
            norms = [_norm(jax.device_get(update(row, state))) for row in rows]
            after[package, name] = np.array(norms)
    huge = {}
    for package, clip in CLIPS.items():
        given = _scaled(grads, HUGE, jnp.float32)
        huge[package] = _norm(jax.device_get(clip.update(given, clip.init(given))[0]))
    return Overflow(before, after, huge)
