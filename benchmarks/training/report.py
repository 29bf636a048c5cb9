"""Writes the tables and plots of docs/benchmark.md from the results of the benchmark.

Usage: python -m benchmarks.training.report [--results FOLDER] [--output FOLDER]
"""

import argparse
import pathlib

import matplotlib
import numpy as np

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib import ticker

from benchmarks.training import tasks
from benchmarks.training.candidates import CANDIDATES
from benchmarks.training.methods import CONSTANT, METHODS
from benchmarks.training.summary import ratios, read

RESULTS = pathlib.Path("benchmarks/results/training")
VARIANTS = [f"stabilize, {name}" for name in CANDIDATES]
SHOWN = ("none", f"{CONSTANT}(1)", "zclip", "autoclip", "adagc", "stabilize")
COLORS = ("#595959", "#006BA4", "#FF800E", "#5F9ED1", "#C85200", "#000000")
MARKS = ("x", "o", "s", "^", "D", "*")


def interval(values):
    """Returns the value of all seeds and, in parentheses, 95% of resamples."""
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return f"{values[0]:.2f} ({low:.2f}\N{EN DASH}{high:.2f})"


def methods_in(results, wanted):
    """Returns those of the methods, constants one by one, that all tasks have."""
    names = set.intersection(*(set(task.losses) for task in results.values()))
    singles = sorted(
        (n for n in names if n.startswith(f"{CONSTANT}(")),
        key=lambda n: float(n.split("(")[1][:-1]),
    )
    listed = ["none", *singles, *(m for m in METHODS if m not in ("none", CONSTANT))]
    return [name for name in listed if name in names and wanted(name)]


