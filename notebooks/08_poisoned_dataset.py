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
# # What if the data is poisoned?
#
# One batch with a NaN ends a run for good, and a clip does not mend a NaN unless it is
# told to. `nonfinite="skip"` does, and so does `optclip.skip_steps`, which also leaves
# out spikes and tells which steps those were. Where every batch has a few bad examples,
# only `optclip.clipped_grad` keeps the good ones. Wrong labels among right ones
# slip past all of them.

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import optclip

plt.style.use("tableau-colorblind10")
plt.rcParams.update({
    "font.size": 12, "figure.dpi": 100, "axes.grid": True, "grid.alpha": 0.35,
    "axes.spines.top": False, "axes.spines.right": False,
})  # fmt: skip
BLUE, ORANGE, GREY, BROWN = "#006BA4", "#FF800E", "#8C8C8C", "#C85200"

# %% [markdown]
# ## The data, and the poison
#
# A small network learns scikit-learn's handwritten digits, 64 to a batch. The poison
# comes in four kinds: the first eight pixels of a picture become NaN, or infinite, or
# 1e20, or its label is drawn by lot. It comes in two ways. In the first experiment one
# batch in twenty is poisoned as a whole. In the second, in every batch, one example in
# twenty is. The accuracy is that on 450 other digits, which are clean.

# %%
STEPS, BATCH, TRAIN = 600, 64, 1347
GOOD, NAN, INF, HUGE, LABELS = range(5)
KINDS = ["good", "NaN", "inf", "1e20", "labels by lot"]

images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(labels))
images = jnp.asarray(images[order] / 16, jnp.float32)
labels = jnp.asarray(labels[order])
test_images, test_labels = images[TRAIN:], labels[TRAIN:]

rng = np.random.default_rng(0)
rows = jnp.asarray(rng.integers(0, TRAIN, (STEPS, BATCH)))
lots = jnp.asarray(rng.integers(0, 10, (STEPS, BATCH)))
bad_batches = np.where(rng.random(STEPS) < 0.05, rng.integers(1, 5, STEPS), GOOD)
bad_examples = rng.random((STEPS, BATCH)) < 0.05
bad_examples = np.where(bad_examples, rng.integers(1, 5, (STEPS, BATCH)), GOOD)


def load(row, lot, kind):
    value = jnp.array([0.0, jnp.nan, jnp.inf, 1e20, 0.0])[kind][:, None]
    spoiled = (value != 0) & (jnp.arange(64) < 8)  # the first row of the picture
    x = jnp.where(spoiled, value, images[row])
    return x, jnp.where(kind == LABELS, lot, labels[row])


# %% [markdown]
# ## The loop
#
# All optimizers see the same batches. The loss is handed on as `value=`, for
# `optclip.skip_steps` looks at it too. The gradient is either that of the mean loss, or
# comes from `optclip.clipped_grad`, which clips the gradient of each example before
# it takes the mean, and leaves out examples whose gradient is not finite.


# %%
def init_params():
    first, second = jax.random.split(jax.random.key(0))
    return {
        "hidden": {
            "kernel": jax.random.normal(first, (64, 128)) * (2 / 64) ** 0.5,
            "bias": jnp.zeros(128),
        },
        "out": {
            "kernel": jax.random.normal(second, (128, 10)) * (2 / 128) ** 0.5,
            "bias": jnp.zeros(10),
        },
    }


def logits(params, x):
    hidden = jax.nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return hidden @ params["out"]["kernel"] + params["out"]["bias"]


def example_loss(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y)


def mean_gradients(params, x, y):
    loss, grads = jax.value_and_grad(lambda p: example_loss(p, x, y).mean())(params)
    return grads, {"loss": loss}


def clipped_examples(params, x, y):
    grads, stats = optclip.clipped_grad(example_loss, 1.0)(params, x, y)
    return grads, stats._asdict()


@functools.partial(jax.jit, static_argnums=(0, 1))
def train(optimizer, gradients, kinds):
    optimizer = optax.with_extra_args_support(optimizer)

    def step(carry, batch):
        params, state = carry
        grads, record = gradients(params, *load(*batch))
        updates, state = optimizer.update(grads, state, params, value=record["loss"])
        params = optax.apply_updates(params, updates)
        right = jnp.argmax(logits(params, test_images), axis=1) == test_labels
        record |= optclip.metrics(state)
        return (params, state), record | {"accuracy": 100 * right.mean()}

    params = init_params()
    start = params, optimizer.init(params)
    return jax.lax.scan(step, start, (rows, lots, kinds))


