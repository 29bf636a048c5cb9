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
# # How do I clip in mixed precision?
#
# *float16 with loss scaling, and bfloat16: where does the clip go, and what can go
# wrong?*
#
# In mixed precision, the parameters are stored in float32, and the forward and backward
# passes run in float16 or bfloat16. float16 has a small range, so the loss is
# multiplied by a large scale to keep small gradients from becoming zero, and the
# gradients are divided by it afterwards. bfloat16 has the range of float32 and needs no
# scale, but it has fewer digits. Both affect clipping.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import optclip

plt.style.use("tableau-colorblind10")
plt.rcParams |= {
    "figure.dpi": 88,
    "font.size": 12,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
}

images, labels = load_digits(return_X_y=True)
images, labels = jnp.float32(images / 16), jnp.asarray(labels)
rng = np.random.default_rng(0)
sizes = [(64, 128), (128, 128), (128, 10)]
params = [jnp.float32(rng.normal(size=s) * (2 / s[0]) ** 0.5) for s in sizes]


def loss_fn(params, batch, dtype):
    x, y = batch
    *hidden, last = [w.astype(dtype) for w in params]
    x = x.astype(dtype)
    for w in hidden:
        x = jax.nn.relu(x @ w)
    logits = (x @ last).astype(jnp.float32)  # the softmax in float32
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def batch_of(step, size=64):
    at = np.random.default_rng(step).integers(0, len(labels), size)
    return images[at], labels[at]


# %% [markdown]
# ## A norm of float16 gradients
#
# If you take the norm of float16 gradients in float16, the square of each entry must be
# below 65,504: from 256 on, it overflows. That is where a loss scale puts them. Here,
# one gradient is multiplied by different scales and clipped to a norm of 1. Optax 0.2.8
# returns zeros as soon as the sum of squares overflows; optclip computes norms in
# float32.

# %%
grads = jax.grad(loss_fn)(params, batch_of(0), jnp.float32)
scales = 2.0 ** np.arange(0, 15)
clips = {
    "optax": optax.clip_by_global_norm(1.0),
    "optclip": optclip.clip_by_global_norm(1.0),
}


def norm_after(clip, scale):
    scaled = [(scale * g).astype(jnp.float16) for g in grads]
    clipped = clip.update(scaled, clip.init(scaled))[0]
    return np.linalg.norm([np.linalg.norm(np.float32(g)) for g in clipped])


figure, axes = plt.subplots(figsize=(6.5, 3.6))
for name, clip in clips.items():
    axes.semilogx(scales, [norm_after(clip, s) for s in scales], "o-", label=name)
axes.set_xlabel("loss scale")
axes.set_ylabel("norm after clipping at 1")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Unscale, then clip
#
# The threshold is in the units of the true gradient, so divide by the scale first. A
# clip of the scaled gradient with the same threshold would shorten every step by the
# scale.
#
# `optclip.skip_steps` leaves out the steps whose gradient is not finite, and tells you
# whether it did, so a dynamic loss scale needs three lines: halve the scale after a
# skipped step, and double it after 50 steps without one.

# %%
optimizer = optclip.skip_steps(
    optax.chain(optclip.clip_by_global_norm(1.0), optax.adamw(1e-3))
)


@jax.jit
def train_step(params, state, scale, quiet, batch):
    def scaled_loss(params):
        return scale * loss_fn(params, batch, jnp.float16)

    value, grads = jax.value_and_grad(scaled_loss)(params)
    grads = jax.tree.map(lambda g: g / scale, grads)  # in float32
    updates, state = optimizer.update(grads, state, params)
    taken = optclip.step_taken(state)
    quiet = jnp.where(taken, quiet + 1, 0)
    double = quiet == 50
    quiet = jnp.where(double, 0, quiet)
    next_scale = jnp.where(taken, jnp.where(double, 2 * scale, scale), scale / 2)
    return optax.apply_updates(params, updates), state, next_scale, quiet, value / scale


