"""A hundred thousand steps of random faults: no leaks, no growth, no retracing.

Every transformation with state sees gradients of which one in five is bad: NaN, inf,
zeros, 1e30, 1e-30, or a lasting shift. After every thousand steps its state must be
finite, as must its updates for finite gradients; at the end the process must hold no
more arrays, and not much more memory, than after the first thousand.

Usage: python benchmarks/soak.py [--steps 100000] [--output benchmarks/results]
"""

import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _results import machine, parser, write

import optclip

CHUNK = 1000
PARAMS = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
CLIPS = {
    "adagc": optclip.adagc(),
    "adagn": optclip.adagn(),
    "adamw_clip": optclip.adamw_clip(),
    "autoclip": optclip.autoclip(),
    "autoclip, whole history": optclip.autoclip(window=None),
    "dual_ema_clip": optclip.dual_ema_clip(),
    "ema_sigma_clip": optclip.ema_sigma_clip(),
    "norm_growth_limiter": optclip.norm_growth_limiter(),
    "percentile_clip": optclip.percentile_clip(),
    "quantile_clip": optclip.quantile_clip(),
    "rolling_sigma_clip": optclip.rolling_sigma_clip(),
    "scale_by_stable_adam": optclip.scale_by_stable_adam(),
    "skip_steps": optclip.skip_steps(
        optax.chain(optclip.clip_by_global_norm(1.0), optax.adam(1e-3))
    ),
    "spam_clip": optclip.spam_clip(),
    "stabilize": optclip.stabilize(optax.adam(1e-3)),
    "stable_spam_clip": optclip.stable_spam_clip(),
    "u_clip": optclip.u_clip(optclip.clip_by_global_norm(1.0), max_carry=10.0),
    "zclip": optclip.zclip(max_grad_norm=None),
}
traces = 0


def gradients(key, step):
    """Returns gradients, and whether they are finite."""
    keys = jax.random.split(key, 3)
    # The scale moves by a factor of ten thousand, and back, every few hundred steps.
    level = 10.0 ** (2 * jnp.sign(jnp.sin(step / 300.0)))
    size = level * jnp.exp(0.3 * jax.random.normal(keys[0]))
    kind = jax.random.randint(keys[1], (), 0, 25)
    size = jnp.select([kind == 0, kind == 1, kind == 2], [0.0, 1e30, 1e-30], size)
    bad = jnp.select([kind == 3, kind == 4], [jnp.nan, jnp.inf], 0.0)
    grads = jax.tree.map(lambda p: size * jax.random.normal(keys[2], p.shape), PARAMS)
    return {**grads, "bias": grads["bias"] + bad}, bad == 0


def remembered(state):
    """Returns the state without its metrics: the part that must stay finite."""
    if isinstance(state, optclip.states.ClipState):
        return state.rule_state
    if isinstance(state, optclip.states.SkipState):
        return (
            remembered(state.optimizer_state), state.norm_rule_state,
            state.loss_rule_state,
        )  # fmt: skip
    if isinstance(state, optclip.states.StabilizeState):
        return remembered(state.gradient_clip), remembered(state.optimizer_state)
    if isinstance(state, optclip.states.CarryState):
        return state.carry
    if type(state) is tuple:
        return tuple(map(remembered, state))
    return state


def finite(tree):
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves] or [True]))


@jax.jit
def chunk(key, first, states):
    """Returns the states after a thousand steps, and whether everything was finite."""
    global traces
    traces += 1

    def step(states, k):
        grads, fine = gradients(jax.random.fold_in(key, k), k)
        after, sound = {}, []
        for name, tx in CLIPS.items():
            updates, after[name] = tx.update(grads, states[name], PARAMS)
            # u_clip without a policy passes NaN through, like the transformation inside
            # it.
            sound.append(finite(remembered(after[name])) & (finite(updates) | ~fine))
        return after, jnp.stack(sound)

    states, sound = jax.lax.scan(step, states, first + jnp.arange(CHUNK))
    return states, jnp.all(sound, axis=0)


def held():
    """Returns how many arrays are alive, and the peak memory so far in MB."""
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return len(jax.live_arrays()), memory


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=100_000)
    options = arguments.parse_args()
    states = {name: tx.init(PARAMS) for name, tx in CLIPS.items()}
    key, began, start = jax.random.key(0), time.perf_counter(), (0, 0.0)
    for first in range(0, options.steps, CHUNK):
        states, sound = chunk(key, jnp.int32(first), states)
        broken = [
            n for n, good in zip(CLIPS, np.asarray(sound), strict=True) if not good
        ]
        if broken:
            raise SystemExit(f"Not finite after step {first + CHUNK}: {broken}.")
        if first == CHUNK:
            start = held()
    end, seconds = held(), time.perf_counter() - began
    if traces != 1:
        raise SystemExit(f"Traced {traces} times.")
    if end[0] > start[0]:
        raise SystemExit(f"{end[0] - start[0]} more arrays are alive than before.")
    text = (
        f"{len(CLIPS)} transformations, {options.steps:,} steps each, one in five of "
        f"them bad: every state and every update of finite gradients was finite, one "
        f"trace, {end[0]} arrays alive after the second thousand steps and at the end, "
        f"the largest memory {start[1]:.0f} MB and {end[1]:.0f} MB. It took "
        f"{seconds:.0f} s."
    )
    print(text)
    source = f"Measured by `benchmarks/soak.py` on {machine()}."
    write(options.output, "soak.md", [text, "", source])


if __name__ == "__main__":
    main()
