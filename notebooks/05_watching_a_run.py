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
# # How do I see what clipping does during a run?
#
# optclip's transformations keep statistics in the optimizer state. `optclip.metrics`
# reads them, inside a jitted step or outside, so that you can log them alongside the
# loss. When a step is bad, `optclip.nonfinite_leaves` names the parameter, and at the
# end `optclip.diagnosis.write_report` plots the whole run on one page. In this
# notebook, a run encounters two spikes and a NaN, and each of them shows up.

# %%
import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import optclip

plt.style.use("tableau-colorblind10")
plt.rcParams.update({"font.size": 12, "axes.grid": True, "grid.alpha": 0.3})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
BLUE, ORANGE, GRAY = "#006BA4", "#FF800E", "0.55"

# %% [markdown]
# ## A run with three bad batches
#
# A small network learns a smooth function of 8 inputs. In two batches the targets are
# in the wrong unit, a thousand and three hundred times too large, and in one batch the
# inputs contain a NaN.

# %%
STEPS, WRONG_UNIT, MISSING = 400, {150: 1000.0, 330: 300.0}, 250


def batch(step):
    x = jax.random.normal(jax.random.fold_in(jax.random.key(1), step), (64, 8))
    y = jnp.sin(x).sum(1)
    for number, factor in WRONG_UNIT.items():
        y = jnp.where(step == number, factor, 1.0) * y
    return x.at[3, 5].set(jnp.where(step == MISSING, jnp.nan, x[3, 5])), y


def loss_fn(params, x, y):
    for name in ("first", "second"):
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"])
    out = x @ params["last"]["kernel"] + params["last"]["bias"]
    return jnp.mean((out[:, 0] - y) ** 2)


def start():
    sizes = {"first": (8, 32), "second": (32, 32), "last": (32, 1)}
    keys = jax.random.split(jax.random.key(0), 3)
    params = {}
    for key, (name, size) in zip(keys, sizes.items(), strict=True):
        kernel = jax.random.normal(key, size) / size[0] ** 0.5
        params[name] = {"kernel": kernel, "bias": jnp.zeros(size[1])}
    return params


# %% [markdown]
# ## Returning the metrics from the step
#
# The step returns `optclip.metrics(state)` alongside the loss: a dict of scalars. The
# loop does not depend on which transformation is used; without one, the dict is empty.
# `lax.scan` stacks the metrics over the steps. In a Python loop, log them as they
# arrive. The loss is also passed to the optimizer, because `skip_steps` judges it as
# well as the norm.


# %%
def train(optimizer, steps=STEPS):
    optimizer = optax.with_extra_args_support(optimizer)  # to accept a loss

    def step(carry, number):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, *batch(number))
        updates, state = optimizer.update(grads, state, params, loss=loss)
        metrics = {"loss": loss, **optclip.metrics(state)}
        return (optax.apply_updates(params, updates), state), metrics

    params = start()
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(steps)))
    (params, state), metrics = run((params, optimizer.init(params)))
    return params, state, jax.tree.map(np.asarray, metrics)


adam = optax.adam(3e-3)
watched = optclip.skip_steps(
    optax.chain(optclip.record_norms(), optclip.clip_by_global_norm(2.0), adam)
)
params, state, metrics = train(watched)
_, _, plain = train(adam)

print(*sorted(metrics), sep="\n")

# %%
steps = np.arange(STEPS)
left_out = metrics["skip/in_a_row"] > 0
figure, (top, low) = plt.subplots(2, 1, figsize=(8.5, 6), sharex=True)
top.semilogy(plain["loss"], color=ORANGE, ls="--", lw=1.5, label="Adam alone")
top.semilogy(metrics["loss"], color=BLUE, lw=1.5, label="watched: skip and clip")
top.set(ylabel="loss of the batch")
top.legend(loc="upper left")
low.semilogy(metrics["skip/norm"], color=GRAY, lw=1.3, label="before the clip")
low.semilogy(metrics["clip/norm_after"], color=BLUE, lw=1.5, label="after the clip")
low.axhline(2.0, color="black", ls="--", lw=1.2, label="threshold")
finite = left_out & np.isfinite(metrics["skip/norm"])
low.plot(steps[finite], metrics["skip/norm"][finite], "x", color=ORANGE, ms=9, mew=2.5,
         label="skipped: spike")  # fmt: skip
