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
# # How do I see what a clip does during a run?
#
# A clip keeps its figures in the optimizer's state. `optclip.metrics` reads them there,
# inside a jitted step or outside, so they can be logged beside the loss. When a step is
# bad, `optclip.nonfinite_leaves` names the parameter, and at the end
# `optclip.diagnosis.write_report` draws the whole run on one page. Here a run meets two
# spikes and a NaN, and all of it shows.

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
BLUE, ORANGE, GREY = "#006BA4", "#FF800E", "0.55"

# %% [markdown]
# ## A run with three bad batches
#
# A small network learns a smooth function of 8 inputs. In two batches the targets are
# in the wrong unit, a thousand and three hundred times too large, and in one there is a
# NaN among the inputs.

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
# ## The figures leave the step with the loss
#
# The step returns `optclip.metrics(state)` beside the loss: a dict of scalars. Nothing
# in the loop knows which clip it is; without one the dict is empty. `lax.scan` stacks
# the figures over the steps. With a loop in Python, log them as they come. The loss is
# handed on as well, because `skip_steps` judges it beside the norm.


# %%
def train(optimizer, steps=STEPS):
    optimizer = optax.with_extra_args_support(optimizer)  # so that all take a loss

    def step(carry, number):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, *batch(number))
        updates, state = optimizer.update(grads, state, params, loss=loss)
        figures = {"loss": loss, **optclip.metrics(state)}
        return (optax.apply_updates(params, updates), state), figures

    params = start()
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(steps)))
    (params, state), figures = run((params, optimizer.init(params)))
    return params, state, jax.tree.map(np.asarray, figures)


adam = optax.adam(3e-3)
watched = optclip.skip_steps(
    optax.chain(optclip.record_norms(), optclip.clip_by_global_norm(2.0), adam)
)
params, state, figures = train(watched)
_, _, plain = train(adam)

print(*sorted(figures), sep="\n")

# %%
steps = np.arange(STEPS)
left_out = figures["skip/in_a_row"] > 0
figure, (top, low) = plt.subplots(2, 1, figsize=(8.5, 6), sharex=True)
top.semilogy(plain["loss"], color=ORANGE, ls="--", lw=1.5, label="Adam alone")
top.semilogy(figures["loss"], color=BLUE, lw=1.5, label="watched: skip and clip")
top.set(ylabel="loss of the batch")
top.legend(loc="upper left")
low.semilogy(figures["skip/norm"], color=GREY, lw=1.3, label="before the clip")
low.semilogy(figures["clip/norm_after"], color=BLUE, lw=1.5, label="after the clip")
low.axhline(2.0, color="black", ls="--", lw=1.2, label="threshold")
finite = left_out & np.isfinite(figures["skip/norm"])
low.plot(steps[finite], figures["skip/norm"][finite], "x", color=ORANGE, ms=9, mew=2.5,
         label="left out: spike")  # fmt: skip
low.axvline(MISSING, color=ORANGE, ls=":", lw=2, label="left out: NaN")
low.set(xlabel="training step", ylabel="norm of the gradient", ylim=(None, 1e8))
low.legend(loc="upper left", ncols=3, fontsize=11)
figure.align_ylabels()
figure.tight_layout()
plt.show()

# %% [markdown]
# Above, Adam alone is thrown back by the first spike, and ends at the NaN: from then on
# its loss is NaN, and nothing is drawn. The watched run leaves out three steps and goes
# on.
#
# Below is the picture to look for in a run of your own: the usual norms, the threshold
# above most of them, and the bad steps far above. The clip acts on the long gradients
# of the first steps; the spikes never reach it, because `skip_steps` leaves them out.
#
# ## Which parameter?
#
# Totals are scalars. `optclip.record_norms()` also keeps the norm of each leaf, which
# `optclip.leaf_metrics` gives by path, and after a NaN `optclip.nonfinite_leaves` says
# where it was seen first.

# %%
by_leaf = jax.device_get(optclip.leaf_metrics(state, params))
names = [name for name in by_leaf if name.endswith("/norm")]
for name in names:
    print(f"{name.removesuffix('/norm'):16}{by_leaf[name]:.2g}")

totals = jax.device_get(optclip.metrics(state))
print()
for name in ("skip/steps", "skip/skipped_steps", "skip/spike_steps"):
    print(f"{name:22}{int(totals[name])}")
print(f"{'clip/clipped_fraction':22}{totals['clip/clipped_fraction']:.2f}")
print()
nonfinite_leaves = optclip.nonfinite_leaves(state, params)
for leaf in nonfinite_leaves:
    print(f"step {leaf.step}: {leaf.path}")

# %% [markdown]
# The NaN came in with the inputs, so it is in the gradients of all layers that they
# pass through. At a spike the leaf with the longest gradient is named.
#
# ## Log it
#
# A dict of scalars goes into any logger. As lines of JSON it is a few lines of Python,
# and `python -m optclip.diagnosis FOLDER` makes a page of such a file. The recipes for
# TensorBoard, Weights & Biases and others are in [Telemetry](../telemetry.md).

# %%
folder = pathlib.Path(tempfile.mkdtemp())
with open(folder / "metrics.jsonl", "w") as file:
    for number in range(STEPS):
        row = {name: float(values[number]) for name, values in figures.items()}
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
# The page shows the norm with its threshold and the bad steps, the distribution of the
# norms, who was to blame, and what threshold the usual norms suggest.
#
# Log `clip/norm_before`, `clip/clipped_fraction`, `skip/skipped_steps` and
# `skip/in_a_row`, and look at `nonfinite_leaves` when one of the counts rises. What
# each key means is in [Telemetry](../telemetry.md); what to do about bad steps, in [Bad
# steps](../bad-steps.md). The same as assertions, so that this notebook is a test as
# well:

# %%
assert steps[left_out].tolist() == sorted([*WRONG_UNIT, MISSING])
assert totals["skip/skipped_steps"] == 3
assert totals["skip/spike_steps"] == 2
assert np.isnan(plain["loss"][MISSING:]).all()
assert plain["loss"][151:200].max() > 2 * figures["loss"][151:200].max()
assert figures["loss"][-20:].mean() < 0.5 * figures["loss"][:20].mean()
assert (figures["clip/norm_after"] <= 2.0 * (1 + 1e-6)).all()
assert {leaf.step for leaf in nonfinite_leaves} == {150, 250, 330}
assert 0 < totals["clip/clipped_fraction"] < 0.5
