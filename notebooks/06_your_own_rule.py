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
# # How do I write my own rule in ten lines?
#
# A *rule* computes the threshold for clipping. It is a pair of pure functions on one
# array of norms. The one below takes nine lines, and it works unchanged in tree, leaf
# and unit scope, and as the criterion of `optclip.skip_steps`. optclip's engine handles
# NaN, pytrees, state and telemetry. You only have to handle norms of zero and the shape
# of the rule's state.

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import optclip
from optclip.rules import Limit, Rule

plt.style.use("tableau-colorblind10")
plt.rcParams.update({
    "font.size": 12, "figure.dpi": 100, "axes.grid": True, "grid.alpha": 0.35,
    "axes.spines.top": False, "axes.spines.right": False,
})  # fmt: skip
BLUE, ORANGE, GRAY, BROWN = "#006BA4", "#FF800E", "#8C8C8C", "#C85200"

# %% [markdown]
# ## The rule
#
# optclip has no rule that clips at a multiple of the *median* of the last few norms. A
# median hardly moves when one of nine numbers is an outlier, so it should be a good
# estimate of the typical norm.
#
# `init` receives the norms as zeros, for their shape and dtype. It returns the rule's
# state: here, the last `window` norms of each group. `update` receives the norms, the
# state and a context (the step number and more). It returns the limit and the new
# state. A threshold of `inf` clips nothing, which is what we want while most of the
# state is still empty.


# %%
def times_median(factor, window=9):
    def init(norm):
        return jnp.zeros((*norm.shape, window), norm.dtype)

    def update(norm, last, context):
        median = jnp.median(last, axis=-1)
        threshold = jnp.where(median > 0, factor * median, jnp.inf)
        last = jnp.concatenate([last[..., 1:], norm[..., None]], axis=-1)
        return Limit(threshold, threshold), last

    return Rule(init, update, "times_median")


# %% [markdown]
# ## A synthetic run
#
# The transformation sees one parameter whose gradient has a norm that we choose: about
# 1 with some noise, a spike at step 70, a NaN at step 100 (drawn near the top, because
# it has no norm), and eight times as much from step 150 on. The last change is a
# lasting shift, as after a change of data. Two of the library's transformations see the
# same gradients: a fixed threshold, and [ZClip](https://arxiv.org/abs/2504.02507),
# which follows the mean and the standard deviation.


# %%
def norms_of_a_run(steps=280):
    norms = jnp.exp(0.2 * jax.random.normal(jax.random.key(0), (steps,)))
    norms = norms.at[70].multiply(40.0).at[100].set(jnp.nan)
    return norms.at[150:].multiply(8.0)


@functools.partial(jax.jit, static_argnames="optimizer")
def play(optimizer, norms):
    def step(state, norm):
        _, state = optimizer.update({"w": norm[None]}, state)
        return state, optclip.metrics(state)

    return jax.lax.scan(step, optimizer.init({"w": jnp.zeros(1)}), norms)


norms = norms_of_a_run()
clips = {
    "times_median(3.0)": optclip.clip_by_rule(times_median(3.0)),
    "clip_by_global_norm(3.0)": optclip.clip_by_global_norm(3.0),
    "zclip(max_grad_norm=None)": optclip.zclip(max_grad_norm=None),
}
states, records = {}, {}
for name, clip in clips.items():
    states[name], records[name] = jax.device_get(play(clip, norms))
looks = [(BLUE, "-"), (ORANGE, "--"), ("k", ":")]

figure, (top, bottom) = plt.subplots(
    2, 1, figsize=(8.5, 5.6), sharex=True, height_ratios=[3.2, 1]
)
top.semilogy(norms, ".", color=GRAY, markersize=5, label="norm of the gradients")
for (name, record), (color, line) in zip(records.items(), looks, strict=True):
    # Where there is no threshold, the metrics have the largest float32.
    level = np.where(record["clip/threshold"] < 1e38, record["clip/threshold"], np.nan)
    top.plot(level, line, color=color, linewidth=2, label=name)
top.plot(100, 60, "x", color="k", markersize=8)
top.annotate("spike", (70, norms[70]), (65, norms[70]), va="center", ha="right")
top.annotate("NaN", (100, 60), (105, 60), va="center")
top.annotate("lasting shift", (150, 60), (154, 60), va="center")
top.axvline(150, color=GRAY, linewidth=1)
top.set(ylabel="norm and thresholds", ylim=(0.4, 120))
top.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
for row, (record, (color, _)) in enumerate(zip(records.values(), looks, strict=True)):
    spans = [(step - 0.5, 1.01) for step in np.flatnonzero(record["clip/clipped"])]
    bottom.broken_barh(spans, (row - 0.35, 0.7), color=color)
bottom.set(xlabel="step", yticks=range(3), ylim=(2.6, -0.6))
bottom.set(yticklabels=[name.split("(")[0] for name in records])
bottom.set_title("clipped steps", fontsize=12, loc="left")
bottom.grid(axis="y", visible=False)
figure.tight_layout()
plt.show()

