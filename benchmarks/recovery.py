"""How long each adaptive method needs to recover, and how much state it keeps: a table.

Every method sees the same log-normal norms, at tree scope (per-entry methods: two
entries). Its threshold is compared with that of the same method on norms without the
event:

- spike: one norm a thousand times as large, at step 500;
- up, down: from step 500 on all norms are a hundred times as large, or as small; the
  reference never saw the first 500 norms.

Usage: python benchmarks/recovery.py [--output benchmarks/results]
"""

import jax
import jax.numpy as jnp
import numpy as np
from _results import machine, parser, write

import optclip

BEFORE, AFTER = 500, 8000
CLIPS = {
    "quantile_clip": optclip.quantile_clip,
    "zclip": lambda **o: optclip.zclip(max_grad_norm=None, **o),
    "autoclip": optclip.autoclip,
    "autoclip, whole history": lambda: optclip.autoclip(window=None),
    "adagc": optclip.adagc,
    "percentile_clip": optclip.percentile_clip,
    "rolling_sigma_clip": optclip.rolling_sigma_clip,
    "ema_sigma_clip": optclip.ema_sigma_clip,
    "dual_ema_clip": optclip.dual_ema_clip,
    "norm_growth_limiter": optclip.norm_growth_limiter,
    "adagn": optclip.adagn,
    "spam_clip": optclip.spam_clip,
    "adamw_clip": optclip.adamw_clip,
    "stable_spam_clip": optclip.stable_spam_clip,
}
# Methods with a safeguard that the original lacks, which therefore recover differently.
SAFER = ("zclip", "adagc", "ema_sigma_clip", "dual_ema_clip", "norm_growth_limiter",
         "adagn")  # fmt: skip


def lengths(tx, norms):
    """Returns, by step, what remains of a probe ten times as large as typical norms."""
    grads = jnp.asarray(norms, jnp.float32)[:, None] * jnp.array([0.6, 0.8])

    def step(state, grad):
        _, after = tx.update(grad, state)
        # The effective threshold: what remains of a large gradient.
        probe, _ = tx.update(10 * grad, state)
        return after, jnp.linalg.norm(probe)

    return np.asarray(jax.jit(lambda s: jax.lax.scan(step, s, grads)[1])(
        tx.init(jnp.zeros(2))))  # fmt: skip


def steps_until(got, wanted, factor):
    """Returns after how many steps the two stay within ``factor`` for fifty steps."""
    near = np.abs(np.log(np.maximum(got, 1e-30) / np.maximum(wanted, 1e-30)))
    inside = near <= np.log(factor)
    for t in range(len(inside) - 50):
        if inside[t : t + 50].mean() >= 0.9:
            return str(t)
    return f"over {len(inside)}"


def rows():
    rng = np.random.default_rng(0)
    noise = np.exp(0.3 * rng.normal(size=BEFORE + AFTER))
    spike = noise.copy()
    spike[BEFORE] *= 1000
    shifts = {s: np.r_[noise[:BEFORE], s * noise[BEFORE:]] for s in (100.0, 0.01)}
    builds = dict(CLIPS)
    for name in SAFER:
        builds[f"{name}, original"] = lambda f=CLIPS[name]: f(original=True)
    for name, build in builds.items():
        tx = build()
        state = tx.init(jnp.zeros(2)).rule_state
        size = sum(x.size for x in jax.tree.leaves(state))
        calm = lengths(tx, noise)
        after = BEFORE + 1
        cells = [steps_until(lengths(tx, spike)[after:], calm[after:], 1.1)]
        for norms in shifts.values():
            fresh = lengths(tx, norms[BEFORE:])
            cells.append(steps_until(lengths(tx, norms)[BEFORE:], fresh, 2.0))
        print(name, size, *cells, flush=True)
        clip, _, how = name.partition(",")
        label = f"`{clip}`" + (f",{how}" if how else "")
        yield " | ".join([f"| {label}", str(size), *cells]) + " |"


def main():
    options = parser(__doc__).parse_args()
    lines = [
        "| clip | size of the state | steps after a spike x1000 "
        "| after a shift x100 | after a shift x0.01 |",
        "| --- | --- | --- | --- | --- |",
        *rows(),
        "",
        f"Measured by `benchmarks/recovery.py` on {machine()}.",
    ]
    write(options.output, "recovery.md", lines)


if __name__ == "__main__":
    main()
