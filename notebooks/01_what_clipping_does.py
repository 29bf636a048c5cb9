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
# # What does clipping do?
#
# *What happens to a gradient when it is clipped, and why does that help training?*
#
# Clipping by norm shortens a large gradient and keeps its direction. A loss surface can
# have cliffs, where the gradient is so large that a single step throws the parameters
# out of the region where training works. With clipping, that step is small, and the run
# continues along the foot of the cliff.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

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
BLUE, ORANGE, GRAY = "#006BA4", "#FF800E", "#8C8C8C"

# %% [markdown]
# ## One gradient
#
# The *norm* of a gradient is its length. `clip_by_global_norm(1.0)` scales every
# gradient whose norm exceeds 1, the *threshold*, down to norm 1. `clip_by_value(1.0)`
# bounds each entry separately. Here are six gradients with two entries each, clipped in
# both ways.

# %%
GRADIENTS = jnp.array(
    [[2.6, 0.5], [1.5, 2.0], [-0.45, 2.5], [-2.3, 1.3], [-0.5, -0.4], [0.7, -2.2]]
)


def clipped(clip, gradients):
    return jax.jit(jax.vmap(lambda g: clip.update(g, clip.init(g))[0]))(gradients)


def turned(before, after):
    """Returns the angle in degrees between each vector before and after."""
    lengths = jnp.linalg.norm(before, axis=1) * jnp.linalg.norm(after, axis=1)
    cosine = jnp.sum(before * after, axis=1) / lengths
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))


def arrows(axes, ends, **style):
    zeros = np.zeros(len(ends))
    across, up = np.asarray(ends).T
    to_scale = {"angles": "xy", "scale_units": "xy", "scale": 1}
    axes.quiver(zeros, zeros, across, up, **to_scale, **style)


by_norm = clipped(optclip.clip_by_global_norm(1.0), GRADIENTS)
by_value = clipped(optclip.clip_by_value(1.0), GRADIENTS)

figure, (left, right) = plt.subplots(
    1, 2, figsize=(7.2, 3.8), sharey=True, layout="constrained"
)
left.add_patch(plt.Circle((0, 0), 1, color=BLUE, alpha=0.15))
right.add_patch(plt.Rectangle((-1, -1), 2, 2, color=ORANGE, alpha=0.2))
for axes, after, color, title in (
    (left, by_norm, BLUE, "by norm: same direction"),
    (right, by_value, ORANGE, "by value: direction changed"),
):
    arrows(axes, GRADIENTS, color=GRAY, width=0.005, zorder=2, label="before")
    arrows(axes, after, color=color, width=0.011, zorder=3, label="after")
    axes.set(title=title, xlabel="first entry", xlim=(-3, 3), ylim=(-2.6, 2.9))
    axes.set_aspect("equal")
    axes.legend(loc="lower left")
left.set_ylabel("second entry")
plt.show()

lines = []
for name, after in (("norm", by_norm), ("value", by_value)):
    degrees = ", ".join(f"{x:.0f}" for x in turned(GRADIENTS, after))
    longest = np.linalg.norm(after, axis=1).max()
    lines.append(f"by {name:6} max norm {longest:.2f}; rotated by {degrees} degrees")
print("\n".join(lines))

# %% [markdown]
# Both leave the small gradient, which is inside the circle and the square, unchanged.
# Clipping by norm does not change the direction of any gradient. Clipping by value
# rotates five of the six, by up to 17 degrees, and one keeps a norm of 1.41: it ends at
# the corner of the square.
#
# ## A loss with a cliff
#
# [Pascanu, Mikolov and Bengio](https://arxiv.org/abs/1211.5063) plotted the loss of a
# recurrent network with one unit, `h = w * sigmoid(h) + b`, applied 50 times. The
# target is 0.7 for the sigmoid of the last state. There are only two parameters, `w`
# and `b`, so the loss surface can be drawn. Two runs of gradient descent start at the
# same point. They differ only in the clipping.

# %%
LEARNING_RATE, MAX_NORM, STEPS = 0.5, 0.3, 400


def loss_fn(params):
    def cell(h, _):
        return params["w"] * jax.nn.sigmoid(h) + params["b"], None

    last, _ = jax.lax.scan(cell, 0.5, length=50)
    return (jax.nn.sigmoid(last) - 0.7) ** 2


