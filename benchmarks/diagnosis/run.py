"""Diagnoses the scenarios of one split, and applies the first remedy of each.

A scenario is right on a seed if the first finding names its cause (for a mixed
scenario: any of its causes), and right overall if it is right on most seeds. If the
cause is none that a diagnosis can name, it must name none: "unknown", or no finding.
The first
remedy is carried out by code (the first of its actions that applies to the scenario),
and helps if 200 steps later the typical loss is below its initial value and no step was
non-finite. Where it does not help, the first action of each finding is carried out as
well.

Usage: python -m benchmarks.diagnosis.run [--split tune] [--only NAME] [--seeds 1]
       [--jobs 2] [--output benchmarks/results]
"""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import time

import jax

from benchmarks._results import machine, parser, write
from benchmarks.diagnosis import tables
from benchmarks.diagnosis.apply import apply_all, first_applicable, trains
from benchmarks.diagnosis.scenarios import SPLITS, split
from optclip.diagnosis._diagnose import diagnose


@dataclasses.dataclass(frozen=True)
class Result:
    """The diagnosis of one scenario on one seed.

    Attributes:
        scenario: The scenario.
        seed: The seed.
        said: The diagnosed causes in the order of the findings; "healthy" if none.
        seconds: How long the diagnosis took.
        action: What the first remedy did, or "".
        helped: Whether the model trains after it; None for a healthy one.
        helped_all: Whether it trains after the first action of every finding.
        bases: The `Finding.basis` of each finding.
    """

    scenario: object
    seed: int
    said: tuple[str, ...]
    seconds: float
    action: str = ""
    helped: bool | None = None
    helped_all: bool | None = None
    bases: tuple[str, ...] = ()

    @property
    def right(self):
        if self.scenario.cause == "unknown":
            return self.said[0] in ("unknown", "healthy")
        return self.said[0] in (self.scenario.cause, *self.scenario.also)

    def row(self):
        """Returns the result as it is stored in JSON."""
        return {
            "name": self.scenario.name,
            "seed": self.seed,
            "true": [self.scenario.cause, *self.scenario.also],
            "said": self.said,
            "bases": self.bases,
            "basis": self.bases[0] if self.bases else "",
            "right": self.right,
            "action": self.action,
            "helped": self.helped,
        }


def follow(scenario, problem, findings, seed):
    """Returns what the first remedy did, whether it helped, and whether all helped."""
    if not findings:
        return "", False, False
    action, after = first_applicable(findings[0].remedies, problem, scenario, seed)
    words = _words(action)
    if action is None:
        return words, False, False
    if trains(after):
        return words, True, True
    after = apply_all(findings, problem, scenario, seed)
    return words, False, len(findings) > 1 and trains(after)


def _words(action):
    if action is None:
        return "none that applies"
    return (
        action.kind if action.amount is None else f"{action.kind} {action.amount:.3g}"
    )


def examine(scenario, seed):
    """Diagnoses one scenario and, if it has a fault, applies the remedies."""
    problem = scenario.make(seed)
    start = time.perf_counter()
    report = diagnose(
        problem.loss_fn,
        problem.params,
        problem.batches,
        optimizer=problem.optimizer,
        opt_state=problem.opt_state,
    )
    seconds = time.perf_counter() - start
    said = tuple(finding.cause for finding in report.findings) or ("healthy",)
    bases = tuple(finding.basis for finding in report.findings)
    if scenario.cause in ("healthy", "unknown"):
        return Result(scenario, seed, said, seconds, bases=bases)
    followed = follow(scenario, problem, report.findings, seed)
    return Result(scenario, seed, said, seconds, *followed, bases)


def attempt(scenario, seed):
    """Runs the diagnosis; an error counts as a wrong answer, named after the error."""
    try:
        return examine(scenario, seed)
    except Exception as error:
        print(f"  {type(error).__name__}: {error}")
        failed = None if scenario.cause in ("healthy", "unknown") else False
        said = (f"{type(error).__name__}",)
        return Result(scenario, seed, said, 0.0, "", failed, failed)


def _one(task):
    """Returns the result for a number of a scenario; its functions stay behind."""
    name, number, seed = task
    result = attempt(split(name)[number], seed)
    jax.clear_caches()
    return dataclasses.replace(result, scenario=None)


def show(result):
    scenario = result.scenario
    truth = " + ".join((scenario.cause, *scenario.also))
    helped = {True: "trains", False: "does not train", None: ""}[result.helped]
    print(
        f"{'right' if result.right else 'WRONG'} | {scenario.name} | {truth} | "
        f"{', '.join(result.said)} | {', '.join(result.bases)} | "
        f"{result.action} {helped} | {result.seconds:.1f} s",
        flush=True,
    )


def main():
    options = _options()
    every = split(options.split)
    tasks = [
        (options.split, number, seed)
        for number, scenario in enumerate(every)
        if options.only in (scenario.name, scenario.cause, "")
        for seed in range(options.seeds)
    ]
    fresh = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.jobs, fresh) as pool:
        results = []
        for task, result in zip(tasks, pool.map(_one, tasks), strict=True):
            results.append(dataclasses.replace(result, scenario=every[task[1]]))
            show(results[-1])
    counts = [*tables.confusion(results), "", *tables.summary(results)]
    print("\n".join(["", *counts]))
    where = f"Measured by `benchmarks/diagnosis/run.py` on {machine()}."
    lines = [*counts, "", *tables.each(results), "", where]
    write(options.output, f"diagnosis_{options.split}.md", lines)
    rows = [json.dumps(result.row()) for result in results]
    write(options.output, f"diagnosis_{options.split}.json", [f"[{_joined(rows)}]"])


def _joined(rows):
    return ",\n".join(rows)


def _options():
    made = parser(__doc__)
    made.add_argument("--split", choices=SPLITS, default="tune")
    made.add_argument("--only", default="", help="a name or a cause")
    made.add_argument("--seeds", type=int, default=1)
    made.add_argument("--jobs", type=int, default=1, help="number of processes")
    return made.parse_args()


if __name__ == "__main__":
    main()
