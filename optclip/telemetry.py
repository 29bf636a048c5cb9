"""What clips did, read from any optimizer state: flat dicts of scalars, and culprits.

Nothing here computes on gradients: all figures were measured by the clip itself, and
are read from its state, inside or outside of jit, however deep it lies.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from optclip import _trees
from optclip._state import ClipState
from optclip.monitoring import MonitorState

__all__ = ["Culprit", "culprits", "leaf_metrics", "metrics"]


class Culprit(NamedTuple):
    """A leaf that held entries that were not finite.

    Attributes:
        path: Path of the parameter, as "encoder/0/kernel".
        step: Number of the update, where the first is number 0.
        nan: How many entries were NaN.
        pos_inf: How many were +inf.
        neg_inf: How many were -inf.
    """

    path: str
    step: int
    nan: int
    pos_inf: int
    neg_inf: int


def _plain(leaf: Any) -> Any:
    """Returns the array in a Flax NNX variable; other leaves as they are."""
    if isinstance(leaf, (jax.Array, np.ndarray)) or not hasattr(leaf, "get_value"):
        return leaf
    return leaf.get_value()


def _is_variable(node: Any) -> bool:
    return hasattr(node, "get_value") and hasattr(node, "set_value")


def _outside_jit(state: Any, name: str) -> None:
    """Raises where the codes of paths can't be read."""
    if any(isinstance(x, Tracer) for x in jax.tree.leaves(state.seen)):
        raise ValueError(
            f"`{name}` looks up the names of leaves: call it outside of jit, on the "
            "state that the step returned. `metrics` works inside."
        )


def _refuse_optimizers(opt_state: Any) -> None:
    if isinstance(opt_state, optax.GradientTransformation):
        raise TypeError(
            "`opt_state` must be the state of an optimizer, got the optimizer itself. "
            "Pass what `init` or `update` returned."
        )


def _find(opt_state: Any, kinds: tuple[type, ...]) -> list[Any]:
    """Returns the states of these kinds, in the order of the chain."""
    _refuse_optimizers(opt_state)
    states: list[Any] = []

    def stop(node):
        return isinstance(node, kinds)

    for node in jax.tree.leaves(opt_state, is_leaf=stop):
        if stop(node):
            states.append(jax.tree.map(_plain, node, is_leaf=_is_variable))
    return states


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
    A `monitor` gives `monitor/norm`, `monitor/steps` and `monitor/nonfinite_steps`.

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
    clips = _find(opt_state, (ClipState,))
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
    monitors = _find(opt_state, (MonitorState,))
    for name, state in zip(_prefixes("monitor", len(monitors)), monitors, strict=True):
        out |= {
            f"{name}/norm": state.monitored_norm,
            f"{name}/steps": state.monitored_steps,
            f"{name}/nonfinite_steps": state.seen.nonfinite_steps,
        }
    return out


def _names(params: Any) -> dict[int, str]:
    """Returns the path that each code in a state stands for."""
    paths = _trees.leaves_of(params).paths
    codes = _trees.path_codes(paths)
    return {int(c): p for c, p in zip(codes, paths, strict=False)}


def _known(codes: Any, names: dict[int, str]) -> list[tuple[int, str]]:
    """Returns (index, path) of the leaves that a state watched."""
    table = np.asarray(codes).reshape(-1, np.asarray(codes).shape[-1])[0]
    empty = int(_trees.path_codes([])[0])
    missing = [int(c) for c in table if int(c) not in names and int(c) != empty]
    if missing:
        raise ValueError(
            f"`params` has no parameter for {len(missing)} of the {len(table)} leaves "
            "that the state watched. Pass the parameters that the optimizer was "
            "initialised with."
        )
    return [(i, names[int(c)]) for i, c in enumerate(table) if int(c) in names]


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
    names = _names(params)
    out: dict[str, jax.Array] = {}
    clips = [s for s in _find(opt_state, (ClipState,)) if s.groups is not None]
    monitors = _find(opt_state, (MonitorState,))
    if not clips and not monitors:
        raise ValueError(
            "`opt_state` has no figures by leaf: clips keep them in leaf, label and "
            "layer scope. Use one of these, or chain `optclip.monitor()`."
        )
    for state in [*clips, *monitors]:
        _outside_jit(state, "leaf_metrics")
    for k, state in enumerate(clips):
        end = "" if k == 0 else f"_{k + 1}"
        rows = {
            f"norm_before{end}": state.groups.group_norm,
            f"threshold{end}": state.groups.group_threshold,
            f"scale{end}": state.groups.group_scale,
        }
        which = np.asarray(state.groups.group_of_leaf)
        which = which.reshape(-1, which.shape[-1])[0]
        for i, path in _known(state.seen.leaf_code, names):
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
        for i, path in _known(state.seen.leaf_code, names):
            out[f"{path}/norm{end}"] = state.leaf_norm[..., i]
    return out


def culprits(opt_state: Any, params: Any) -> list[Culprit]:
    """Returns the leaves that held NaN or inf at the last such update, the worst first.

    Args:
        opt_state: Any tree that holds states of clips or monitors. The first of them
            that met a non-finite entry counts: it stands nearest to the gradients.
        params: The parameters that the optimizer was initialised with, for their paths.

    Returns:
        One `Culprit` a leaf, empty if all was finite so far. The last bad update is
        kept: compare ``step`` with `clip/steps`. Call it outside of jit; it fetches the
        counts from the device.

    Raises:
        ValueError: If ``params`` are not those that the optimizer was initialised with,
            or the state is a batch of states (take one of them first).

    Example:
        >>> import jax.numpy as jnp, optclip
        >>> params = {"w": jnp.zeros(3), "b": jnp.zeros(1)}
        >>> tx = optclip.clip_by_global_norm(1.0, nonfinite="skip")
        >>> grads = {"w": jnp.array([1.0, jnp.nan, jnp.inf]), "b": jnp.ones(1)}
        >>> _, state = tx.update(grads, tx.init(params), params)
        >>> optclip.culprits(state, params)
        [Culprit(path='w', step=0, nan=1, pos_inf=1, neg_inf=0)]
    """
    names = _names(params)
    states = _find(opt_state, (ClipState, MonitorState))
    if not states:
        raise ValueError(
            "`opt_state` holds no state of a clip or monitor of optclip. Pass the "
            "state of the optimizer that the clip is part of."
        )
    for state in states:
        _outside_jit(state, "culprits")
        if np.ndim(state.seen.last_nonfinite_step):
            raise ValueError(
                "The state holds a batch of states (of `jax.vmap` or `jax.pmap`): take "
                "one of them, as in `jax.tree.map(lambda x: x[0], opt_state)`."
            )
        step = int(state.seen.last_nonfinite_step)
        if step < 0:
            continue
        entries = np.asarray(state.seen.nonfinite_entries)
        found = [
            Culprit(path, step, *(int(n) for n in entries[i]))
            for i, path in _known(state.seen.leaf_code, names)
            if entries[i].any()
        ]
        return sorted(found, key=lambda c: -(c.nan + c.pos_inf + c.neg_inf))
    return []
