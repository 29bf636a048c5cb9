"""The tables of a run of the scenarios, in Markdown."""

import collections
import statistics

__all__ = ["confusion", "each", "summary"]


def confusion(results):
    """Counts the first diagnosed cause by the true cause; each seed counts once."""
    counts = collections.Counter()
    for result in results:
        # For a mixed scenario, any of its causes is right.
        truth = result.said[0] if result.right else result.scenario.cause
        counts[truth, result.said[0]] += 1
    truths = sorted({t for t, _ in counts})
    said = sorted({s for _, s in counts})
    return [
        _row(["true \\ diagnosed", *said]),
        _row(["---"] * (1 + len(said))),
        *(_row([t, *(counts[t, s] or "." for s in said)]) for t in truths),
    ]


def summary(results):
    """Says how many models are right, how many alarms are false, and what helped."""
    outside = [r for r in results if r.scenario.cause == "unknown"]
    faulty = [r for r in results if r.scenario.cause not in ("healthy", "unknown")]
    sound = [r for r in results if r.scenario.cause == "healthy"]
    right, models = _models(faulty, lambda r: r.right)
    calm, healthy = _models(sound, lambda r: r.right)
    helped, _ = _models(faulty, lambda r: r.helped)
    both, _ = _models(faulty, lambda r: r.helped_all)
    unnamed, others = _models(outside, lambda r: r.right)
    alarms = sorted({r.scenario.name for r in sound if not r.right})
    seconds = [r.seconds for r in results] or [0.0]
    return [
        "| measured | models |",
        "| --- | --- |",
        f"| faulty: the true cause ranked first, on most seeds | {right} of {models} |",
        f"| faulty: train after the first remedy | {helped} of {models} |",
        f"| faulty: train after each finding's first remedy | {both} of {models} |",
        f"| healthy: no findings, on most seeds | {calm} of {healthy} |",
        f"| other faults: no cause is named, on most seeds | {unnamed} of {others} |",
        "",
        f"False alarms: {', '.join(alarms) or 'none'}.",
        "",
        f"A diagnosis took {statistics.median(seconds):.1f} s (median) and at most "
        f"{max(seconds):.1f} s, compilation included.",
    ]


def each(results):
    """Lists the diagnosis of each scenario on each seed."""
    rows = [
        _row(
            ["model", "seed", "true", "diagnosed", "first remedy", "trains then", "s"]
        ),
        _row(["---"] * 7),
    ]
    for r in results:
        truth = " + ".join((r.scenario.cause, *r.scenario.also))
        said = ", ".join(r.said) if r.right else f"**{', '.join(r.said)}**"
        trains = {True: "yes", False: "no", None: ""}[r.helped]
        cells = [r.scenario.name, r.seed, truth, said, r.action, trains]
        rows.append(_row([*cells, f"{r.seconds:.1f}"]))
    return rows


def _models(results, good):
    """Returns how many models are right on most of their seeds, and of how many."""
    by_name = collections.defaultdict(list)
    for result in results:
        by_name[result.scenario.name].append(bool(good(result)))
    wins = sum(sum(flags) > len(flags) / 2 for flags in by_name.values())
    return wins, len(by_name)


def _row(cells):
    return "| " + " | ".join(map(str, cells)) + " |"
