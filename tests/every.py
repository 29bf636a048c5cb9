"""Every transformation with its defaults, and with options that use other code paths.

For contracts that all transformations must satisfy, whatever they compute.
"""

import inspect
from collections.abc import Callable

import adaptive
import jax
import jax.numpy as jnp
import numpy as np
import optax
import registry

import optclip
from optclip import actions, rules, scopes

EVERY: dict[str, Callable] = {
    **{n: (lambda c=c: c.make(1.0)) for n, c in registry.CASES.items()},
    **{n: case.make for n, case in adaptive.ADAPTIVE.items()},
    # SGD, because Optax's Adam mixes floats with its integer step count.
    "stabilize": lambda **options: optclip.stabilize(
        optax.sgd(1e-2, momentum=0.9), **options
    ),
}
# One of each pair of names that give the same program.
DISTINCT = [n for n in EVERY if n not in registry.TWINS]

SHAPES = {"blocks": (2, 3, 2), "kernel": (3, 2), "bias": (2,), "scale": ()}
# The dtypes of the leaves of a tree that has several.
DTYPES = {
    "mixed": ("float32", "bfloat16", "bfloat16", "float32"),
    "all": ("float32", "bfloat16", "float64", "float32"),
}


def numbers(dtype="float32", size=1.0, seed=0):
    """Returns a pytree of NumPy arrays with normal entries times ``size``."""
    rng = np.random.default_rng(seed)
    dtypes = DTYPES.get(dtype, (dtype,) * len(SHAPES))
    return {
        k: np.asarray(size * rng.normal(size=s)).astype(jnp.dtype(d))
        for (k, s), d in zip(SHAPES.items(), dtypes, strict=True)
    }


def on_device(*args, **options):
    return jax.device_put(numbers(*args, **options))


def _schedule(start, end):
    return lambda count: start + (end - start) * jnp.minimum(count / 10, 1.0)


def _policies(name):
    for policy in ("skip", "zero", "drop"):
        if name in registry.CLIPS:
            make = registry.CASES[name].make
            yield policy, lambda make=make, p=policy: make(1.0, nonfinite=p)
        else:
            make = adaptive.ADAPTIVE[name].make
            yield policy, lambda make=make, p=policy: make(nonfinite=p)


def _by(function, **options):
    return lambda: function(**options)