trained, state = params, optimizer.init(params)
scale, quiet = jnp.float32(2.0**24), jnp.int32(0)
losses, used, skipped = [], [], []
for step in range(300):
    used.append(float(scale))
    trained, state, scale, quiet, loss = train_step(
        trained, state, scale, quiet, batch_of(step)
    )
    losses.append(float(loss))
    skipped.append(not bool(optclip.step_taken(state)))

print("skipped:", np.flatnonzero(skipped))
print("loss at the end:", round(np.mean(losses[-20:]), 3))

# %%
figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 5), sharex=True)
top.plot(losses)
top.set_ylabel("loss")
bottom.semilogy(used, base=2, drawstyle="steps-post")
at = np.flatnonzero(skipped)
bottom.plot(at, np.array(used)[at], "X", color="#D55E00", markersize=9, label="skipped")
bottom.set_ylabel("loss scale")
bottom.set_xlabel("step")
bottom.legend(frameon=False)
plt.show()

# %% [markdown]
# The first scale is too large on purpose. The steps that it spoils are skipped: neither
# the parameters nor Adam's moments see them. The scale then finds its level, and tries
# a larger one from time to time.
#
# `optclip.nonfinite_leaves` names the parameters whose gradient overflowed at the last
# skipped step:

# %%
last = max(leaf.step for leaf in optclip.nonfinite_leaves(state, params))
for leaf in optclip.nonfinite_leaves(state, params):
    if leaf.step == last:
        print(
            f"step {leaf.step}: {'NaN' if leaf.nan else 'inf'} in parameter {leaf.path}"
        )

# %% [markdown]
# ## bfloat16
#
# bfloat16 needs no loss scale, and its gradients have the same dtype as the parameters
# if you cast inside the loss, as above. If your gradients themselves are bfloat16, for
# example because they are reduced in that dtype, the clip can return float32 updates:
# `update_dtype=jnp.float32`. The multiplication by the scale of the clip is then not
# rounded to 8 bits.

# %%
low = [g.astype(jnp.bfloat16) for g in grads]
exact = [np.float64(g) for g in low]
norm = np.sqrt(sum(np.sum(g**2) for g in exact))
for dtype in (None, jnp.float32):
    clip = optclip.clip_by_global_norm(0.1, update_dtype=dtype)
    clipped, _ = clip.update(low, clip.init(low))
    gaps = [
        np.abs(np.float64(c) - g * 0.1 / norm).max()
        for c, g in zip(clipped, exact, strict=True)
    ]
    print(
        f"{clipped[0].dtype!s:9} largest error, relative to the largest entry:",
        f"{max(gaps) / (max(np.abs(g).max() for g in exact) * 0.1 / norm):.1e}",
    )

# %% [markdown]
# What must not be bfloat16 are the parameters. A parameter of 1 in bfloat16 moves by
# 1/128 or not at all:

# %%
for dtype in (jnp.bfloat16, jnp.float32):
    stored = [w.astype(dtype) for w in params]
    optimizer = optax.chain(optclip.clip_by_global_norm(1.0), optax.adamw(1e-4))
    state = optimizer.init(stored)

    @jax.jit
    def step_of(stored, state, batch, optimizer=optimizer):
        loss, grads = jax.value_and_grad(loss_fn)(stored, batch, jnp.bfloat16)
        updates, state = optimizer.update(grads, state, stored)
        return optax.apply_updates(stored, updates), state, loss

    for step in range(300):
        stored, state, loss = step_of(stored, state, batch_of(step))
    print(f"stored in {jnp.dtype(dtype).name:9} loss at the end: {float(loss):.3f}")

# %% [markdown]
# `optclip.diagnose` finds this cause: it reports how many of the updates are rounded
# away (see [the precision of the dtype is too low](../diagnosis.md)).
#
# ## In short
#
# - Cast the parameters inside the loss, and keep them and the optimizer in float32.
# - float16: divide the gradients by the loss scale, then clip. Let `skip_steps` leave
#   out the steps that overflow, and adapt the scale with `step_taken`.
# - bfloat16: no scale. With bfloat16 gradients, pass `update_dtype=jnp.float32`.
