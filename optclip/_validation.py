"""Whether a state is one that `init` returned, and what to do if it is not."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optclip import _names

__all__ = ["own"]

# What has a row per leaf that `init` saw. Updates may have fewer leaves, where nothing
# else in the state depends on them.
_ROWS = {"seen/leaf_code", "seen/nonfinite_kinds", "leaf_norm"}


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_names.path_name(path): jnp.shape(x) for path, x in flat}


def _without_empty_fields(state: Any) -> Any:
    named = state._asdict()
    return jax.tree.structure({k: x for k, x in named.items() if jax.tree.leaves(x)})


def _has_more_rows(state: Any, wanted: Any, absent: int) -> bool:
    """Returns whether a state fits, but that `init` saw leaves which are None now."""
    got, right = _shapes(state), _shapes(wanted)
    differ = {p for p in right if got.get(p) != right[p]}
    return (
        got.keys() == right.keys()
        and (bool(differ) or absent > 0)
        and differ <= _ROWS
        and all(got[p][1:] == right[p][1:] for p in differ)
        and all(0 < got[p][0] - right[p][0] <= absent for p in differ)
        and _without_empty_fields(state) == _without_empty_fields(wanted)
    )


_LEFT_OUT = (
    ". If gradients are None where parameters are not trained, leave these out in "
    "`init` too, as in `tx.init(eqx.filter(model, eqx.is_inexact_array))`"
)


def _difference(state: Any, wanted: Any) -> str:
    """Says where a state first differs from one of the right layout; "" if nowhere."""
    got, right = _shapes(state), _shapes(wanted)
    if got == right:
        alike = jax.tree.structure(state) == jax.tree.structure(wanted)
        return "" if alike else "its arrays are nested in another way"
    codes = "seen/leaf_code"
    if codes in got and got[codes] != right.get(codes, got[codes]):
        more = got[codes] > right[codes]
        return (
            f"`init` saw {got[codes][0]} leaves of real or complex numbers, and the "
            f"updates have {right[codes][0]}{_LEFT_OUT if more else ''}"
        )
    path = next(p for p in right | got if got.get(p) != right.get(p))
    if path not in got:
        return f"it has no `{path}`"
    if path not in right:
        field = path.split("/")[0]
        more = any(p.startswith(f"{field}/") for p in right)
        return f"it has `{path}`, which has no place in it{_LEFT_OUT if more else ''}"
    local = ""
    if jax.sharding.get_abstract_mesh().manual_axes:
        local = (
            ". Inside `jax.shard_map` it is the local shape that counts: give the "
            "state the PartitionSpecs that `optclip.state_specs` returns"
        )
    return f"`{path}` has the shape {got[path]} and should have {right[path]}{local}"


def own(
    state: Any, init: Callable[[], Any], foreign: Sequence[str] = (), absent: int = 0
) -> Any:
    """Returns ``state``, once it is known to be laid out as what ``init`` returns.

    Types, structure and shapes are compared, but for the fields ``foreign``: a compiled
    step pays nothing, and batched, sharded and NumPy arrays pass. A state made for up
    to ``absent`` more leaves passes where it has only rows of telemetry for them.
    """
    wanted = jax.eval_shape(init)
    kind = type(wanted)
    if not isinstance(state, kind):
        raise TypeError(
            f"`state` must be the `{kind.__name__}` that `init` returned, got "
            f"`{type(state).__name__}`. Call `update(updates, state, params)`, restore "
            "a checkpoint into what `init` returns, and call `init` again after a "
            "change of optimizer."
        )
    blank = dict.fromkeys(foreign, ())
    mine, wanted = state._replace(**blank), wanted._replace(**blank)
    difference = _difference(mine, wanted)
    if difference and not _has_more_rows(mine, wanted, absent):
        raise ValueError(
            f"`state` is a `{kind.__name__}` that does not fit here: {difference}. "
            "A state of other parameters, of other options or of another version does "
            "not fit either. Call `init` again with the parameters; they and the "
            'optimizer\'s own state can be kept: see "Checkpoints" in the '
            "documentation."
        )
    return state