def clipped_adam(clip):
    return optax.chain(clip, optax.adam(3e-3))


ours = optclip.clip_by_global_norm(1.0, nonfinite="skip")
OPTIMIZERS = {
    "Adam alone": optax.adam(3e-3),
    "optax.clip_by_global_norm": clipped_adam(optax.clip_by_global_norm(1.0)),
    'optclip.clip_by_global_norm, nonfinite="skip"': clipped_adam(ours),
    "optclip.skip_steps around a clip": optclip.skip_steps(
        clipped_adam(optclip.clip_by_global_norm(1.0))
    ),
}
ALONE, OPTAX, CLIP, SKIP = OPTIMIZERS

# %% [markdown]
# ## One batch in twenty is poisoned

# %%
whole_batches = np.repeat(bad_batches[:, None], BATCH, axis=1)
first = {
    name: jax.device_get(train(optimizer, mean_gradients, jnp.asarray(whole_batches)))
    for name, optimizer in OPTIMIZERS.items()
}
LOOKS = {
    ALONE: {"color": "0.6", "linewidth": 4},
    OPTAX: {"color": ORANGE, "linestyle": "--", "linewidth": 2},
    CLIP: {"color": "#5F9ED1", "linewidth": 4},
    SKIP: {"color": "k", "linestyle": ":", "linewidth": 2},
}

figure, (top, bottom) = plt.subplots(
    2, 1, figsize=(8.5, 5.4), sharex=True, height_ratios=[2.4, 1]
)
for name, (_, record) in first.items():
    top.plot(record["accuracy"], label=name, **LOOKS[name])
top.set(ylabel="accuracy in %", ylim=(0, 100))
top.legend(loc="center right", bbox_to_anchor=(1.0, 0.52), fontsize=11)
bottom.eventplot(
    [np.flatnonzero(bad_batches == kind) for kind in range(1, 5)],
    lineoffsets=range(4), linelengths=0.7, linewidths=2.5, colors=BROWN,
)  # fmt: skip
bottom.set(xlabel="step", yticks=range(4), yticklabels=KINDS[1:], ylim=(3.6, -0.6))
bottom.set_title("poisoned batches", fontsize=12, loc="left")
bottom.grid(axis="y", visible=False)
figure.tight_layout()
plt.show()

for name, (_, record) in first.items():
    print(f"{name:46}{record['accuracy'][-1]:5.1f}%")

# %% [markdown]
# Adam alone and Adam behind Optax's clip are lost at step 46, with the first batch that
# is not finite: a NaN times any scale is a NaN. (optclip's clip does the same by
# default, `nonfinite="propagate"`.) From there on the network says the same digit for
# all pictures, which is right for 10.9% of them. With `nonfinite="skip"`, and with
# `skip_steps`, the poison does not show in the curve. Between these two there is no
# difference that one could see here.
#
# ## Which steps were left out, and why?
#
# `skip_steps` leaves out what is not finite, and spikes: a norm whose logarithm is more
# than five standard deviations above the mean of the last 128, or a loss more than six
# above its own, as long as such values are rare. `optclip.metrics` gives both and their
# thresholds, at each step.

# %%
(_, state), kept = first[SKIP]
left_out = kept["skip/in_a_row"] > 0
steps = np.arange(STEPS)
MARKS = {NAN: ("^", BROWN), INF: ("v", BROWN), HUGE: ("s", ORANGE), LABELS: ("D", BLUE)}

figure, (strip, top, bottom) = plt.subplots(
    3, 1, figsize=(8.5, 6), sharex=True, height_ratios=[0.55, 1.4, 1.4],
    layout="constrained",
)  # fmt: skip
for kind, (mark, color) in MARKS.items():
    for out, fill in ((True, color), (False, "w")):
        here = (bad_batches == kind) & (left_out == out)
        look = {"markerfacecolor": fill, "color": color, "markersize": 7, "zorder": 3}
        if kind == LABELS:
            top.plot(steps[here], kept["skip/norm"][here], mark, **look)
            bottom.plot(steps[here], kept["skip/loss"][here], mark, **look)
        else:
            strip.plot(steps[here], np.full(here.sum(), kind), mark, **look)
