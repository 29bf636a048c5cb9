"""Compares clipping methods by training small models. Usage, from the repository:

    python -m benchmarks.training --quick
    python -m benchmarks.training [--split tune] [--tasks A B] [--methods A B]
                                  [--seeds 16] [--output benchmarks/results/training]

Each pair of a task and a method is one jitted program, and one JSON file with all its
settings and a checksum of the program. Pairs whose file has the same are left out. So a
run that was stopped goes on where it was, and what has changed is run again.
"""

import argparse
import json
import math
import pathlib
import time

import numpy as np

from benchmarks._results import machine
from benchmarks.training import tasks
from benchmarks.training.candidates import CANDIDATES
from benchmarks.training.methods import METHODS
from benchmarks.training.run import program_of, train

OUTPUT = pathlib.Path("benchmarks/results/training")
# Seeds of the two splits: none of the held-out ones is ever tuned on.
FIRST_SEED = {"tune": 0, "held_out": 100}
QUICK = ("logistic_from_zeros", "digits_heavy_tails")
VARIANTS = {f"stabilize, {name}" for name in CANDIDATES}


def settings_of(task, method, seeds):
    """Returns what the results depend on."""
    return {
        "task": task.name,
        "split": task.split,
        "trouble": task.trouble,
        "optimizer": task.optimizer,
        "steps": task.steps,
        "cosine": task.cosine,
        "chance": task.chance,
        "rates": list(task.rates),
        "values": list(METHODS[method].values),
        "method": method,
        "seeds": [seeds.start, seeds.stop],
    }


def measure(name, method, count, folder):
    """Trains one pair, unless its file is there; returns a line about it."""
    task = tasks.load(name)
    first = FIRST_SEED[task.split]
    seeds = range(first, first + count)
    program = program_of(task, METHODS[method], seeds)
    wanted = settings_of(task, method, seeds) | {"program": program.checksum}
    file = folder / name / f"{method}.json"
    if file.exists() and json.loads(file.read_text())["settings"] == wanted:
        return "already there"
    start = time.perf_counter()
    clean = train(program).clean
    took = time.perf_counter() - start
    # JSON has no infinity: null stands for a run that diverged.
    shown = [
        [[float(f"{x:.5g}") if math.isfinite(x) else None for x in row] for row in part]
        for part in clean.tolist()
    ]
    result = {"settings": wanted, "machine": machine(), "clean": shown}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result) + "\n", encoding="utf-8")
    middle = np.median(clean, axis=-1)
    at = np.unravel_index(np.argmin(middle), middle.shape)
    values = METHODS[method].values
    value = f", value {values[at[0]]:g}" if values else ""
    return (
        f"best median {middle[at]:.4g} at rate {task.rates[at[1]]:g}{value}; "
        f"{np.mean(clean > 2 * task.chance):.0%} diverged; {took:.0f} s"
    )


def main():
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two tasks, two seeds")
    parser.add_argument("--split", choices=("tune", "held_out"))
    parser.add_argument("--tasks", nargs="+", choices=tasks.all_names())
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--seeds", type=int, default=16, help="number of seeds")
    parser.add_argument("--output", type=pathlib.Path, default=OUTPUT)
    options = parser.parse_args()
    names = options.tasks or tasks.all_names()
    if options.quick:
        names, options.seeds = [n for n in names if n in QUICK], 2
        options.methods = [m for m in options.methods if m not in VARIANTS]
    if options.split:
        names = [n for n in names if tasks.load(n).split == options.split]
    pairs = [(name, method) for name in names for method in options.methods]
    for number, (name, method) in enumerate(pairs, 1):
        said = measure(name, method, options.seeds, options.output)
        print(f"[{number}/{len(pairs)}] {name}, {method}: {said}", flush=True)


if __name__ == "__main__":
    main()