for name, state in states.items():
    totals = optclip.metrics(state)
    print(f"{name:26}", end="")
    for key in ("steps", "clipped_steps", "nonfinite_steps"):
        print(f" {key} {int(totals['clip/' + key])}", end=" ")
    print()
optclip.nonfinite_leaves(states["times_median(3.0)"], {"w": jnp.zeros(1)})

# %% [markdown]
# The state records what the transformation did, whatever its rule. All three clip the
# spike. All three count the NaN, name the leaf that held it and pass it through,
# because clipping does not fix a NaN by default (`nonfinite="skip"` replaces the update
# with zeros; see [Bad steps](../bad-steps.md)). After the shift, the median reaches the
# new level within five steps, more than half of nine. The fixed threshold clips every
# step from then on. ZClip treats the shift as a run of spikes for 50 steps, then
# restarts, and has no threshold for about 25 more.
#
# Faster is not always better. At first, a burst of ten bad steps looks just like a
# shift: the median rule clips five of them, the other two clip all ten. How long to
# wait is a trade-off, and here you choose it: `window=`.
#
# ## Other scopes, same rule
#
# A *scope* says which entries share one norm. The rule only sees norms, as a scalar, a
# vector or a matrix, and works along the last axis of its state, so nothing changes.
# Here, twelve typical gradients come first; in the thirteenth, one column of `w` (one
# unit) is 200 times too large.

# %%
SCOPES = {
    "tree": optclip.scopes.tree(),
    "leaf": optclip.scopes.leaf(),
    "unit": optclip.scopes.unit(),
}
gradients = {
    "w": jax.random.normal(jax.random.key(1), (13, 6, 8)).at[12, :, 2].multiply(200.0),
    "b": jnp.ones((13, 8)),
}


@functools.partial(jax.jit, static_argnames="clip")
def clip_all(clip, gradients):
    def step(state, grads):
        updates, state = clip.update(grads, state)
        return state, jax.tree.map(jnp.divide, updates, grads)

    start = clip.init(jax.tree.map(lambda x: x[0], gradients))
    return jax.lax.scan(step, start, gradients)


factors, memories = {}, {}
for name, scope in SCOPES.items():
    clip = optclip.clip_by_rule(times_median(3.0), scope=scope)
    state, kept = clip_all(clip, gradients)
    factors[name] = jax.tree.map(lambda x: x[-1], kept)
    memories[name] = [x.shape for x in state.rule_state]

figure, axes = plt.subplots(1, 3, figsize=(8.5, 3.7), sharey=True, layout="constrained")
for axis, (name, factor) in zip(axes, factors.items(), strict=True):
    rows = jnp.vstack([factor["w"], jnp.full((1, 8), jnp.nan), factor["b"]])
    mesh = axis.pcolormesh(
        rows, cmap="viridis", vmin=0, vmax=1, edgecolor="w", linewidth=1.5
    )
    least = float(min(factor["w"].min(), factor["b"].min()))
    axis.set(title=f"{name} scope: least {least:.2f}", xlabel="unit")
    axis.set(xticks=np.arange(8) + 0.5, xticklabels=range(8))
    axis.set(yticks=[3, 7.5], yticklabels=["w", "b"])
    axis.invert_yaxis()
    axis.grid(visible=False)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
figure.colorbar(mesh, ax=axes, label="factor of each entry")
plt.show()

for name, shapes in memories.items():
    print(f"{name}: the rule's state has the shape", *shapes)

# %% [markdown]
# In tree scope, the whole update is scaled down because of one unit. In leaf scope, `b`
# is not affected, and in unit scope only the unit itself is. The price is memory: nine
# numbers per group. (In unit scope there is one array for each leaf shape: `b` is one
# unit, `w` has eight.)
#
# ## What can go wrong, and a test
#
# - **Zeros.** In the first steps the state is empty, and a frozen layer has a norm of
#   zero for as long as it is frozen. Without the line `jnp.where(median > 0, ...)`, the
#   threshold is 0 in these cases, and a good gradient is clipped to zero.
# - **NaN.** You do not have to do anything. The rule receives 0 for a group that is not
#   finite, and what the rule returns for that group is discarded.
# - **Shapes.** The shape of each array in the state must begin with the shape of the
#   norms. A single number for all groups works in tree scope and nowhere else; the
#   engine raises an error that says so.


# %%
def without_the_line_for_zero(factor, window=9):
    rule = times_median(factor, window)

    def update(norm, last, context):
        threshold = factor * jnp.median(last, axis=-1)
        return Limit(threshold, threshold), rule.update(norm, last, context)[1]

    return rule._replace(update=update)


def one_average_for_all(factor):
    def update(norm, average, context):
        return Limit(factor * average, factor * average), 0.9 * average + 0.1 * norm

    return Rule(lambda norm: jnp.zeros(()), update, "one_average_for_all")


usual, wild = jnp.ones(10), jnp.ones(10).at[9].set(100.0)

_, careless = play(optclip.clip_by_rule(without_the_line_for_zero(3.0)), usual)
print("norm without the check for zero:", *careless["clip/norm_after"].astype(int))

