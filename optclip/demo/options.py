"""Parses and validates the demo's options, and merges them with a checkpoint's."""

import argparse
import math
from pathlib import Path
from typing import Any, NamedTuple

from optclip.demo import clips
from optclip.diagnosis._parser import OneLineParser

__all__ = ["DEFAULTS", "Options", "Parser", "Sizes", "merge"]

DEFAULTS = {
    "method": clips.DEFAULT,
    "learning_rate": 0.01,
    "steps": 240,
    "seeds": 3,
    "output": Path("runs/demo"),
    "text": None,
}


class Options(NamedTuple):
    """The options that the user can set."""

    method: str
    threshold: float | None
    learning_rate: float
    steps: int
    seeds: int
    output: Path
    text: Path | None


class Sizes(NamedTuple):
    """Sizes that the user cannot set.

    Attributes:
        symbols: Size of the alphabet.
        hidden: Number of hidden units.
        length: Number of characters that gradients are backpropagated through.
        batch: Number of windows of text per step.
        chunk: Number of steps between checkpoints.
    """

    symbols: int = 64
    hidden: int = 64
    length: int = 64
    batch: int = 16
    chunk: int = 40


def _whole(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(
            f"must be a whole number of at least 1, got {text!r}"
        )
    return value


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("must be a path, got an empty one")
    return Path(text)


def _methods() -> str:
    rows = []
    for name, method in clips.METHODS.items():
        known = "" if method.threshold is None else f"{method.threshold:g}"
        rows.append(f"  {name:<20} {known:<6} {method.meaning}")
    return "\n".join(["methods, with default thresholds and what they bound:", *rows])


class Parser(OneLineParser):
    """Parses the demo's command line."""

    def __init__(self):
        """Declares the options."""
        super().__init__(
            prog="python -m optclip.demo",
            description=(
                "Trains a recurrent network on text, character by character, without\n"
                "clipping, with Optax's clip_by_global_norm, and with optclip: at\n"
                "learning rates that are too high, with bad batches, and with\n"
                "gradients that overflow. Shows a table, and writes figure.png and\n"
                "metrics.jsonl. Ctrl-C stops it; --resume continues the run."
            ),
            epilog=_methods(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        add = self.add_argument
        add(
            "--method",
            choices=tuple(clips.METHODS),
            metavar="NAME",
            help=f"method of optclip, see below (default {DEFAULTS['method']})",
        )
        add(
            "--threshold",
            type=_positive,
            metavar="X",
            help="threshold of the method (default: see below)",
        )
        add(
            "--learning-rate",
            type=_positive,
            metavar="X",
            help="middle one of the learning rates of Adam "
            f"(default {DEFAULTS['learning_rate']})",
        )
        add(
            "--steps",
            type=_whole,
            metavar="N",
            help=f"training steps (default {DEFAULTS['steps']})",
        )
        add(
            "--seeds",
            type=_whole,
            metavar="N",
            help=f"networks per learning rate (default {DEFAULTS['seeds']})",
        )
        add(
            "--output",
            type=_path,
            metavar="FOLDER",
            help=f"where results go (default {DEFAULTS['output']}); an earlier run's "
            "are replaced",
        )
        add(
            "--text",
            type=_path,
            metavar="FILE",
            help="a text of your own, in UTF-8 (default: the documentation that comes "
            "with Python)",
        )
        add(
            "--resume",
            action="store_true",
            help="continue the run in the output folder, with its options",
        )
        add(
            "--diagnose",
            action="store_true",
            help="then diagnose the run without clipping at the highest learning "
            "rate: report.png and report.html",
        )


def merge(given: dict[str, Any], stored: dict[str, Any] | None) -> Options:
    """Returns the given options, with the others taken from a checkpoint or defaults.

    Args:
        given: Options by name; None for each option that the user did not set.
        stored: Options of the checkpoint to resume, by name, or None.

    Raises:
        ValueError: If a given option differs from the checkpoint's, or the method has
            no threshold.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if "text" in given:
        given["text"] = given["text"].resolve()
    if stored is None:
        chosen = DEFAULTS | given
        known = clips.METHODS[chosen["method"]].threshold
        if known is None and "threshold" in given:
            raise ValueError(
                f"--threshold does not apply to {chosen['method']}, which has none. "
                "Leave it out, or choose another --method."
            )
        chosen.setdefault("threshold", known)
        return Options(**chosen)
    for name, value in given.items():
        if name != "output" and value != stored[name]:
            option = f"--{name.replace('_', '-')}"
            old = "Python's documentation" if stored[name] is None else stored[name]
            raise ValueError(
                f"{option} {value} differs from the checkpoint's ({old}). Leave it "
                "out, or start again without --resume."
            )
    return Options(**(stored | {"output": given.get("output", DEFAULTS["output"])}))
