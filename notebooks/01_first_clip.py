# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What does a clip do to a training run?
#
# It bounds the step that one bad batch can cause, and it keeps a record of having done
# so. Here a small regression has one corrupted batch in fifty. The same run is made
# without a clip and with one; then the figures that the clip kept are plotted.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import optclip

# %% [markdown]
# ## The task
#
# A linear map from 16 inputs is to be learned. In every fiftieth batch the targets are
# a thousand times too large, as if a data file had the wrong unit. The loss is measured
# on clean data.

# %%
TRUE_WEIGHTS = jax.random.normal(jax.random.key(0), (16,))
STEPS = 500


def batch(step):
    inputs = jax.random.normal(jax.random.fold_in(jax.random.key(1), step), (32, 16))
    corrupted = step % 50 == 49
    targets = inputs @ TRUE_WEIGHTS * jnp.where(corrupted, 1000.0, 1.0)
    return inputs, targets


def loss_fn(params, inputs, targets):
    return jnp.mean((inputs @ params["w"] + params["b"] - targets) ** 2)


# %% [markdown]
# ## The jitted loop
#
# Nothing here knows of clipping. `optclip.metrics` reads the optimizer's state inside
# of `jit` and gives a dict of scalars, which `lax.scan` stacks over the steps; without
# a clip in the chain the dict is empty.


# %%
def train(optimizer):
    clean = batch(0)

    def step(carry, number):
        params, state = carry
        grads = jax.grad(loss_fn)(params, *batch(number))
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        record = {"loss": loss_fn(params, *clean), **optclip.metrics(state)}
        return (params, state), record

    params = {"w": jnp.zeros(16), "b": jnp.zeros(())}
    start = (params, optimizer.init(params))
    (_, state), records = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(STEPS)))(
        start
    )
    return state, jax.tree.map(np.asarray, records)


# %% [markdown]
# ## Two runs
#
# The only difference is the first link of the chain.

# %%
_, without = train(optax.sgd(0.03))
state, clipped = train(optax.chain(optclip.clip_by_global_norm(5.0), optax.sgd(0.03)))

sorted(clipped)

# %%
figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 5.5), sharex=True)

top.semilogy(without["loss"], color="tab:orange", label="without a clip")
top.semilogy(clipped["loss"], color="tab:blue", label="clip_by_global_norm(5.0)")
top.set(ylabel="loss on clean data")
top.legend(loc="center right")

bottom.semilogy(clipped["clip/norm_before"], color="0.6", label="before the clip")
bottom.semilogy(clipped["clip/norm_after"], color="tab:blue", label="after the clip")
bottom.semilogy(clipped["clip/threshold"], "k--", linewidth=1, label="threshold")
bottom.set(xlabel="step", ylabel="norm of the gradients")
bottom.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)

figure.align_ylabels()
figure.tight_layout()
plt.show()

# %% [markdown]
# Above: the first corrupted batch throws the run without a clip back by six orders of
# magnitude. It never gets back below a loss of 100, because the next one comes before
# it has recovered. The clipped run is set back too, but stays below 0.1.
#
# Below: the norm is above 10 at first and falls quickly, so the threshold of 5 acts on
# the first steps, and from then on only on the corrupted batches. That is what to look
# for in this picture of your own run: a threshold above the usual norms and far below
# the spikes. One caveat: a corrupted batch still moves the weights, by up to
# 0.03 * 5 = 0.15. A clip bounds the damage; it does not find the bad data.

# %% [markdown]
# ## How often did it clip?

# %%
totals = jax.device_get(optclip.metrics(state))
for name in ("clip/steps", "clip/clipped_steps", "clip/nonfinite_steps"):
    print(f"{name:22}{int(totals[name])}")

# %% [markdown]
# The same as assertions, so that this notebook is a test as well:

# %%
corrupted = np.arange(STEPS) % 50 == 49

assert (clipped["clip/norm_before"][corrupted] > 100).all()
assert (clipped["clip/norm_after"] <= 5.0 * (1 + 1e-6)).all()
assert (clipped["clip/clipped"][corrupted] == 1).all()
assert (clipped["clip/clipped"][100:][~corrupted[100:]] == 0).all()
assert clipped["loss"][50:].max() < 0.5
assert clipped["loss"][100:].max() < 0.1
assert without["loss"][50:].min() > 100
