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
# # What if the data is corrupted?
#
# One batch with a NaN ruins a run permanently, and by default clipping does not fix it.
# `nonfinite="skip"` does, and so does `optclip.skip_steps`, which also skips spikes and
# tells which steps they were. If every batch has a few bad examples, only
# `optclip.clipped_grad` keeps the good ones. Wrong labels among correct ones get past
# all of them.

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
BLUE, ORANGE, GRAY, BROWN = "#006BA4", "#FF800E", "#8C8C8C", "#C85200"

# %% [markdown]
# ## The data, and how it is corrupted
#
# A small network learns scikit-learn's handwritten digits, with a batch size of 64. An
# example is corrupted in one of four ways: the first eight pixels become NaN, or
# infinite, or 1e20, or the label is random. In the first experiment, one batch in
# twenty is corrupted as a whole. In the second experiment, one example in twenty is
# corrupted, in every batch. Accuracy is measured on 450 other digits, which are clean.

# %%
STEPS, BATCH, TRAIN = 600, 64, 1347
GOOD, NAN, INF, HUGE, LABELS = range(5)
KINDS = ["good", "NaN", "inf", "1e20", "random labels"]

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
    spoiled = (value != 0) & (jnp.arange(64) < 8)  # the first row of the image
    x = jnp.where(spoiled, value, images[row])
    return x, jnp.where(kind == LABELS, lot, labels[row])


# %% [markdown]
# ## The training loop
#
# All optimizers see the same batches. The loss is passed as `value=`, because
# `optclip.skip_steps` uses it too. The gradient is either that of the mean loss, or
# comes from `optclip.clipped_grad`, which clips the gradient of each example before
# averaging, and drops examples whose gradient is not finite.


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
# ## One batch in twenty is corrupted

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
bottom.set_title("corrupted batches", fontsize=12, loc="left")
bottom.grid(axis="y", visible=False)
figure.tight_layout()
plt.show()

for name, (_, record) in first.items():
    print(f"{name:46}{record['accuracy'][-1]:5.1f}%")

# %% [markdown]
# Adam alone and Adam with Optax's clipping fail at step 46, at the first batch that is
# not finite: a NaN times any scale is a NaN. (optclip's clipping does the same by
# default, `nonfinite="propagate"`.) From then on the network predicts the same digit
# for every image, which is correct for 10.9% of them. With `nonfinite="skip"`, and with
# `skip_steps`, the corrupted batches have no visible effect on the curve. There is no
# visible difference between the two here.
#
# ## Which steps were skipped, and why?
#
# `skip_steps` skips steps that are not finite, and spikes: a norm whose logarithm is
# more than five standard deviations above the mean of the last 128, or a loss more than
# six standard deviations above its own mean, as long as such values are rare.
# `optclip.metrics` returns both values and their thresholds at each step.

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
strip.set_title("corrupted batches: filled = skipped, hollow = taken", fontsize=12)
good = bad_batches == GOOD
for axis, what, bound in (
    (top, "norm", "threshold"),
    (bottom, "loss", "loss_threshold"),
):
    bound = kept[f"skip/{bound}"]
    axis.semilogy(
        steps[good], kept[f"skip/{what}"][good], ".", color=GRAY, markersize=4
    )
    axis.plot(steps, np.where(bound < 1e3, bound, np.nan), color="k", linewidth=1.5)
    axis.axvspan(0, 64, color="0.92", zorder=0)
    axis.set(ylabel=what)
top.set(ylim=(0.02, 30))
top.text(32, 11, "no threshold\nyet", ha="center", va="center", fontsize=10)
top.text(124, 11, "threshold\nabove 1e12", ha="center", va="center", fontsize=10)
top.text(210, 1.8, "threshold")
top.text(370, 11, "random labels", ha="center", va="center", color=BLUE)
bottom.set(ylim=(2e-3, 100), xlabel="step")
plt.show()

