"""Reads recorded runs from the demo's log, a log of `optclip.metrics`, or arrays."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from optclip.diagnosis._logs import Row, rows_in

__all__ = ["Run", "printable", "read_run", "runs_with_rows"]

# `optclip.metrics` returns the largest float32 for a threshold that does not exist yet.
_NO_THRESHOLD = float(np.finfo(np.float32).max)
_LOSSES = ("loss", "train/loss", "train_loss", "skip/loss")


@dataclasses.dataclass(frozen=True)
class Run:
    """The record of a run, with one entry per recorded step.

    Attributes:
        name: Name of the run; "" if it has none.
        seed: Seed of the run as text; "" if unknown.
        steps: int64. Step numbers, ascending.
        norms: float64. Gradient norms before clipping; NaN or inf if not finite. All
            NaN if `runs_with_rows` was given losses only.
        nonfinite: bool. Whether the gradient or loss was not finite at this step or at
            any step since the previous recorded one.
        losses: float64, or None if no loss was recorded.
        thresholds: float64, NaN at steps without a threshold; or None.
        clipped: bool. Whether anything was clipped; or None if unknown.
        skipped: bool. Whether this step, or any step since the previous recorded one,
            was skipped; or None if unknown.
    """

    name: str
    seed: str
    steps: np.ndarray
    norms: np.ndarray
    nonfinite: np.ndarray
    losses: np.ndarray | None = None
    thresholds: np.ndarray | None = None
    clipped: np.ndarray | None = None
    skipped: np.ndarray | None = None

    @property
    def title(self) -> str:
        """The name and seed for display; "" if the run has neither."""
        seed = f"seed {self.seed}" if self.seed else ""
        title = ", ".join(word for word in (self.name, seed) if word)
        return printable(title)


def printable(text: str) -> str:
    """Replaces unprintable characters in the text, such as terminal escape codes."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def _number(value: Any, key: str, origin: str) -> float:
    """Returns a value of a row as a float; JSON's null means non-finite."""
    if value is None:
        return math.nan
    try:
        return float(value)
    except OverflowError:  # an integer beyond the range of float64
        return math.inf
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{origin}: {key!r} must be a number, got {value!r}."
        ) from error


def _key(keys: Iterable[str], *wanted: str) -> str | None:
    """Returns the first key that matches, with or without a prefix and a group.

    Keys of `optclip.metrics` may be nested: "skip/norm" may be "critic/skip/norm", and
    in a group of `optax.partition` it may be "skip/encoder/norm". Nested keys are used
    only if there is no exact match.
    """
    keys = list(keys)

    def in_group(key, name):
        head, _, tail = name.partition("/")
        return f"/{head}/" in f"/{key}" and key.endswith(f"/{tail}")

    def with_prefix(key, name):
        return key == name or key.endswith(f"/{name}")

    for fits in (with_prefix, in_group):
        for name in wanted:
            for key in keys:
                if key == name or ("/" in name and fits(key, name)):
                    return key
    return None


def _clip_of(keys: Sequence[str]) -> str:
    """Returns the key prefix of the first clipping transformation, else "clip/".

    `leaf_metrics` also records a norm before clipping, but no counters.
    """
    if "norm_before" in keys:
        return ""
    for key in keys:
        prefix = key.removesuffix("norm_before")
        if prefix != key and f"{prefix}clipped_steps" in keys:
            return prefix
    return "clip/"


class _Columns:
    """The rows of one run, by column."""

    def __init__(self, rows: list[Row], origin: str):
        self.rows, self._origin = rows, origin
        self.keys = list(dict.fromkeys(itertools.chain.from_iterable(rows)))

    def values(self, *wanted: str) -> np.ndarray | None:
        """Returns a column, with NaN for rows without it; None if no row has it."""
        key = _key(self.keys, *wanted)
        if key is None:
            return None
        rows = self.rows
        return np.array([_number(row.get(key), key, self._origin) for row in rows])

    def present(self, *wanted: str) -> np.ndarray:
        """Indicates which rows have the column, even if its value is null."""
        key = _key(self.keys, *wanted)
        return np.array([key in row for row in self.rows], bool)

    def with_norm(
        self, clip: str, or_loss: bool
    ) -> "tuple[_Columns, np.ndarray | None]":
        """Returns the rows that have a gradient norm, and these norms.

        If there are no norms, and ``or_loss``, returns the rows that have a loss, and
        None.
        """
        # Under `skip_steps`, a transformation inside does not see skipped steps.
        names = (
            "skip/norm",
            f"{clip}norm_before",
            "norms/global_norm",
            "grad_norm",
            "norm",
        )
        key = _key(self.keys, *names)
        chosen = _key(self.keys, *_LOSSES) if key is None and or_loss else key
        if chosen is None:
            missing = "no gradient norm and no loss" if or_loss else "no gradient norm"
            wanted = ", ".join([*names, *_LOSSES] if or_loss else names)
            raise ValueError(
                f"{self._origin} has {missing}: none of {wanted}. Record "
                "`optclip.metrics(state)` at each step."
            )
        columns = _Columns([row for row in self.rows if chosen in row], self._origin)
        norms = None if key is None else columns.values(key)
        if norms is not None and (norms < 0).any():
            raise ValueError(
                f"{self._origin}: {key!r} must be a norm, which is never below 0, got "
                f"{norms[norms < 0][0]:g}."
            )
        return columns, norms