strip.set(yticks=[NAN, INF, HUGE], yticklabels=KINDS[1:4], ylim=(3.7, 0.3))
strip.grid(axis="y", visible=False)
strip.set_title("poisoned batches: filled is left out, hollow is taken", fontsize=12)
good = bad_batches == GOOD
for axis, what, bound in (
    (top, "norm", "threshold"),
    (bottom, "loss", "loss_threshold"),
):
    bound = kept[f"skip/{bound}"]
    axis.semilogy(
        steps[good], kept[f"skip/{what}"][good], ".", color=GREY, markersize=4
    )
    axis.plot(steps, np.where(bound < 1e3, bound, np.nan), color="k", linewidth=1.5)
    axis.axvspan(0, 64, color="0.92", zorder=0)
    axis.set(ylabel=what)
top.set(ylim=(0.02, 30))
top.text(32, 11, "no threshold\nyet", ha="center", va="center", fontsize=10)
top.text(124, 11, "threshold\nabove 1e12", ha="center", va="center", fontsize=10)
top.text(210, 1.8, "threshold")
top.text(370, 11, "labels by lot", ha="center", va="center", color=BLUE)
bottom.set(ylim=(2e-3, 100), xlabel="step")
plt.show()

print("left out:", int(left_out.sum()), "of", int(optclip.metrics(state)["skip/steps"]))
for leaf in optclip.nonfinite_leaves(state, init_params())[:5]:
    print(
        f"step {leaf.step}: {leaf.path:14} {'NaN' if leaf.nan else '':4}",
        f"norm {leaf.norm:.2g}, loss {leaf.loss:.2g}",
    )

# %% [markdown]
# What is not finite is always left out. The 1e20 batches of the first 64 steps were
# taken: a rule must see some steps before it can tell a spike. The clip inside held
# these steps down. But the rule recorded them, and as long as most of them were among
# its last 128 norms its threshold was above 1e12. From step 180 on nearly every
# poisoned batch is left out, and no good one. Labels by lot are told late, when the
# network is sure of itself: at step 11 their norm and loss are like the others, at step
# 306 they are spikes.
#
# The lines below the picture name the leaves of the newest bad steps. NaN comes in with
# the pixels and goes through the whole network, so all leaves hold it.
#
# ## In every batch a few examples are bad
#
# Now each example is poisoned with a chance of 5%. About three in a batch of 64 are
# bad, and four batches in five hold a NaN or an infinity. To leave out whole steps is
# then to leave out the data. The right picture has the norms of single examples, as
# `clipped_grad` saw them in the second half of its run. A third run has no bad
# pixels, but 20% of all labels are drawn by lot.

# %%
EACH = "optclip.clipped_grad"
WAYS = {
    CLIP: (OPTIMIZERS[CLIP], mean_gradients),
    SKIP: (OPTIMIZERS[SKIP], mean_gradients),
    EACH: (OPTIMIZERS[ALONE], clipped_examples),
}
wrong_labels = np.where(rng.random((STEPS, BATCH)) < 0.2, LABELS, GOOD)
second, third = (
    {
        name: jax.device_get(train(*way, jnp.asarray(kinds)))[1]
        for name, way in WAYS.items()
    }
    for kinds in (bad_examples, wrong_labels)
)
norms, kinds = second[EACH]["example_norms"][300:], bad_examples[300:]
LOOKS[EACH] = {"color": BROWN, "linewidth": 2}

figure, (left, right) = plt.subplots(
    1, 2, figsize=(8.5, 3.9), width_ratios=[1.35, 1], layout="constrained"
)
short = {CLIP: 'clip, nonfinite="skip"', SKIP: "skip_steps", EACH: "clipped_grad"}
for name, record in second.items():
    left.plot(record["accuracy"], label=short[name], **LOOKS[name])
left.set(xlabel="step", ylabel="accuracy in %", ylim=(0, 100))
left.legend(loc="lower right", frameon=False)
for row, kind in enumerate((GOOD, LABELS, HUGE)):
    some = norms[kinds == kind][:: 60 if kind == GOOD else 2]
    some = some[some > 0]
    jitter = row + np.random.default_rng(1).uniform(-0.25, 0.25, some.size)
    right.semilogx(
        some, jitter, ".", color=GREY if kind == GOOD else BROWN, markersize=4
    )
right.axvline(1.0, color="k", linestyle="--", linewidth=1.5)
right.text(3, -0.42, "max_norm", va="center")
right.set(yticks=range(4), yticklabels=["good", "labels\nby lot", "1e20", "NaN, inf"])
right.set(xlabel="norm of one example", ylim=(3.4, -0.6), xlim=(1e-8, 1e24))
right.text(1e8, 3, "left out", ha="center", va="center")
right.grid(axis="y", visible=False)
plt.show()

