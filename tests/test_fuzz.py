"""Fuzzing of trees, dtypes, scopes, rules and policies with extreme values.

The default run tests a few configurations; `make fuzz` tests all of them, with 20,000
examples. Each configuration is compiled once, so examples are cheap.
"""

import functools
import os

import adaptive
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import registry
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("OPTCLIP_FUZZ_EXAMPLES", "60"))
QUICK, GROUPS = 12, 16
TREES = [
    {"w": ((3, 2), jnp.float32)},
    {"blocks": ((2, 2, 2), jnp.float32), "t": ((), jnp.float32)},
    {"blocks": ((2, 3), jnp.bfloat16), "b": ((3,), jnp.float32)},
    {"a": ((2,), jnp.float16), "b": ((2, 2), jnp.bfloat16), "t": ((), jnp.float32)},
    {"blocks": ((2, 2), jnp.float32), "e": ((0,), jnp.float32), "n": ((2,), jnp.int32)},
]
POLICIES = ("propagate", "zero", "drop", "skip")
SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-8, 1e4, 65504.0, 1e19, 1e25, 3.4e38, -3.4e38, 1e-30,
           1.2e-38, 1e-40, np.nan, np.inf, -np.inf]  # fmt: skip
ENTRIES = 12
WRAPPERS = {"skip_steps", "stabilize", "scale_by_stable_adam"}


def configurations():
    """Returns every (name, scope, policy, tree), in shuffled order."""
    found = []
    for number, tree in enumerate(TREES):
        for name, scope in adaptive.PAIRS:
            case = adaptive.ADAPTIVE[name]
            if name.startswith("spectral_clip") or (scope == "layer" and number == 3):
                continue
            if scope == "layer" and "blocks" not in tree:
                continue
            for policy in POLICIES if case.policies else (None,):
                found.append((name, scope, policy, number))
        for name in ("clip", "clip-leaf", "clip-element", "soft_clip"):
            found += [(name, None, policy, number) for policy in POLICIES]
    order = np.random.default_rng(0).permutation(len(found))
    return [found[i] for i in order]


def groups():
    """Returns groups of configurations: XLA can't keep all of them compiled."""
    every = configurations()
    if EXAMPLES < 1000:
        return [every[:QUICK]]
    return [every[i::GROUPS] for i in range(GROUPS)]


def build(name, scope, policy):
    options = {} if policy is None else {"nonfinite": policy}
    if scope is None:
        return registry.CASES[name].make(1.0, **options)
    return adaptive.build(name, scope, **options)


def zeros(number):
    return {k: jnp.ones(shape, dtype) for k, (shape, dtype) in TREES[number].items()}


@functools.cache
def stepper(config):
    name, scope, policy, number = config
    tx = build(name, scope, policy)
    return jax.jit(lambda g, s: tx.update(g, s, zeros(number))), tx.init(zeros(number))


def filled(number, values):
    tree, start = {}, 0
    for key, (shape, dtype) in TREES[number].items():
        size = int(np.prod(shape))
        with np.errstate(all="ignore"):
            entries = np.resize(values[start : start + size], shape)
            if dtype == jnp.int32:
                entries = np.zeros(shape)
            tree[key] = entries.astype(dtype)
        start += size
    return tree


def inexact(tree):
    return [
        np.asarray(x) for x in jax.tree.leaves(tree)
        if jnp.issubdtype(jnp.result_type(x), jnp.inexact)
    ]  # fmt: skip


def all_finite(tree):
    return all(np.isfinite(x.astype(np.float64)).all() for x in inexact(tree))


def remembered(name, state):
    if name == "skip_steps":
        return state.norm_rule_state, state.loss_rule_state, state.optimizer_state[1:]
    if name == "stabilize":
        return state.gradient_clip.rule_state, state.optimizer_state
    if name == "u_clip":
        return state.carry
    return getattr(state, "rule_state", state)


entry = st.one_of(
    st.sampled_from(SPECIAL), st.floats(width=32, allow_nan=False, allow_infinity=False)
)
step_of = st.lists(entry, min_size=ENTRIES, max_size=ENTRIES)


@pytest.fixture(autouse=True)
def nothing_compiled():
    yield
    stepper.cache_clear()
    jax.clear_caches()


@pytest.mark.parametrize("group", groups(), ids=lambda group: f"{len(group)}-cases")
@settings(
    max_examples=-(-EXAMPLES // len(groups())), deadline=None, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(st.data(), st.lists(step_of, min_size=1, max_size=4))
def test_invariants_hold_for_arbitrary_inputs(group, data, steps):
    config = data.draw(st.sampled_from(group))
    name, _, policy, number = config
    step, state = stepper(config)
    first = state
    for values in steps:
        grads = filled(number, np.array(values))
        out, state = step(grads, state)
        for key, x in grads.items():
            assert out[key].shape == x.shape, config
            # Optimizers convert integers to floats, and skip_steps returns their
            # updates.
            ours = name != "skip_steps" or x.dtype != np.int32
            assert out[key].dtype == x.dtype or not ours, config
        assert jax.tree.structure(state) == jax.tree.structure(first), config
        assert all_finite(remembered(name, state)), config
        fine = all_finite(grads)
        if fine or policy in ("zero", "drop", "skip") or name in WRAPPERS:
            assert all_finite(out) or name == "u_clip", config
        if policy == "skip" and not fine:
            assert not any(x.any() for x in inexact(out)), config
        if name == "clip" and fine:
            flat = [x.astype(np.float64).ravel() for x in inexact(out)]
            norm = np.linalg.norm(np.concatenate(flat))
            coarsest = max(float(jnp.finfo(x.dtype).eps) for x in inexact(out))
            assert norm <= 1 + 4 * coarsest, config