print("skipped:", int(left_out.sum()), "of", int(optclip.metrics(state)["skip/steps"]))
for leaf in optclip.nonfinite_leaves(state)[:5]:
    print(
        f"step {leaf.step}: {leaf.path:14} {'NaN' if leaf.nan else '':4}",
        f"norm {leaf.norm:.2g}, loss {leaf.loss:.2g}",
    )

# %% [markdown]
# Batches that are not finite are always skipped. The 1e20 batches of the first 64 steps
# were not skipped: a rule must see some steps before it can recognize a spike. The
# clipping inside bounded these steps. But the rule recorded them, and as long as most
# of them were among its last 128 norms, its threshold was above 1e12. From step 180 on,
# nearly every corrupted batch is skipped, and no good one is. Random labels are
# recognized late, when the network has become confident: at step 11 their norm and loss
# are like the others, at step 306 they are spikes.
#
# The lines below the plot name the leaves of the most recent bad steps. A NaN in the
# pixels propagates through the whole network, so all leaves contain it.
#
# ## A few bad examples in every batch
#
# Now each example is corrupted with a probability of 5%. About three examples in a
# batch of 64 are bad, and four batches in five contain a NaN or an infinity. Skipping
# whole steps would discard most of the data. The right plot shows the norms of single
# examples, as `clipped_grad` saw them in the second half of its run. A third set of
# runs has no bad pixels, but 20% of all labels are random.

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
        some, jitter, ".", color=GRAY if kind == GOOD else BROWN, markersize=4
    )
right.axvline(1.0, color="k", linestyle="--", linewidth=1.5)
right.text(3, -0.42, "max_norm", va="center")
right.set(yticks=range(4), yticklabels=["good", "random\nlabels", "1e20", "NaN, inf"])
right.set(xlabel="norm of one example", ylim=(3.4, -0.6), xlim=(1e-8, 1e24))
right.text(1e8, 3, "skipped", ha="center", va="center")
right.grid(axis="y", visible=False)
plt.show()

for title, runs in (("all kinds", second), ("20% random labels", third)):
    for name, record in runs.items():
        mean = record["accuracy"][300:].mean()
        skipped = int(record.get("skip/skipped_steps", [0])[-1])
        print(f"{title:20} {name:46}{mean:5.1f}%  skipped {skipped}")

# %% [markdown]
# With `clipped_grad`, the mean accuracy in the second half is 98.2%; skipping whole
# batches gives 91.0% and 89.7%, and `skip_steps` skipped 482 of 600 steps. Examples
# with NaN or inf are not in the mean, and one with 1e20 counts no more than any other
# clipped one. (A few of these have a gradient of zero, and are not drawn.)
#
# Wrong labels are a different matter. Their gradients, with norms around 20, are
# clipped to norm 1. But by then a good example has a norm of about 0.01, so a wrong one
# still has a hundred times its influence. With random labels, the three methods end
# within half a percent of each other, and `skip_steps` skips nothing: every batch
# contains about the same share of wrong labels, so none stands out.
#
# The same claims as assertions, so that this notebook is also a test:

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
spoiled = [c for c in optclip.nonfinite_leaves(state) if c.nan]
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
# ## Takeaways
#
# | | NaN, inf | 1e20 | random labels |
# | --- | --- | --- | --- |
# | clipping | passed through by default | bounded | bounded |
# | `skip_steps` | skipped | skipped, after 64 steps | skipped late, or never |
# | `clipped_grad` | bad examples dropped | bounded | bounded, but still influential |
#
# - If whole batches are bad, wrap a clipped optimizer in `optclip.skip_steps`. Pass it
#   the loss; the clipping inside protects the first steps.
# - If there are a few bad examples in each batch, use `optclip.clipped_grad`. It costs
#   as many backward passes as there are examples, computed in parallel.
# - None of them detects an error that is in the data from the beginning and is typical
#   of it. If you can recognize bad inputs by inspecting them, remove them before
#   training.
#
# For more, see [Bad steps](../bad-steps.md), and [Diagnosis](../diagnosis.md) to find
# the batches that make gradients explode.
