# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
# Optax has no py.typed, and JAX's `zeros_like` takes an untyped device.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
"""A user's program that pyright checks in strict mode, so every option is typed."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import optclip
from optclip.rules import Context, Limit, Rule


def build(steps: int) -> optax.GradientTransformationExtraArgs:
    schedule = optax.cosine_decay_schedule(1.0, steps)
    clip = optclip.clip_by_global_norm(schedule, nonfinite="drop", ord=2.0)
    return optax.chain(clip, optclip.record_norms(ord="rms"), optax.adamw(1e-3))


def wrapped() -> optax.GradientTransformationExtraArgs:
    return optclip.skip_steps(optclip.stabilize(optax.adam(1e-3)), max_consecutive=5)


def twice(factor: float) -> Rule:
    def update(norm: jax.Array, state: Any, context: Context) -> tuple[Limit, Any]:
        bound = factor * jnp.maximum(state, norm / 2) + 0 * context.step
        return Limit(bound, bound), norm

    return Rule(init=jnp.zeros_like, update=update, name="twice")


def by_rule() -> optax.GradientTransformationExtraArgs:
    scope = optclip.scopes.label(lambda path: path.split("/")[0])
    action = optclip.actions.soften("tanh")
    return optclip.clip_by_rule(twice(2.0), scope=scope, action=action)


def train(params: optax.Params, grads: optax.Updates) -> dict[str, float]:
    tx = build(100)
    state = tx.init(params)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    for leaf in optclip.nonfinite_leaves(state, params):
        print(leaf.path, leaf.nan)
    rows = optclip.leaf_metrics(state, params)
    numbers = {key: float(value) for key, value in optclip.metrics(state).items()}
    return numbers | {key: float(value) for key, value in rows.items()}


def loss(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return jnp.mean((x @ params["w"]) ** 2)


def why(params: dict[str, jax.Array], batches: list[jax.Array]) -> str:
    found = optclip.diagnose(loss, params, batches, optimizer=optax.sgd(0.1))
    remedies = [
        remedy.kind for finding in found.findings for remedy in finding.remedies
    ]
    return " ".join(remedies)


# An invalid value of a string option is an error before the program runs.
optclip.clip_by_global_norm(1.0, nonfinite="skp")  # pyright: ignore[reportArgumentType]
optclip.soft_clip(1.0, kind="tan")  # pyright: ignore[reportArgumentType]
optclip.zclip(mode="z")  # pyright: ignore[reportArgumentType]
optclip.spectral_clip(1.0, method="qr")  # pyright: ignore[reportArgumentType]