def _rises(counts: np.ndarray | None) -> np.ndarray | None:
    """Indicates where a counter has increased; a restarted counter has not."""
    if counts is None:
        return None
    return np.diff(counts, prepend=0.0 if counts[0] <= 1 else counts[0]) > 0


def _steps_of(columns: _Columns, clip: str, number: int) -> np.ndarray:
    steps = columns.values("step")
    if steps is None:  # the counters include this update
        counts = columns.values("skip/steps", f"{clip}steps", "norms/steps")
        steps = np.arange(number) if counts is None else counts - 1
    known = np.isfinite(steps)
    known &= np.abs(np.where(known, steps, 0)) < 2**62  # larger numbers are invalid
    return np.where(known, steps, np.arange(number)).astype(np.int64)


def _finite(columns: _Columns, clip: str, norms: np.ndarray) -> np.ndarray:
    """Indicates the steps at which all recorded values were finite."""
    good = np.isfinite(norms)
    losses = columns.values(*_LOSSES)
    if losses is not None:
        good &= np.isfinite(losses) | ~columns.present(*_LOSSES)
    flags = columns.values("nonfinite")
    if flags is not None:
        good &= ~(flags > 0)
    names = (
        "skip/nonfinite_steps",
        f"{clip}nonfinite_steps",
        "norms/nonfinite_steps",
    )
    rises = _rises(columns.values(*names))
    return good if rises is None else good & ~rises


def _clipped(
    columns: _Columns, clip: str, norms: np.ndarray, thresholds: np.ndarray | None
) -> np.ndarray | None:
    shares = columns.values(f"{clip}clipped", "clipped")
    if shares is not None:
        return shares > 0
    rises = _rises(columns.values(f"{clip}clipped_steps"))
    if rises is not None or thresholds is None:
        return rises
    return np.isfinite(norms) & (norms > thresholds)


def _last_of_each_step(run: Run, rows: list[Row]) -> tuple[Run, list[Row]]:
    """Sorts a run and its rows by step, keeping the last record of each step."""
    _, places = np.unique(run.steps[::-1], return_index=True)
    kept = len(run.steps) - 1 - places
    columns = {
        field.name: getattr(run, field.name)[kept]
        for field in dataclasses.fields(run)
        if isinstance(getattr(run, field.name), np.ndarray)
    }
    return dataclasses.replace(run, **columns), [rows[place] for place in kept]


def _run(
    rows: list[Row], name: str, seed: str, origin: str, or_loss: bool
) -> tuple[Run, list[Row]]:
    everything = _Columns(rows, origin)
    clip = _clip_of(everything.keys)
    columns, found = everything.with_norm(clip, or_loss)
    number = len(columns.rows)
    norms = np.zeros(number) if found is None else found
    thresholds = columns.values(f"{clip}threshold", "threshold", "skip/threshold")
    if thresholds is not None:
        none = np.isclose(thresholds, _NO_THRESHOLD, rtol=1e-6)
        usable = np.isfinite(thresholds) & (thresholds > 0) & ~none
        thresholds = np.where(usable, thresholds, np.nan)
        thresholds = thresholds if usable.any() else None
    clipped = _clipped(columns, clip, norms, thresholds)
    in_a_row = columns.values("skip/in_a_row")
    if clipped is not None and in_a_row is not None:
        clipped &= ~(in_a_row > 0)  # its metrics are from an earlier step
    return _last_of_each_step(
        Run(
            name=name,
            seed=seed,
            steps=_steps_of(columns, clip, number),
            norms=np.full(number, np.nan) if found is None else norms,
            nonfinite=~_finite(columns, clip, norms),
            losses=columns.values(*_LOSSES),
            thresholds=thresholds,
            clipped=clipped,
            skipped=_rises(columns.values("skip/skipped_steps")),
        ),
        columns.rows,
    )


def runs_with_rows(
    source: Any, *, or_loss: bool = False
) -> tuple[tuple[Run, list[Row]], ...]:
    """Returns the runs in a log, each with one row per step.

    Args:
        source: As for `read_run`.
        or_loss: Whether a log without gradient norms is allowed if it has a loss.

    Returns:
        Pairs of a `Run` and the row of each of its steps.

    Raises:
        ValueError: As for `read_run`.
    """
    rows, origin = rows_in(source)
    if not rows:
        raise ValueError(f"{origin} has no rows: nothing was recorded.")
    parts: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        own = tuple("" if row.get(k) is None else str(row[k]) for k in ("run", "seed"))
        parts.setdefault((own[0], own[1]), []).append(row)
    return tuple(_run(part, *own, origin, or_loss) for own, part in parts.items())


def read_run(source: Any) -> tuple[Run, ...]:
    """Returns the runs in a log, one for each name and seed.

    Args:
        source: A folder that contains ``metrics.jsonl``; such a file, with one object
            per step, in the demo's format or with the keys of `optclip.metrics`; a
            mapping of arrays or a sequence of mappings with these keys; or an array of
            norms.

    Returns:
        A tuple of `Run`. Rows without a gradient norm, such as evaluation results, are
        ignored. If a step was recorded more than once, the last row is used. An
        incomplete last line is not an error.

    Raises:
        ValueError: If the file does not exist, is empty or contains no JSON objects, if
            no gradient norm is recorded, or if arrays differ in length.

    Example:
        >>> from optclip.diagnosis.records import read_run
        >>> (run,) = read_run({"norm_before": [1.0, 3.0], "threshold": [2.0, 2.0]})
        >>> run.clipped.tolist()
        [False, True]
    """
    return tuple(run for run, _ in runs_with_rows(source))