def train(optimizer, w, b, steps=STEPS):
    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = optimizer.update(grads, state, params)
        record = {"loss": loss, **params, **optclip.metrics(state)}
        return (optax.apply_updates(params, updates), state), record

    params = {"w": jnp.float32(w), "b": jnp.float32(b)}
    return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[1]


sgd = optax.sgd(LEARNING_RATE)
clipped_sgd = optax.chain(optclip.clip_by_global_norm(MAX_NORM), sgd)
plain, kept = jax.device_get(
    jax.jit(lambda: (train(sgd, 5.6, -2.4), train(clipped_sgd, 5.6, -2.4)))()
)

# %%
losses = jax.jit(jnp.vectorize(lambda w, b: loss_fn({"w": w, "b": b})))

# For the side view, the grid follows the wall: the steepest b for each w.
column = np.linspace(3.8, 6.1, 90)[:, None]
row = np.linspace(-3.4, -1.5, 1500)
wall = row[np.argmin(np.diff(losses(column, row), axis=1), axis=1)]
offset = np.linspace(-1, 1, 28)
near = wall[:, None] + 0.7 * np.sign(offset) * np.abs(offset) ** 1.5

paths = [np.stack([run[k] for k in ("w", "b", "loss")]) for run in (plain, kept)]
steps = np.diff(paths[0][:2])
thrown = np.argmax(np.hypot(*steps))
leaves = np.stack([paths[0][:, thrown]] * 2, axis=1)
leaves[:2, 1] += 1.3 * steps[:, thrown] / np.hypot(*steps[:, thrown])

figure = plt.figure(figsize=(8.4, 4.1))
space = figure.add_axes((-0.05, -0.03, 0.58, 1.1), projection="3d", computed_zorder=0)
style = {"linewidth": 0, "antialiased": False, "rcount": 90, "ccount": 90}
heights = losses(column, near)
space.plot_surface(column + 0 * near, near, heights, cmap="viridis", vmax=0.5, **style)
space.plot(*paths[0][:, : thrown + 1], color=ORANGE, lw=4)
space.plot(*paths[1][:, :110], color="white", lw=1.3)
space.plot(*leaves, "--", color=ORANGE, lw=2.5)
space.view_init(elev=38, azim=38)
space.set_box_aspect(None, zoom=1.08)
space.set(
    xlabel="w", ylabel="b", zlabel="loss", yticks=(-4, -3, -2), zticks=(0, 0.2, 0.4)
)

above = figure.add_axes((0.62, 0.13, 0.37, 0.84))
w, b = np.linspace(3.6, 6.2, 261), np.linspace(-3.2, -1.6, 241)
above.contourf(w, b, losses(*np.meshgrid(w, b)), np.arange(0, 0.54, 0.04))
above.plot(*paths[0][:2], "o--", color=ORANGE, ms=5, lw=2.2)
above.plot(*paths[1][:2], "o-", color="white", ms=2.5, lw=1.1)
above.text(5.68, -1.76, "without a clip:\nthrown away", color=ORANGE, ha="right")
above.text(4.55, -2.06, "with a clip", color="white")
above.text(5.66, -2.42, "start", color="white")
above.text(3.7, -3.1, "high loss", color="black")
above.set(xlim=(w[0], w[-1]), ylim=(b[0], b[-1]), xlabel="w", ylabel="b")
above.grid(False)
plt.show()

# %% [markdown]
# The left plot shows the loss surface from the side, the right plot shows it from
# above; dark is low. Both runs descend into the valley at the foot of the wall, cross
# it, and step onto the wall. There the norm of the gradient is more than a hundred
# times the threshold. Without clipping (orange), the step is proportionally large: the
# run lands more than ten units away, in a region so flat that it never moves again.
# With clipping (white), the step has length 0.15. The run is pushed back a little,
# returns, and so follows the wall down to a loss below 0.002.
#
# ## What the transformation recorded
#
# optclip's transformations keep statistics in their state. `optclip.metrics` reads
# them, also inside `lax.scan`, so the run above has them for every step.

# %%
shown = slice(0, 120)
figure, axes = plt.subplots(figsize=(7.2, 3.1), layout="constrained")
axes.semilogy(
    kept["clip/norm_before"][shown], color=GRAY, lw=1.5, label="before the clip"
)
axes.semilogy(
    kept["clip/norm_after"][shown], color=BLUE, lw=2.2, label="after the clip"
)
axes.semilogy(kept["clip/threshold"][shown], "k--", lw=1.2, label="threshold")
axes.set(xlabel="step", ylabel="norm of the gradient")
axes.legend(loc="upper right")
plt.show()

