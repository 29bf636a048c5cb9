"""Counts how often findings were right, by their basis.

The counts are those of `optclip.diagnosis._calibration`. They come from an evaluation
(`benchmarks.diagnosis.run`) of the scenarios that the rules were developed on, before
the last corrections. These made all findings on these scenarios right, which says more
about the corrections than about other models.

Usage: python -m benchmarks.diagnosis.calibrate [--output benchmarks/results]
"""

import collections
import json
import pathlib

from benchmarks._results import parser, write
from optclip.diagnosis._calibration import RIGHT, probability

SPLITS = ("tune", "held_out", "unseen", "tune_kinds")


def read(folder):
    """Returns the results of all splits that have been run."""
    paths = [
        pathlib.Path(folder) / f"diagnosis_before_{split}.json" for split in SPLITS
    ]
    return [row for p in paths if p.exists() for row in json.loads(p.read_text())]


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
    counted = counts(read(options.output))
    print("\n".join(table(counted)))
    write(options.output, "diagnosis_calibration.md", table(counted))
    if counted != RIGHT:
        print(f"`optclip.diagnosis._calibration` has other counts: {RIGHT}.")
    assert all(0 < probability(basis) < 1 for basis in RIGHT)


if __name__ == "__main__":
    main()
