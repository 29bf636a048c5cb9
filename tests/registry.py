"""Every public transformation, and the trees that the contracts are tested with."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle

import optclip
from optclip import actions, rules, scopes

STACKED = {"blocks": 1}


def top_name(path):
    return path.split("/")[0]


@dataclasses.dataclass(frozen=True)
class Case:
    """A transformation, and what the oracle needs to know about it.

    Attributes:
        make: Makes the transformation from (threshold, **options).
        public: The name in `optclip.__all__`.
        core: Whether it is tested with every dtype; others are variants of a core case.
        settings: Arguments of the oracle.
    """

    make: Callable
    public: str
    core: bool = True
    scope: str = "tree"
    argument: Any = None
    relative: bool = False
    settings: dict = dataclasses.field(default_factory=dict)
    real_only: bool = False

    def expect(self, updates, params, threshold, policy="propagate"):
        flat, _ = jax.tree_util.tree_flatten_with_path(updates)
        paths = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in flat]
        leaves = [x for _, x in flat]
        ids = oracle.groups(
            self.scope, self.argument, paths, [np.shape(x) for x in leaves]
        )
        return oracle.clip(
            leaves, ids, threshold=threshold, policy=policy,
            params=jax.tree.leaves(params) if self.relative else None,
            by_element=self.scope == "element", **self.settings,
        )  # fmt: skip


def _clip(scope, **fixed):
    return lambda t, **options: optclip.clip_by_rule(t, scope=scope, **fixed, **options)


def _of(function, *args, **fixed):
    return lambda t, **options: function(t, *args, **fixed, **options)


def _relative(scope):
    def make(t, **options):
        rule = rules.relative_to_params(t, floor=1e-3)
        return optclip.clip_by_rule(rule, scope=scope, **options)

    return make


CASES = {
    "clip": Case(_clip(scopes.tree()), "clip_by_rule"),
    "clip-leaf": Case(_clip(scopes.leaf()), "clip_by_rule", scope="leaf"),
    "clip-label": Case(
        _clip(scopes.label(top_name)), "clip_by_rule", scope="label", argument=top_name
    ),
    "clip-layer": Case(
        _clip(scopes.layer(STACKED)), "clip_by_rule", scope="layer", argument=STACKED
    ),
    "clip-unit": Case(_clip(scopes.unit()), "clip_by_rule", scope="unit"),
    "clip-element": Case(_clip(scopes.element()), "clip_by_rule", scope="element"),
    "clip_by_value": Case(
        _of(optclip.clip_by_value, record=True), "clip_by_value", scope="element"
    ),
    "clip_by_global_norm": Case(
        _of(optclip.clip_by_global_norm), "clip_by_global_norm"
    ),
    "clip_by_leaf_norm": Case(
        _of(optclip.clip_by_leaf_norm), "clip_by_leaf_norm", scope="leaf"
    ),
    "clip_per_layer": Case(
        _of(optclip.clip_per_layer, STACKED),
        "clip_per_layer",
        scope="layer",
        argument=STACKED,
    ),
    "clip_by_unit_norm": Case(
        _of(optclip.clip_by_unit_norm), "clip_by_unit_norm", scope="unit"
    ),
    "clip_by_block_rms": Case(
        _of(optclip.clip_by_block_rms),
        "clip_by_block_rms",
        scope="leaf",
        settings={"ord": "rms"},
    ),
    "adaptive_grad_clip": Case(
        _of(optclip.adaptive_grad_clip),
        "adaptive_grad_clip",
        scope="unit",
        relative=True,
        settings={"floor": 1e-3},
    ),
    "normalize_by_norm": Case(
        _of(optclip.normalize_by_norm),
        "normalize_by_norm",
        settings={"action": "normalize"},
    ),
    "soft_clip": Case(
        _of(optclip.soft_clip), "soft_clip", settings={"action": "soften-rational"}
    ),
    "record_norms": Case(
        lambda t, nonfinite="propagate", **options: optclip.record_norms(**options),
        "record_norms",
        settings={"action": "none"},
    ),
    "clip-ord1": Case(
        _clip(scopes.label(top_name), ord=1),
        "clip_by_rule",
        core=False,
        scope="label",
        argument=top_name,
        settings={"ord": 1},
    ),
    "clip-ord3": Case(
        _clip(scopes.tree(), ord=3), "clip_by_rule", False, settings={"ord": 3}
    ),
    "clip-max": Case(
        _clip(scopes.tree(), ord=np.inf),
        "clip_by_rule",
        False,
        settings={"ord": np.inf},
    ),
    "clip-rms": Case(
        _clip(scopes.tree(), ord="rms"), "clip_by_rule", False, settings={"ord": "rms"}
    ),
    "clip-zero": Case(
        _clip(scopes.leaf(), action=actions.zero),
        "clip_by_rule",
        False,
        scope="leaf",
        settings={"action": "zero"},
    ),
    "clip-relative": Case(
        _relative(scopes.tree()),
        "clip_by_rule",
        False,
        relative=True,
        settings={"floor": 1e-3},
    ),
    "torch": Case(
        _of(optclip.clip_by_global_norm, eps=1e-6),
        "clip_by_global_norm",
        False,
        settings={"eps": 1e-6},
    ),
    "soft-tanh": Case(
        _of(optclip.soft_clip, kind="tanh", scope=scopes.unit()),
        "soft_clip",
        False,
        scope="unit",
        settings={"action": "soften-tanh"},
    ),
    "soft-atan": Case(
        _of(optclip.soft_clip, kind="atan", scope=scopes.leaf()),
        "soft_clip",
        False,
        scope="leaf",
        settings={"action": "soften-atan"},
    ),
    "soft-sqrt": Case(
        _of(optclip.soft_clip, kind="sqrt"),
        "soft_clip",
        False,
        settings={"action": "soften-sqrt"},
    ),
}
CLIPS = [name for name in CASES if name != "record_norms"]
CORE = [name for name, case in CASES.items() if case.core]
# The same rule, scope and action as another case; only tested where compiling is cheap.
TWINS = {"clip-leaf", "clip-layer", "clip-unit", "clip-element"}
DISTINCT = [name for name in CORE if name not in TWINS]
# These scale a group down only if its norm is above the threshold.
HARD = [n for n in CLIPS if CASES[n].settings.get("action", "rescale") == "rescale"]

# Public functions that are not transformations.
OTHERS = {
    "clip_grad_norm", "clip_grad_value", "nonfinite_leaves", "diagnose", "leaf_metrics",
    "metrics", "clipped_grad", "report", "state_specs", "step_taken",
    "suggest_threshold", "tap",
}  # fmt: skip

DTYPES = {
    "f32": jnp.float32,
    "bf16": jnp.bfloat16,
    "f16": jnp.float16,
    "f8_e4m3fn": jnp.float8_e4m3fn,
    "f8_e5m2": jnp.float8_e5m2,
    "c64": jnp.complex64,
    "mixed": None,
}
SHAPES = {"blocks": (2, 3, 2), "head": {"bias": (3,), "kernel": (3, 2)}, "t": ()}


def dtypes_of(name):
    """Returns the dtypes of the four leaves of a tree of kind ``name``."""
    if name == "mixed":
        return [jnp.float32, jnp.bfloat16, jnp.complex64, jnp.float16]
    return [{"f64": np.float64, "c128": np.complex128}.get(name) or DTYPES[name]] * 4


def normal_tree(name, size=1.0, seed=0):
    """Returns a tree of NumPy arrays with normal entries times ``size``."""
    rng = np.random.default_rng(seed)
    shapes, treedef = jax.tree.flatten(SHAPES, is_leaf=lambda s: isinstance(s, tuple))
    leaves = []
    for shape, dtype in zip(shapes, dtypes_of(name), strict=True):
        x = rng.normal(size=shape)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            x = x + 1j * rng.normal(size=shape)
        leaves.append(np.asarray(x * size).astype(dtype))
    return jax.tree.unflatten(treedef, leaves)


def full_tree(name, value):
    """Returns the same tree with all entries equal."""
    return jax.tree.map(lambda x: np.full(x.shape, value, x.dtype), normal_tree(name))


@functools.cache
def stepper(name, policy="propagate"):
    """Returns a jitted (threshold, updates, state, params) -> (updates, state).

    The threshold is an argument, so that one compiled program serves all tests.
    """
    make = CASES[name].make

    @jax.jit
    def step(threshold, updates, state, params):
        return make(threshold, nonfinite=policy).update(updates, state, params)

    return step


def run(name, updates, threshold=1.0, params=None, policy="propagate"):
    """Runs one update of a case, from a fresh state."""
    params = full_like(updates) if params is None else params
    state = CASES[name].make(1.0, nonfinite=policy).init(params)
    threshold = jnp.asarray(threshold, jnp.result_type(float))
    return stepper(name, policy)(threshold, updates, state, params)


def full_like(updates, value=1.0):
    return jax.tree.map(lambda x: np.full(np.shape(x), value, x.dtype), updates)