# %% [markdown]
# The first large gradient is the one that throws the unclipped run away. Every norm
# above the dashed line was reduced to it, and every norm below it is unchanged:
# clipping has no effect on most steps.
#
# ## Was it luck?
#
# The same experiment, from 900 starting points around the wall. A run *converges* if
# its last 50 losses are all below 0.01. A third variant uses no clipping, a tenth of
# the learning rate, and ten times as many steps.

# %%
side = 30
W, B = np.meshgrid(np.linspace(4.5, 6.2, side), np.linspace(-3.1, -2.0, side))


def arrived(optimizer, steps=STEPS):
    """Returns, for each starting point, whether the last 50 losses are below 0.01."""

    def worst(w, b):
        return train(optimizer, w, b, steps)["loss"][-50:].max()

    return np.asarray(jax.jit(jnp.vectorize(worst))(W, B) < 0.01)


slow_sgd = optax.sgd(LEARNING_RATE / 10)
outcomes = {
    "no clip": arrived(sgd),
    "no clip, learning rate / 10": arrived(slow_sgd, 10 * STEPS),
    "with a clip": arrived(clipped_sgd),
}

figure, every = plt.subplots(
    1, 3, figsize=(8.4, 3.6), sharey=True, layout="constrained"
)
for axes, (name, good) in zip(every, outcomes.items(), strict=True):
    colors = ListedColormap([ORANGE, BLUE])
    axes.pcolormesh(W, B, good, cmap=colors, vmin=0, vmax=1)
    axes.set_title(f"{name}\n{good.mean():.0%} converge", fontsize=12)
    axes.set_xlabel("w at the start")
    axes.grid(False)
every[0].set_ylabel("b at the start")
handles = [Patch(color=BLUE, label="converges"), Patch(color=ORANGE, label="does not")]
figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
plt.show()

# %% [markdown]
# Without clipping, about four runs in ten converge, and the plot shows no pattern: the
# outcome depends on exactly where a step meets the wall. The lower learning rate does
# not help: about one run in four converges. The wall is so steep that a tenth of the
# step is still far too large. With clipping, all of them converge.
#
# The same claims as assertions, so that this notebook is also a test:

# %%
assert turned(GRADIENTS, by_norm).max() < 0.1
assert (turned(GRADIENTS, by_value) > 5).sum() == 5
assert 16 < turned(GRADIENTS, by_value).max() < 18
assert np.isclose(np.linalg.norm(by_value, axis=1).max(), 2**0.5)
assert (by_norm[4] == GRADIENTS[4]).all()
assert (by_value[4] == GRADIENTS[4]).all()

before, after = kept["clip/norm_before"], kept["clip/norm_after"]
assert before[thrown] > 100 * MAX_NORM
assert np.hypot(*steps[:, thrown]) > 10
assert abs(plain["w"][-300:] - plain["w"][-1]).max() < 0.01
assert plain["loss"][-1] > 0.05
assert kept["loss"][-50:].max() < 0.002
assert np.hypot(*np.diff(paths[1][:2])).max() < LEARNING_RATE * MAX_NORM * 1.01
assert np.allclose(after, np.minimum(before, MAX_NORM), rtol=1e-4)
assert (before > MAX_NORM).mean() < 0.5

share = {name: good.mean() for name, good in outcomes.items()}
assert 0.3 < share["no clip"] < 0.52
assert 0.15 < share["no clip, learning rate / 10"] < 0.36
assert share["with a clip"] > 0.98

# %% [markdown]
# ## Takeaways
#
# - Clipping by norm shortens a large gradient and keeps its direction. Clipping by
#   value changes the direction. Clip by norm unless a paper asks for the other.
# - Clipping does not change gradients below the threshold.
# - Clipping is for steps where the gradient cannot be trusted: at a wall, the gradient
#   tells which way is down, but not how far. A lower learning rate is not a substitute.
# - `optclip.metrics` tells what the clipping did. Plot it.
#
# [Which clip?](../choosing.md) helps you choose, [Methods](../methods.md) lists every
# method, and [Concepts](../concepts.md) defines the terms.