state, _ = play(clips["times_median(3.0)"], usual.at[5].set(jnp.nan))
print("state of times_median after a NaN:", *state.rule_state[0].astype(int))

clip = optclip.clip_by_rule(one_average_for_all(3.0), scope=optclip.scopes.leaf())
params = {"w": jnp.zeros((6, 8)), "b": jnp.zeros(8)}
try:
    jax.eval_shape(clip.update, params, clip.init(params))
except ValueError as error:
    print(error)

# A test of the rule in three lines: nine typical norms, then one that is far too large.
_, record = play(clips["times_median(3.0)"], wild)
assert (record["clip/clipped"][:9] == 0).all()
assert jnp.isclose(record["clip/norm_after"][9], 3.0)

# %% [markdown]
# ## The same rule decides which steps to skip
#
# `optclip.skip_steps` wraps an optimizer and skips bad steps entirely, so that the
# optimizer never sees them. `when=` is the rule that decides what is bad. It accepts
# our rule too.

# %%
skipping = optclip.skip_steps(optax.sgd(1.0), when=times_median(3.0))
_, kept = jax.device_get(play(skipping, norms))
left_out = kept["skip/in_a_row"] > 0
crosses = jnp.where(jnp.isnan(norms), 60.0, norms)

figure, axis = plt.subplots(figsize=(8.5, 3.8))
level = np.where(kept["skip/threshold"] < 1e38, kept["skip/threshold"], np.nan)
axis.semilogy(level, color=BLUE, linewidth=2, label="threshold")
axis.semilogy(
    np.where(left_out, np.nan, norms), ".", color=GRAY, markersize=5, label="taken"
)
axis.semilogy(
    np.where(left_out, crosses, np.nan), "x", color=BROWN, markersize=7,
    label="skipped",
)  # fmt: skip
axis.annotate("spike", (70, norms[70]), (65, norms[70]), va="center", ha="right")
axis.annotate("NaN", (100, 60), (105, 60), va="center")
axis.annotate("lasting shift", (150, 60), (154, 60), va="center")
axis.axvline(150, color=GRAY, linewidth=1)
axis.set(xlabel="step", ylabel="norm", ylim=(0.4, 120))
axis.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
figure.tight_layout()
plt.show()
print("skipped:", *np.flatnonzero(left_out))

# %% [markdown]
# Now the NaN is skipped too. There is one difference: `skip_steps` does not update the
# rule on a step that it skips, so after the shift the median alone would never move.
# The recovery mechanism is the same for every rule with state, and relies on spikes
# being rare. If ten of the last 512 norms (`max_similar=10`) were at least half as
# large, the step is taken, and the rule records it. Here the spike at step 70 is one of
# the ten, so the shift costs nine steps.
#
# The same claims as assertions, so that this notebook is also a test:

# %%
mine, fixed, zclip = (np.flatnonzero(r["clip/clipped"]) for r in records.values())
assert mine.tolist() == [70, *range(150, 155)]
assert fixed.tolist() == [70, *range(150, 280)]
assert 70 in zclip
assert set(range(150, 200)) <= set(zclip)
assert not set(range(200, 220)) & set(zclip)
threshold = records["zclip(max_grad_norm=None)"]["clip/threshold"]
assert (threshold[200:220] > 1e38).all()
assert (threshold[230:] < 1e38).all()
for state in states.values():
    assert optclip.metrics(state)["clip/nonfinite_steps"] == 1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.rule_state))

burst = norms.at[150:].divide(8.0).at[160:170].multiply(40.0)
clipped_in_burst = {
    name: int(play(clip, burst)[1]["clip/clipped"][160:170].sum())
    for name, clip in clips.items()
}
assert list(clipped_in_burst.values()) == [5, 10, 10]

others = jnp.arange(8) != 2
tree, leaf, unit = factors.values()
assert tree["w"].max() < 0.2
assert jnp.isclose(tree["w"].max(), tree["b"].min())
assert leaf["w"].max() < 0.2
assert (leaf["b"] == 1).all()
assert unit["w"][:, 2].max() < 0.2
assert (unit["w"][:, others] == 1).all()
assert (unit["b"] == 1).all()

assert careless["clip/norm_after"].tolist() == [0] * 5 + [1] * 5
assert np.flatnonzero(left_out).tolist() == [70, 100, *range(150, 159)]

# %% [markdown]
# ## Takeaways
#
# - A rule is two functions on one array of norms: use `jnp.where` instead of `if`, a
#   state whose shape begins with the shape of the norms, and `inf` until the rule has
#   seen enough norms.
# - In return, you get every scope, support for any pytree, NaN kept out of the state,
#   `optclip.metrics` and `optclip.nonfinite_leaves`, and a criterion for
#   `optclip.skip_steps`.
# - Test a rule on a synthetic run before you train with it: a spike, a burst, a lasting
#   shift, a NaN, and zeros.
#
# For more, see [Writing a rule](../writing-a-rule.md), and [Concepts](../concepts.md)
# for the terms used here.
