"""A run that saves checkpoints with Orbax and resumes from them; a test kills it.

Every stateful transformation trains a copy of one small model, all in one program.

    python tests/resumed_run.py FOLDER STEPS RESULT [PAUSE]
"""

import pathlib
import sys
import time

import adaptive
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import optclip

PARAMS = adaptive.params()
OPTIMIZERS = {
    name: optax.chain(adaptive.build(name), optax.scale(-0.01))
    for name in adaptive.ADAPTIVE
    # The SVD takes longest to compile and has no additional state.
    if name != "spectral_clip"
}
OPTIMIZERS["record_norms"] = optax.chain(optclip.record_norms(), optax.sgd(0.01))
OPTIMIZERS["leaf"] = optax.chain(optclip.clip_by_leaf_norm(1.0), optax.sgd(0.01))


def gradients(params, step):
    """Gradients of a quadratic, with noise, a NaN now and then, and spikes."""
    key = jax.random.fold_in(jax.random.key(0), step)
    noise = jax.random.normal(key, (16,))
    grads = jax.tree.map(lambda p: p + noise[: p.size].reshape(p.shape), params)
    grads = jax.tree.map(lambda g: jnp.where(step % 11 == 7, 1e4 * g, g), grads)
    bias = jnp.where(step % 13 == 5, jnp.nan, grads["bias"])
    return {**grads, "bias": bias}


@jax.jit
def advance(step, everything):
    """Takes one step with every copy; non-finite updates are not applied."""
    out = {}
    for name, (params, state) in everything.items():
        updates, state = OPTIMIZERS[name].update(gradients(params, step), state, params)
        updates = jax.tree.map(lambda u: jnp.where(jnp.isfinite(u), u, 0), updates)
        out[name] = (optax.apply_updates(params, updates), state)
    return out


def main(folder, steps, result, pause=0.0):
    """Trains up to ``steps``, from the last checkpoint in ``folder``, if any."""
    everything = {n: (PARAMS, tx.init(PARAMS)) for n, tx in OPTIMIZERS.items()}
    manager = ocp.CheckpointManager(
        pathlib.Path(folder).resolve(),
        options=ocp.CheckpointManagerOptions(max_to_keep=2),
    )
    first = manager.latest_step() or 0
    if first:
        everything = manager.restore(first, args=ocp.args.StandardRestore(everything))
    print(f"from {first}", flush=True)
    for step in range(first, int(steps)):
        everything = advance(step, everything)
        if (step + 1) % 4 == 0:
            manager.save(step + 1, args=ocp.args.StandardSave(everything))
        print(f"done {step}", flush=True)
        time.sleep(float(pause))
    manager.wait_until_finished()
    manager.close()
    leaves = jax.tree.leaves(jax.device_get(everything))
    np.savez(result, *[np.asarray(x) for x in leaves])


if __name__ == "__main__":
    main(*sys.argv[1:])
