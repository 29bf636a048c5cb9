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
# # Which clip does the benchmark recommend?
#
# *There are many clips. Which one should you use if you tune the learning
# rate, and which one if you don't?*
#
# The benchmark of this repository trained 13 small tasks on which no default was tuned,
# with each method at six learning rates and 16 seeds. This notebook trains nothing: it
# reads these results and looks at them from three sides.

# %%
import json
import pathlib

import matplotlib.pyplot as plt
import numpy as np

plt.style.use("tableau-colorblind10")
plt.rcParams |= {
    "figure.dpi": 88,
    "font.size": 12,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
}

# %% [markdown]
# ## The results
#
# Each file has the losses of one method on one task, for each learning rate and seed. A
# run that diverged counts as one whose loss is twice that of guessing. Constant
# thresholds of `clip_by_global_norm`, from 0.01 to 100, are methods of their own.

# %%
FOLDER = pathlib.Path("../benchmarks/results/training")
CONSTANT = "clip_by_global_norm"

tasks, rates = {}, {}
for file in sorted(FOLDER.glob("*/*.json")):
    result = json.loads(file.read_text())
    settings = result["settings"]
    if settings["split"] != "held_out":
        continue
    clean = np.array(result["clean"], float)  # [thresholds, rates, seeds]
    top = 2 * settings["chance"]
    losses = np.log(np.where(clean < top, clean, top)).mean(axis=-1)
    task = tasks.setdefault(settings["task"], {})
    rates[settings["task"]] = settings["rates"]
    if settings["method"] == CONSTANT:
        for value, row in zip(settings["values"], losses, strict=True):
            task[f"{CONSTANT}({value:g})"] = row
    else:
        task[settings["method"]] = losses[0]

every = set.intersection(*(set(task) for task in tasks.values()))
print(len(tasks), "tasks and", len(every), "methods that were run on all of them")

# %% [markdown]
# ## One task
#
# A neural ODE, with four methods. Without a clip, the loss is higher at every rate.
# With a constant bound, it has a sharp minimum, and rises steeply at higher rates. With
# `stabilize`, it is not as low, but hardly depends on the rate. What matters is how low
# the curve is at its lowest point, if you tune the rate, and how far it rises to the
# right, if you don't.

# %%
SHOWN = {
    "none": "#999999",
    f"{CONSTANT}(1)": "#56B4E9",
    "zclip": "#D55E00",
    "stabilize": "#004D40",
}


def draw(axes, name):
    for method, color in SHOWN.items():
        row = np.exp(tasks[name][method])
        axes.loglog(rates[name], row, "o-", color=color, label=method, linewidth=2)
    axes.set_title(name.replace("_", " "), fontsize=12)


figure, axes = plt.subplots(figsize=(6.5, 4))
draw(axes, "neural_ode")
axes.set_xlabel("learning rate")
axes.set_ylabel("loss at the end")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## All tasks
#
# No curve is the lowest everywhere. `stabilize` (dark green) is flat to the right on
# most tasks. On the adding problem, it is no better than no clip.

# %%
rows = -(-len(tasks) // 4)
figure, grid = plt.subplots(rows, 4, figsize=(12, 2.6 * rows), layout="constrained")
for axes, name in zip(grid.flat, tasks, strict=False):
    draw(axes, name)
    axes.tick_params(labelsize=9)
for axes in grid.flat[len(tasks) :]:
    axes.axis("off")
handles, labels = grid.flat[0].get_legend_handles_labels()
figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
plt.show()

# %% [markdown]
# ## Two numbers for each method
#
# The reference is what a user gets who tunes both the threshold and the rate: the
# lowest loss of any constant threshold at any rate. Two ratios to it describe a method:
#
# - at its own best rate, for those who tune the rate;
# - at the worst rate that is at least as high as that of the reference, for those who
#   don't.
#
# Both are geometric means over the tasks.


# %%
def ratios(method):
    best, high = [], []
    for task in tasks.values():
        constants = np.stack([row for n, row in task.items() if n.startswith(CONSTANT)])
        lowest, rate = constants.min(), constants.min(axis=0).argmin()
        best.append(task[method].min() - lowest)
        high.append(task[method][rate:].max() - lowest)
    return np.exp(np.mean(best)), np.exp(np.mean(high)), np.exp(np.max(best))


found = {method: ratios(method) for method in sorted(every)}
LABELS = {  # and where they are, relative to their points
    "stabilize": (8, 4),
    "stabilize, normalize=False": (8, 4),
    "none": (-16, -18),
    "zclip": (8, -2),
    "adaptive_grad_clip": (-10, 10),
    "autoclip": (8, -3),
    "quantile_clip": (-20, 9),
    "skip_steps": (8, -12),
    f"{CONSTANT}(0.1)": (8, -12),
}
figure, axes = plt.subplots(figsize=(8, 5.5))
for method, (best, high, _) in found.items():
    color = SHOWN.get(method, "#404040" if method in LABELS else "#bbbbbb")
    axes.loglog(best, high, "o", color=color, markersize=8)
    if method in LABELS:
        place = {"xytext": LABELS[method], "textcoords": "offset points"}
        axes.annotate(method, (best, high), fontsize=10, color=color, **place)
axes.set_xlabel("ratio at its own best rate (lower is better)")
axes.set_ylabel("ratio at the worst higher rate")
axes.set_xticks([1, 1.2, 1.5, 2, 2.5], ["1", "1.2", "1.5", "2", "2.5"])
axes.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
axes.minorticks_off()
axes.set_xlim(0.95, 3)
plt.show()

# %% [markdown]
# The methods on the left are the best choice if you tune the rate. `stabilize` is alone
# at the bottom: it is the only method for which a rate that is too high costs little.

# %%
print(f"{'method':28} best rate  worst task  worst higher rate")
for method, (best, high, worst) in sorted(found.items(), key=lambda x: x[1][0])[:12]:
    print(f"{method:28} {best:9.2f} {worst:11.2f} {high:18.2f}")

# %% [markdown]
# ## So, which one?
#
# - **You tune the learning rate:** `adaptive_grad_clip`, or `clip_by_global_norm` with
#   a threshold from 0.03 to 0.3. They need no state.
# - **You don't tune it,** or it may be too high: `stabilize`. It costs more per step
#   (see [performance](../performance.md)), and with momentum SGD it is less good.
# - **Without a clip,** nothing protects you from a rate that is too high.
#
# The tasks are small, and all of them fit on two CPU cores. How they were chosen, how
# often they were looked at, and what was tried is in [the
# benchmark](../benchmark.md).
