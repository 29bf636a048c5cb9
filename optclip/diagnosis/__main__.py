"""``python -m optclip.diagnosis RUN_FOLDER``: writes the report of a recorded run."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from optclip.diagnosis._contents import facts_shown, suggestion_of
from optclip.diagnosis._parser import OneLineParser
from optclip.diagnosis.facts import HEADING
from optclip.diagnosis.page import write_report
from optclip.diagnosis.records import Run, read_run
from optclip.diagnosis.summary import headline, names_of, pick

__all__ = ["main"]


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("must be a path, got an empty one")
    return Path(text)


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="python -m optclip.diagnosis",
        description="Writes report.png and report.html for a run that was recorded, by "
        "the demo or with optclip.metrics, as metrics.jsonl.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("folder", type=_path, metavar="RUN_FOLDER", help="the run's folder, or its log")
    add(
        "--output",
        type=_path,
        metavar="FOLDER",
        help="where the report goes (default: next to the log)",
    )
    add(
        "--run",
        metavar="NAME",
        help="which run (default: the first that diverged, or had a bad step)",
    )
    add("--seed", metavar="N", help="which seed of it")
    return parser


def _others(runs: Sequence[Run], shown: Run) -> str:
    others = names_of([run for run in runs if run is not shown])
    return f"Others in it, for --run and --seed: {others}."


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the report of a run and prints its headline.

    Args:
        argv: The command-line arguments; ``sys.argv[1:]`` by default.

    Returns:
        The exit code, 0.

    Raises:
        SystemExit: With code 2 and one line on stderr, if an argument is invalid.
    """
    parser = _parser()
    given = parser.parse_args(argv)
    next_to = given.folder.parent if given.folder.is_file() else given.folder
    try:
        runs = read_run(given.folder)
        run = pick(runs, given.run, given.seed)
        paths = write_report(run, output=given.output or next_to)
    except (ImportError, ValueError) as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"the report could not be written ({error}). Free some space.")
    title = f"{run.title}: " if run.title else ""
    print(f"{title}{headline(run)}")
    if facts := facts_shown(run, None):
        print("\n".join([f"{HEADING}:", *map(str, facts)]))
    print(suggestion_of(run, None))
    if len(runs) > 1:
        print(_others(runs, run))
    print(f"Wrote {paths[0]} and {paths[1]}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