def overall(results, names):
    """Yields the table over all tasks: one row per method, the best own rate first."""
    yield (
        "| method | own best rate | worst task | same rate | worst higher rate "
        "| worst rate | diverged |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    rows = []
    for name in names:
        each = [ratios(task, name) for task in results.values()]
        own, same, high, worst = (
            np.exp(np.mean(np.log([getattr(r, field) for r in each]), axis=0))
            for field in ("own", "same", "high", "worst")
        )
        top = max(r.own[0] for r in each)
        lost = np.mean([task.diverged[name].mean() for task in results.values()])
        line = (
            f"| {name} | {interval(own)} | {top:.2f} | {interval(same)} "
            f"| {interval(high)} | {interval(worst)} | {lost:.1%} |"
        )
        rows.append((own[0], line))
    yield from (line for _, line in sorted(rows))


def by_task(results, names):
    """Yields the table of ratios at the own best rate: one row per task."""
    yield f"| task | best constant | {' | '.join(names)} |"
    yield "| --- | --- |" + " --- |" * len(names)
    for name, task in results.items():
        settings = task.settings
        means = task.losses[CONSTANT].mean(axis=-1)
        value, rate = np.unravel_index(means.argmin(), means.shape)
        best = (
            f"{np.exp(means.min()):.3g} with {settings['values'][value]:g} "
            f"at rate {settings['rates'][rate]:g}"
        )
        cells = " | ".join(f"{ratios(task, m).own[0]:.2f}" for m in names)
        yield f"| {name} | {best} | {cells} |"


def descriptions():
    """Yields the table of all tasks."""
    yield "| task | tasks | trouble | optimizer | learning rates | steps |"
    yield "| --- | --- | --- | --- | --- | --- |"
    found = [tasks.load(name) for name in tasks.all_names()]
    for task in sorted(found, key=lambda t: (t.split, t.name)):
        split = task.split.replace("_", "-")
        low, high = task.rates[0], task.rates[-1]
        rates = f"{low:g}\N{EN DASH}{high:g}"
        rates += ", cosine" if task.cosine else ", constant"
        yield (
            f"| {task.name} | {split} | {task.trouble} | {task.optimizer} | {rates} "
            f"| {task.steps} |"
        )


def plot_rates(results, names, file):
    """Draws the loss against the learning rate, one panel per task."""
    columns = 4
    rows = -(-len(results) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(11, 2.6 * rows), layout="constrained", squeeze=False
    )
    for panel, (name, task) in zip(panels.flat, results.items(), strict=False):
        for method, color, mark in zip(SHOWN, COLORS, MARKS, strict=True):
            if method in names:
                level = np.exp(task.losses[method].mean(axis=-1)[0])
                look = {"color": color, "marker": mark, "ms": 4, "lw": 1.4}
                panel.loglog(task.settings["rates"], level, label=method, **look)
        best = np.exp(task.losses[CONSTANT].mean(axis=-1).min())
        panel.axhline(best, color="0.6", lw=1, ls=":", label="best constant")
        panel.set_title(name.replace("_", " "), fontsize=10)
        for axis in (panel.xaxis, panel.yaxis):
            subs = (1,) if axis is panel.xaxis else (1, 2, 5)
            axis.set_major_locator(ticker.LogLocator(subs=subs))
            axis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.set_minor_locator(ticker.NullLocator())
        panel.tick_params(labelsize=8)
    for panel in panels.flat[len(results) :]:
        panel.axis("off")
    figure.supxlabel("learning rate")
    figure.supylabel("loss without the trouble")
    handles = panels.flat[0].get_legend_handles_labels()
    figure.legend(*handles, ncols=4, loc="outside upper center", frameon=False)
    figure.savefig(file, dpi=90)
    plt.close(figure)


def plot_profile(results, names, file):
    """Draws, per method, the fraction of tasks with a ratio of at most x."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    found = {
        method: np.sort([ratios(t, method).own[0] for t in results.values()])
        for method in SHOWN
        if method in names
    }
    right = 1.1 * max(own[-1] for own in found.values())
    for method, color, mark in zip(SHOWN, COLORS, MARKS, strict=True):
        if method in found:
            own = np.append(found[method], right)
            share = np.append(np.arange(1, len(own)), len(own) - 1) / (len(own) - 1)
            look = {"color": color, "marker": mark, "ms": 4, "markevery": slice(-1)}
            axes.step(own, share, where="post", label=method, **look)
    axes.set(
        xscale="log",
        xlabel="loss at the own best rate, relative to the best constant",
        ylabel="fraction of tasks",
    )
    axes.legend(frameon=False, loc="lower right")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=90)
    plt.close(figure)


def write(file, lines):
    """Writes lines of Markdown, and prints them."""
    text = "\n".join(lines) + "\n"
    file.write_text(text, encoding="utf-8")
    print(text)


def main():
    """Writes the tables and plots of both splits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args()
    everything = read(options.results)
    options.output.mkdir(parents=True, exist_ok=True)
    write(options.output / "tasks.md", descriptions())
    for split in ("held_out", "tune"):
        chosen = {n: t for n, t in everything.items() if t.settings["split"] == split}
        if not chosen:
            continue
        names = methods_in(chosen, lambda name: name not in VARIANTS)
        first, last = next(iter(chosen.values())).settings["seeds"]
        machines = sorted({m for t in chosen.values() for m in t.machines})
        lines = [
            *overall(chosen, names),
            "",
            *by_task(chosen, [m for m in names if m in SHOWN]),
            "",
            f"{len(chosen)} tasks, {last - first} seeds. Trained by "
            f"`benchmarks/training` on {' and on '.join(machines)}.",
        ]
        write(options.output / f"{split}.md", lines)
        plot_rates(chosen, names, options.output / f"{split}_rates.png")
        plot_profile(chosen, names, options.output / f"{split}_profile.png")
        variants = methods_in(chosen, lambda n: n in ("stabilize", *VARIANTS))
        if split == "tune" and len(variants) > 1:
            write(options.output / "variants.md", overall(chosen, variants))


if __name__ == "__main__":
    main()