low.axvline(MISSING, color=ORANGE, ls=":", lw=2, label="skipped: NaN")
low.set(xlabel="training step", ylabel="norm of the gradient", ylim=(None, 1e8))
low.legend(loc="upper left", ncols=3, fontsize=11)
figure.align_ylabels()
figure.tight_layout()
plt.show()

# %% [markdown]
# In the top plot, Adam alone is set back by the first spike and fails at the NaN: from
# then on its loss is NaN, and nothing is drawn. The monitored run skips three steps and
# continues.
#
# The bottom plot is what to look for in your own run: the typical norms, the threshold
# above most of them, and the bad steps far above. The transformation clips the large
# gradients of the first steps; the spikes never reach it, because `skip_steps` skips
# those steps.
#
# ## Which parameter?
#
# Totals are scalars. `optclip.record_norms()` also keeps the norm of each leaf, which
# `optclip.leaf_metrics` returns by path. After a NaN, `optclip.nonfinite_leaves` tells
# you where it was first seen.

# %%
by_leaf = jax.device_get(optclip.leaf_metrics(state))
names = [name for name in by_leaf if name.endswith("/norm")]
for name in names:
    print(f"{name.removesuffix('/norm'):16}{by_leaf[name]:.2g}")

totals = jax.device_get(optclip.metrics(state))
print()
for name in ("skip/steps", "skip/skipped_steps", "skip/spike_steps"):
    print(f"{name:22}{int(totals[name])}")
print(f"{'clip/clipped_fraction':22}{totals['clip/clipped_fraction']:.2f}")
print()
nonfinite_leaves = optclip.nonfinite_leaves(state)
for leaf in nonfinite_leaves:
    print(f"step {leaf.step}: {leaf.path}")

# %% [markdown]
# The NaN came from the inputs, so it is in the gradients of all layers that the inputs
# pass through. For a spike, the leaf with the largest gradient is named.
#
# ## Log it
#
# Any logger accepts a dict of scalars. Writing JSON lines takes a few lines of Python,
# and `python -m optclip.diagnosis FOLDER` generates a report from such a file.
# [Telemetry](../telemetry.md) has recipes for TensorBoard, Weights & Biases and others.

# %%
folder = pathlib.Path(tempfile.mkdtemp())
with open(folder / "metrics.jsonl", "w") as file:
    for number in range(STEPS):
        row = {name: float(values[number]) for name, values in metrics.items()}
        row = {name: x if np.isfinite(x) else None for name, x in row.items()}
        print(json.dumps({"step": number, **row}, allow_nan=False), file=file)

picture, page = optclip.diagnosis.write_report(
    folder, nonfinite_leaves=nonfinite_leaves, output=folder
)
figure, axes = plt.subplots(figsize=(8, 6.8))
axes.imshow(plt.imread(picture))
axes.axis("off")
figure.tight_layout(pad=0)
plt.show()

# %% [markdown]
# The report shows the norm with its threshold and the bad steps, the distribution of
# the norms, which leaves were non-finite, and the threshold that the typical norms
# suggest.
#
# Log `clip/norm_before`, `clip/clipped_fraction`, `skip/skipped_steps` and
# `skip/in_a_row`, and look at `nonfinite_leaves` when one of the counts rises.
# [Telemetry](../telemetry.md) explains each key, and [Bad steps](../bad-steps.md)
# explains what to do about bad steps. The same claims as assertions, so that this
# notebook is also a test:

# %%
assert steps[left_out].tolist() == sorted([*WRONG_UNIT, MISSING])
assert totals["skip/skipped_steps"] == 3
assert totals["skip/spike_steps"] == 2
assert np.isnan(plain["loss"][MISSING:]).all()
assert plain["loss"][151:200].max() > 2 * metrics["loss"][151:200].max()
assert metrics["loss"][-20:].mean() < 0.5 * metrics["loss"][:20].mean()
assert (metrics["clip/norm_after"] <= 2.0 * (1 + 1e-6)).all()
assert {leaf.step for leaf in nonfinite_leaves} == {150, 250, 330}
assert 0 < totals["clip/clipped_fraction"] < 0.5
