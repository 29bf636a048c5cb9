"""Diagnoses healthy models at other learning rates: findings must be right, or none.

Each healthy scenario of the chosen splits, and a small language model, is diagnosed
with a third of its learning rate, with its own, and with three times as much. A finding
that the learning rate is too high is right if the model, trained for 200 steps, ends
with a lower loss at the recommended rate. Any other finding is a false alarm.

Usage: python -m benchmarks.diagnosis.rates [--splits tune held_out unseen tune_kinds]
       [--only NAME] [--output benchmarks/results]
"""

import dataclasses

import jax
import numpy as np
import optax

from benchmarks._results import machine, parser, write
from benchmarks.diagnosis.apply import apply
from benchmarks.diagnosis.language import language_model
from benchmarks.diagnosis.problem import Problem, Scenario, train, typical_loss
from benchmarks.diagnosis.scenarios import SPLITS, split
from optclip.diagnosis._diagnose import diagnose

FACTORS = (1 / 3, 1.0, 3.0)
STEPS = 200


def scaled(problem: Problem, factor: float) -> Problem:
    """Returns the problem with another learning rate."""
    if factor == 1:
        return problem
    optimizer = optax.chain(problem.optimizer, optax.scale(factor))
    state = problem.opt_state
    state = None if state is None else (state, optax.ScaleState())
    return dataclasses.replace(problem, optimizer=optimizer, opt_state=state)


def _final(problem):
    params, _, _, finite = train(problem, STEPS)
    return typical_loss(problem, params) if finite else np.inf


def judged(problem, findings, scenario):
    """Returns "silent", "right" or "false alarm"."""
    if not findings:
        return "silent"
    first = findings[0]
    if first.cause != "learning_rate":
        return "false alarm"
    after = apply(first.remedies[0], problem, scenario, 0)
    return "right" if _final(after) < _final(problem) else "false alarm"


def rows_of(scenario):
    """Yields the row of the table for each learning rate."""
    for factor in FACTORS:
        problem = scaled(scenario.make(0), factor)
        found = diagnose(
            problem.loss_fn,
            problem.params,
            problem.batches,
            optimizer=problem.optimizer,
            opt_state=problem.opt_state,
            progress=False,
        ).findings
        said = ", ".join(f"{f.cause} ({f.basis})" for f in found)
        verdict = judged(problem, found, scenario)
        print(f"{verdict} | {scenario.name} | {factor:.3g} | {said}", flush=True)
        yield scenario.name, f"{factor:.2g}", said or "nothing", verdict
    jax.clear_caches()


def main():
    made = parser(__doc__)
    made.add_argument("--splits", nargs="+", choices=SPLITS, default=SPLITS[:4])
    made.add_argument("--only", default="", help="the name of a scenario")
    options = made.parse_args()
    chosen = [s for name in options.splits for s in split(name)]
    chosen = [s for s in chosen if s.cause == "healthy"]
    name = "language model of characters, AdamW"
    chosen.append(Scenario(name, "healthy", language_model, language_model))
    chosen = [s for s in chosen if options.only in (s.name, "")]
    rows = [row for scenario in chosen for row in rows_of(scenario)]
    verdicts = [verdict for *_, verdict in rows]
    counts = {
        "silent": verdicts.count("silent"),
        "right": verdicts.count("right"),
        "false alarm(s)": verdicts.count("false alarm"),
    }
    lines = [
        f"{len(rows)} diagnoses of {len(chosen)} healthy models: "
        + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()),
        "",
        "| model | rate | diagnosed | verdict |",
        "| --- | --- | --- | --- |",
        *(f"| {' | '.join(row)} |" for row in rows if row[3] != "silent"),
        "",
        f"Measured by `benchmarks/diagnosis/rates.py` on {machine()}.",
    ]
    print("\n".join(lines))
    write(options.output, "diagnosis_rates.md", lines)


if __name__ == "__main__":
    main()