for title, runs in (("all kinds of poison", second), ("20% labels by lot", third)):
    for name, record in runs.items():
        mean = record["accuracy"][300:].mean()
        skipped = int(record.get("skip/skipped_steps", [0])[-1])
        print(f"{title:20} {name:46}{mean:5.1f}%  left out {skipped}")

# %% [markdown]
# With `clipped_grad` the mean accuracy in the second half is 98.2%; leaving out
# whole batches gives 91.0% and 89.7%, and `skip_steps` left out 482 of 600. Examples
# with NaN or inf are not in the mean, and one with 1e20 counts no more than any clipped
# one. (A few of these have a gradient of zero, and are not drawn.)
#
# Wrong labels are another matter. Their gradients, with norms around 20, are clipped to
# 1. But by then a good example has a norm of about 0.01, so a wrong one still pulls a
# hundred times as hard. In the third run the three ways end within half a percent of
# each other, and `skip_steps` leaves out nothing: what is in each batch is usual.
#
# The same as assertions, so that this notebook is a test as well:

# %%
accuracy = {name: record["accuracy"] for name, (_, record) in first.items()}
for name in (ALONE, OPTAX):
    assert accuracy[name][45] > 70
    assert accuracy[name][46:].max() < 20
for name in (CLIP, SKIP):
    assert accuracy[name][300:].min() > 95
assert abs(accuracy[CLIP][300:].mean() - accuracy[SKIP][300:].mean()) < 1
assert np.flatnonzero(np.isin(bad_batches, (NAN, INF)))[0] == 46
clip = optclip.clip_by_global_norm(1.0)
assert jnp.isnan(clip.update(jnp.array([jnp.nan]), clip.init(jnp.zeros(1)))[0]).all()

assert left_out[np.isin(bad_batches, (NAN, INF))].all()
assert not left_out[:64][np.isin(bad_batches[:64], (HUGE, LABELS))].any()
assert (kept["skip/threshold"][70:160] > 1e12).all()
assert (kept["skip/threshold"][195:] < 10).all()
assert left_out[180:][bad_batches[180:] > 0].mean() > 0.9
assert left_out[bad_batches == GOOD].mean() < 0.01
assert bad_batches[11] == bad_batches[306] == LABELS
assert kept["skip/norm"][11] < kept["skip/norm"][:20].max()
assert kept["skip/loss"][11] < 1.5 * kept["skip/loss"][0]
assert kept["skip/norm"][306] > kept["skip/threshold"][306]
assert kept["skip/loss"][306] > 10 * kept["skip/loss_threshold"][306]
spoiled = [c for c in optclip.nonfinite_leaves(state, init_params()) if c.nan]
assert "hidden/kernel" in {c.path for c in spoiled}

spoiled = np.isin(bad_examples, (NAN, INF))
assert 0.75 < spoiled.any(axis=1).mean() < 0.85
assert second[SKIP]["skip/skipped_steps"][-1] >= spoiled.any(axis=1).sum()
assert second[EACH]["dropped_examples"].sum() >= spoiled.sum()
halves = {name: record["accuracy"][300:].mean() for name, record in second.items()}
assert halves[EACH] > 97
assert max(halves[CLIP], halves[SKIP]) < halves[EACH] - 3
assert 0.002 < np.median(norms[kinds == GOOD]) < 0.05
assert 10 < np.median(norms[kinds == LABELS]) < 40
assert (norms[kinds == HUGE] == 0).mean() < 0.3
halves = [record["accuracy"][300:].mean() for record in third.values()]
assert max(halves) - min(halves) < 1.5
assert third[SKIP]["skip/skipped_steps"][-1] < 6

# %% [markdown]
# ## What to take away
#
# | | NaN, inf | 1e20 | labels by lot |
# | --- | --- | --- | --- |
# | a clip | handed on by default | bounded | bounded |
# | `skip_steps` | left out | left out, after 64 steps | left out late, or never |
# | `clipped_grad` | bad examples left out | bounded | bounded, and still strong |
#
# - Whole batches bad: `optclip.skip_steps` around a clip. Give it the loss, and keep
#   the clip inside for the first steps.
# - A few bad examples in each batch: `optclip.clipped_grad`. It costs as many
#   backward passes as there are examples, done side by side.
# - None of them finds an error that is in the data from the beginning, and usual there.
#   Where bad inputs can be told by looking at them, take them out before the training.
#
# More: [Bad steps](../bad-steps.md), and [Diagnosis](../diagnosis.md) for the batches
# that make gradients explode.