def _variants():
    """Yields (name, make) for options whose code paths the defaults do not use."""
    policed = [n for n, case in adaptive.ADAPTIVE.items() if case.policies]
    for name in ("clip", "clip-leaf", "clip-unit", "clip_by_value", *policed):
        for policy, make in _policies(name):
            yield f"{name}-{policy}", make
    for name, scope in adaptive.PAIRS:
        if scope not in ("own", "tree"):
            yield (
                f"{name}-{scope}",
                (lambda n=name, s=scope: EVERY[n](scope=adaptive.SCOPES[s])),
            )
    for name in optclip.__all__:
        function = getattr(optclip, name)
        known = inspect.signature(function).parameters if callable(function) else ()
        if "original" in known:
            yield f"{name}-original", _by(function, original=True)
        if "update_dtype" in known and name in adaptive.ADAPTIVE:
            yield f"{name}-update_dtype", _by(function, update_dtype=jnp.float32)
    for options in ({"mode": "percentile"}, {"clip_option": "mean"}):
        yield f"zclip-{next(iter(options.values()))}", _by(optclip.zclip, **options)
    yield "zclip-skips", _by(optclip.zclip, skip_update_on_spike=True)
    yield "spam_clip-resets", _by(optclip.spam_clip, reset_every=3)
    yield "adaptive_grad_clip-axis", lambda: optclip.adaptive_grad_clip(0.1, axis=-1)
    for order in (1, 3, np.inf, "rms"):
        yield f"normalize-{order}", _by(optclip.normalize_by_norm, ord=order)
        yield f"unit-{order}", _by(optclip.clip_by_unit_norm, max_norm=1.0, ord=order)
        yield f"record_norms-{order}", _by(optclip.record_norms, ord=order)
    for kind in ("rational", "tanh", "atan", "sqrt"):
        yield (
            f"element-soften-{kind}",
            (
                lambda kind=kind: optclip.clip_by_rule(
                    1.0, scope=scopes.element(), action=actions.soften(kind)
                )
            ),
        )
    for name in ("normalize", "zero"):
        yield f"element-{name}", _by(
            optclip.clip_by_rule, rule=1.0, scope=scopes.element(),
            action=getattr(actions, name),
        )  # fmt: skip
    yield "interval", lambda: optclip.clip_by_value((-0.1, 0.3))
    for name in ("clip_by_global_norm", "clip_by_leaf_norm", "clip_by_unit_norm"):
        function = getattr(optclip, name)
        yield f"{name}-schedule", _by(function, max_norm=_schedule(1.0, 0.1))
    yield (
        "clip_by_value-schedule",
        _by(optclip.clip_by_value, max_value=_schedule(1.0, 0.1)),
    )
    yield "spectral_clip-schedule", lambda: optclip.spectral_clip(_schedule(1.0, 0.1))
    for number, rule in enumerate(
        (
            rules.ema_ratio(2.0, decay=0.9, warmup_steps=1, record="raw"),
            rules.ema_ratio(2.0, decay=0.9, record_zeros=True, escape_steps=None),
            rules.previous_norm(record="raw", escape_steps=None),
            rules.window_percentile(
                50.0, window=4, by_rank=True, include_current=False
            ),
            rules.window_sigma(window=4, unbiased=True, record="clipped"),
            rules.log_histogram_percentile(50.0, forgetting=0.1),
            rules.second_moment(2.0, debias=True, pass_unseen=False),
            rules.dual_ema(record="raw", escape_steps=None, record_zeros=True),
        )
    ):
        scope = scopes.unit() if rule.name == "second_moment" else scopes.leaf()
        yield (
            f"rule-{rule.name}-{number}",
            _by(optclip.clip_by_rule, rule=rule, scope=scope),
        )
    yield (
        "u_clip-capped",
        lambda: optclip.u_clip(optclip.clip_by_rule(1.0), max_carry=3.0),
    )
    yield "skip_steps-number", lambda: optclip.skip_steps(optax.sgd(1e-3), when=2.0)
    yield (
        "skip_steps-never",
        lambda: optclip.skip_steps(
            optax.sgd(1e-3), when=lambda step: jnp.inf, max_consecutive=None
        ),
    )
    yield (
        "stable_adam-mask",
        lambda: optclip.scale_by_stable_adam(
            weight_decay=0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
        ),
    )


VARIANTS: dict[str, Callable] = dict(_variants())

# Values for arguments that have no default or whose default is None.
_NEEDED = {
    "max_norm": 1.0, "max_value": 1.0, "max_sigma": 1.0, "rule": 1.0,
    "stack_axes": registry.STACKED, "max_grad_norm": 1.0, "reset_every": 10,
}  # fmt: skip
_NO_ARRAYS = {"ord", "window", "max_consecutive", "keep_last"}


def _numbers_of(function):
    found = {}
    for key, argument in inspect.signature(function).parameters.items():
        value = argument.default
        if value in (None, inspect.Parameter.empty) and key in _NEEDED:
            value = _NEEDED[key]
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found |= {} if key in _NO_ARRAYS else {key: value}
    return found


def with_numbers(name, kind):
    """Builds a transformation with all its numbers converted by ``kind``."""
    function = getattr(optclip, name)
    given = {
        k: np.int32(v) if isinstance(v, int) else kind(v)
        for k, v in _numbers_of(function).items()
    }
    known = inspect.signature(function).parameters
    given |= {"stack_axes": registry.STACKED} if "stack_axes" in known else {}
    given |= {"optimizer": optax.sgd(1.0)} if "optimizer" in known else {}
    return function(**given)


# The functions that make a transformation from numeric arguments.
NUMERIC = sorted(
    {n.split("-")[0] for n in EVERY} & set(optclip.__all__) - {"u_clip", "record_norms"}
)
