"""Writes the tables and plots of docs/benchmark.md from the results of the benchmark.

Usage: python -m benchmarks.training.report [--results FOLDER] [--output FOLDER]
"""

import argparse
import pathlib

import matplotlib
import numpy as np

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from benchmarks.training.methods import CONSTANT, METHODS
from benchmarks.training.summary import ratios, read

RESULTS = pathlib.Path("benchmarks/results/training")
SHOWN = ("none", f"{CONSTANT}(1)", "zclip", "autoclip", "adagc", "stabilize")
COLORS = ("#595959", "#006BA4", "#FF800E", "#5F9ED1", "#C85200", "#000000")
MARKS = ("x", "o", "s", "^", "D", "*")


def interval(values):
    """Returns "1.03 (0.99 to 1.08)": the value of all seeds, and 95% of resamples."""
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return f"{values[0]:.2f} ({low:.2f} to {high:.2f})"


def methods_in(results):
    """Returns the methods that all tasks have results of, constants one by one."""
    names = set.intersection(*(set(task.losses) for task in results.values()))
    singles = sorted(
        (n for n in names if n.startswith(f"{CONSTANT}(")),
        key=lambda n: float(n.split("(")[1][:-1]),
    )
    return ["none", *singles, *(m for m in METHODS if m in names - {"none", CONSTANT})]


def overall(results, names):
    """Yields the table over all tasks: one row per method."""
    yield "| method | own best rate | worst task | same rate | worst rate | diverged |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name in names:
        each = [ratios(task, name) for task in results.values()]
        own, same, worst = (
            np.exp(np.mean(np.log([getattr(r, field) for r in each]), axis=0))
            for field in ("own", "same", "worst")
        )
        top = max(r.own[0] for r in each)
        lost = np.mean([task.diverged[name].mean() for task in results.values()])
        yield (
            f"| {name} | {interval(own)} | {top:.2f} | {interval(same)} "
            f"| {interval(worst)} | {lost:.1%} |"
        )


def by_task(results, names):
    """Yields the table of ratios at the own best rate: one row per task."""
    yield f"| task | trouble | optimizer | best constant | {' | '.join(names)} |"
    yield "| --- | --- | --- | --- |" + " --- |" * len(names)
    for name, task in results.items():
        settings = task.settings
        means = task.losses[CONSTANT].mean(axis=-1)
        value, rate = np.unravel_index(means.argmin(), means.shape)
        best = (
            f"{settings['values'][value]:g} at rate {settings['rates'][rate]:g}: "
            f"{np.exp(means.min()):.3g}"
        )
        cells = " | ".join(f"{ratios(task, m).own[0]:.2f}" for m in names)
        yield (
            f"| {name} | {settings['trouble']} | {settings['optimizer']} | {best} "
            f"| {cells} |"
        )


def plot_rates(results, file):
    """Draws the loss against the learning rate, one panel per task."""
    columns = 4
    rows = -(-len(results) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(11, 2.6 * rows), layout="constrained", squeeze=False
    )
    for panel, (name, task) in zip(panels.flat, results.items(), strict=False):
        for method, color, mark in zip(SHOWN, COLORS, MARKS, strict=True):
            if method in task.losses:
                level = np.exp(task.losses[method].mean(axis=-1)[0])
                look = {"color": color, "marker": mark, "ms": 4, "lw": 1.4}
                panel.loglog(task.settings["rates"], level, label=method, **look)
        best = np.exp(task.losses[CONSTANT].mean(axis=-1).min())
        panel.axhline(best, color="0.6", lw=1, ls=":", label="best constant")
        panel.set_title(name.replace("_", " "), fontsize=10)
        panel.tick_params(labelsize=8)
    for panel in panels.flat[len(results) :]:
        panel.axis("off")
    figure.supxlabel("learning rate")
    figure.supylabel("clean loss")
    handles = panels.flat[0].get_legend_handles_labels()
    figure.legend(*handles, ncols=4, loc="outside lower center", frameon=False)
    figure.savefig(file, dpi=90)
    plt.close(figure)


def plot_profile(results, names, file):
    """Draws, per method, the fraction of tasks with a ratio of at most x."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for method, color, mark in zip(SHOWN, COLORS, MARKS, strict=True):
        if method in names:
            own = np.sort([ratios(t, method).own[0] for t in results.values()])
            share = np.arange(1, len(own) + 1) / len(own)
            look = {"color": color, "marker": mark, "ms": 4}
            axes.step(own, share, where="post", label=method, **look)
    axes.set(
        xscale="log",
        xlabel="loss at the own best rate, relative to the best constant",
        ylabel="fraction of tasks",
    )
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=90)
    plt.close(figure)


def main():
    """Writes the tables and plots of both splits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args()
    everything = read(options.results)
    options.output.mkdir(parents=True, exist_ok=True)
    for split, title in (("held_out", "Held-out tasks"), ("tune", "Tuning tasks")):
        chosen = {n: t for n, t in everything.items() if t.settings["split"] == split}
        if not chosen:
            continue
        names = methods_in(chosen)
        first, last = next(iter(chosen.values())).settings["seeds"]
        few = [m for m in names if m in SHOWN]
        lines = [f"# {title}", "", f"{len(chosen)} tasks, {last - first} seeds.", ""]
        lines += [*overall(chosen, names), "", *by_task(chosen, few)]
        text = "\n".join(lines) + "\n"
        (options.output / f"{split}.md").write_text(text, encoding="utf-8")
        plot_rates(chosen, options.output / f"{split}_rates.png")
        plot_profile(chosen, names, options.output / f"{split}_profile.png")
        print(text)


if __name__ == "__main__":
    main()
