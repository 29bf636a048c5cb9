"""Counts how often findings were right, by their basis.

The counts are those of `optclip.diagnosis._calibration`. They come from the single
evaluation (`benchmarks.diagnosis.run --split fresh`) of models that the rules had never
seen. On the models that the rules were developed on, far more findings are right, which
says more about the development than about other models.

Usage: python -m benchmarks.diagnosis.calibrate [--output benchmarks/results]
"""

import collections
import json
import pathlib

from benchmarks._results import machine, parser, write
from optclip.diagnosis._calibration import RIGHT, probability

RESULTS = pathlib.Path(__file__).parents[1] / "results"


def read(folder):
    """Returns the results of the models that the rules had never seen."""
    path = pathlib.Path(folder) / "diagnosis_fresh.json"
    return json.loads(path.read_text())


def counts(rows):
    """Returns how many first findings are right, and of how many, by basis."""
    found = collections.defaultdict(lambda: [0, 0])
    for row in rows:
        if row["basis"]:
            found[row["basis"]][0] += row["right"]
            found[row["basis"]][1] += 1
    return {basis: tuple(found[basis]) for basis in RIGHT}


def table(counted):
    lines = ["| basis | right | of | probability |", "| --- | --- | --- | --- |"]
    for basis, (right, total) in counted.items():
        share = (right + 1) / (total + 2)
        lines.append(f"| {basis} | {right} | {total} | {share:.0%} |")
    return lines


def main():
    options = parser(__doc__).parse_args()
    counted = counts(read(RESULTS))
    print("\n".join(table(counted)))
    where = f"Counted by `benchmarks/diagnosis/calibrate.py` on {machine()}."
    write(options.output, "diagnosis_calibration.md", [*table(counted), "", where])
    if counted != RIGHT:
        print(f"`optclip.diagnosis._calibration` has other counts: {RIGHT}.")
    assert all(0 < probability(basis) < 1 for basis in RIGHT)


if __name__ == "__main__":
    main()
