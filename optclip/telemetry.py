"""What clips did, read from any optimizer state, as flat dicts of scalars.

Nothing here computes on gradients: all figures were measured by the clip itself, and
are read from its state, inside or outside of jit, however deep it lies.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optclip._lookup import find, known, names_of, outside_jit
from optclip.clipping import ClipState
from optclip.monitoring import MonitorState
from optclip.skipping import SkipState

__all__ = ["leaf_metrics", "metrics"]


def _prefixes(prefix: str, count: int) -> list[str]:
    return [prefix if i == 0 else f"{prefix}_{i + 1}" for i in range(count)]


def metrics(opt_state: Any, prefix: str = "clip") -> dict[str, jax.Array]:
    """Returns what the clips in an optimizer state did, as a flat dict of scalars.

    | key                     | meaning                                                |
    | ----------------------- | ------------------------------------------------------ |
    | `clip/norm_before`      | norm of all updates before the clip                    |
    | `clip/norm_after`       | the same after it                                      |
    | `clip/threshold`        | threshold of the group that was shortened most         |
    | `clip/scale`            | smallest factor that a group was multiplied by         |
    | `clip/clipped`          | share of groups above their threshold at this step     |
    | `clip/steps`            | updates so far                                         |
    | `clip/clipped_steps`    | updates in which a group was above its threshold       |
    | `clip/clipped_fraction` | their share                                            |
    | `clip/nonfinite_steps`  | updates that held a NaN or inf                         |

    A second clip in the state is called `clip_2`, and so on in the order of the chain.
    A `monitor` gives `monitor/norm`, `monitor/steps` and `monitor/nonfinite_steps`, and
    `skip_steps`:

    | key                      | meaning                                               |
    | ------------------------ | ----------------------------------------------------- |
    | `skip/norm`, `skip/loss` | of the last step offered, left out or not             |
    | `skip/threshold`         | the norm above which that step was a spike            |
    | `skip/loss_threshold`    | the same of the loss; 0 where none was judged         |
    | `skip/steps`             | steps so far                                          |
    | `skip/skipped_steps`     | those left out                                        |
    | `skip/spike_steps`       | those left out though all was finite                  |
    | `skip/nonfinite_steps`   | those whose gradients held a NaN or inf               |
    | `skip/in_a_row`          | left out in a row until now: 0 if the last was taken  |
    | `skip/last_skipped_step` | number of the last step left out; -1 if there is none |

    Args:
        opt_state: Any tree that holds states of clips: that of a chain, of
            `optax.MultiSteps`, of `flax.nnx.Optimizer`, a whole train state, ...
        prefix: What the keys of clips begin with.

    Returns:
        A dict of float32 and int32 scalars, on device; inside jit, of tracers. Empty if
        there is no clip. Fetch it with one ``jax.device_get``.

    Example:
        >>> import jax.numpy as jnp, optax, optclip
        >>> tx = optax.chain(optclip.clip_by_global_norm(1.0), optax.adam(1e-3))
        >>> params = jnp.zeros(2)
        >>> _, state = tx.update(jnp.array([3.0, 4.0]), tx.init(params), params)
        >>> float(optclip.metrics(state)["clip/norm_before"])
        5.0
    """
    out: dict[str, jax.Array] = {}
    clips = find(opt_state, (ClipState,))
    for name, state in zip(_prefixes(prefix, len(clips)), clips, strict=True):
        steps = jnp.maximum(state.steps, 1).astype(jnp.float32)
        out |= {
            f"{name}/norm_before": state.norm_before,
            f"{name}/norm_after": state.norm_after,
            f"{name}/threshold": state.threshold,
            f"{name}/scale": state.scale,
            f"{name}/clipped": state.clipped,
            f"{name}/steps": state.steps,
            f"{name}/clipped_steps": state.clipped_steps,
            f"{name}/clipped_fraction": state.clipped_steps / steps,
            f"{name}/nonfinite_steps": state.seen.nonfinite_steps,
        }
    monitors = find(opt_state, (MonitorState,))
    for name, state in zip(_prefixes("monitor", len(monitors)), monitors, strict=True):
        out |= {
            f"{name}/norm": state.monitored_norm,
            f"{name}/steps": state.monitored_steps,
            f"{name}/nonfinite_steps": state.seen.nonfinite_steps,
        }
    wrappers = find(opt_state, (SkipState,))
    for name, state in zip(_prefixes("skip", len(wrappers)), wrappers, strict=True):
        out |= {
            f"{name}/norm": state.offered_norm,
            f"{name}/loss": state.offered_loss,
            f"{name}/threshold": state.skip_above,
            f"{name}/loss_threshold": state.skip_loss_above,
            f"{name}/steps": state.offered_steps,
            f"{name}/skipped_steps": state.skipped_steps,
            f"{name}/spike_steps": state.spike_steps,
            f"{name}/nonfinite_steps": state.seen.nonfinite_steps,
            f"{name}/in_a_row": state.skipped_run,
            f"{name}/last_skipped_step": jnp.max(state.last_bad.bad_step, axis=-1),
        }
    return out


def leaf_metrics(opt_state: Any, params: Any) -> dict[str, jax.Array]:
    """Returns norm, threshold and scale by parameter path, as a flat dict of scalars.

    For clips in leaf, label and layer scope: `PATH/norm_before`, `PATH/threshold` and
    `PATH/scale`, where in label scope leaves with one label have the same figures, and
    in layer scope the path is followed by the layer's number, as `blocks/kernel/3`. For
    a `monitor`: `PATH/norm`. Figures of a second clip or monitor end in `_2`.

    Args:
        opt_state: Any tree that holds states of clips.
        params: The parameters that the optimizer was initialised with, for their paths;
            arrays or shapes.

    Returns:
        A dict of float32 scalars, on device. The codes of paths must be known, so call
        it outside of jit.

    Raises:
        ValueError: If ``params`` are not those that the optimizer was initialised with,
            or the state has no figures by leaf.

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> params = {"w": jnp.zeros(2), "b": jnp.zeros(1)}
        >>> tx = optclip.clip_by_leaf_norm(1.0)
        >>> state = tx.init(params)
        >>> _, state = tx.update({"w": jnp.ones(2), "b": jnp.ones(1)}, state)
        >>> float(optclip.leaf_metrics(state, params)["b/norm_before"])
        1.0
    """
    names = names_of(params)
    out: dict[str, jax.Array] = {}
    clips = [s for s in find(opt_state, (ClipState,)) if s.groups is not None]
    monitors = find(opt_state, (MonitorState,))
    if not clips and not monitors:
        raise ValueError(
            "`opt_state` has no figures by leaf: clips keep them in leaf, label and "
            "layer scope. Use one of these, or chain `optclip.monitor()`."
        )
    for state in [*clips, *monitors]:
        outside_jit(state, "leaf_metrics")
    for k, state in enumerate(clips):
        end = "" if k == 0 else f"_{k + 1}"
        rows = {
            f"norm_before{end}": state.groups.group_norm,
            f"threshold{end}": state.groups.group_threshold,
            f"scale{end}": state.groups.group_scale,
        }
        which = np.asarray(state.groups.group_of_leaf)
        which = which.reshape(-1, which.shape[-1])[0]
        for i, path in known(state.seen.leaf_code, names):
            for figure, values in rows.items():
                if not isinstance(values, tuple):
                    out[f"{path}/{figure}"] = values[..., which[i]]
                    continue
                # An array for each kind of leaf, with one row for each such leaf.
                row = values[which[i]][int(np.sum(which[:i] == which[i]))]
                for at in np.ndindex(row.shape):
                    name = "/".join([path, *map(str, at)])
                    out[f"{name}/{figure}"] = row[at]
    for k, state in enumerate(monitors):
        end = "" if k == 0 else f"_{k + 1}"
        for i, path in known(state.seen.leaf_code, names):
            out[f"{path}/norm{end}"] = state.leaf_norm[..., i]
    return out
