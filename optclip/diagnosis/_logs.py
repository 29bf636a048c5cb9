"""Reads the rows of a run from a file, a mapping of arrays or a list of mappings."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["LOG", "Row", "rows_in"]

LOG = "metrics.jsonl"
Row = Mapping[str, Any]


def _file_in(path: Path) -> Path:
    if not path.exists():
        raise ValueError(f"{path} does not exist. Name the folder of a recorded run.")
    if path.is_file():
        return path
    logs = sorted(path.glob("*.jsonl"))
    named = path / LOG
    if named in logs or len(logs) == 1:
        return named if named in logs else logs[0]
    raise ValueError(f"{path} has no {LOG}. Name the file, or another folder.")


def _rows_of(path: Path) -> list[Row]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}).") from error
    numbered = [(i, line) for i, line in enumerate(lines, 1) if line.strip()]
    rows: list[Row] = []
    for i, line in numbered:
        try:
            row = json.loads(line)
        except (
            ValueError,
            RecursionError,
        ):  # not JSON, or JSON that no log would contain
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif i != numbered[-1][0] or not rows:  # the last line may be incomplete
            raise ValueError(f"{path}: line {i} is no JSON object. Is it a log?")
    return rows


def _rows_of_arrays(columns: Mapping[str, Any]) -> list[Row]:
    arrays = {key: np.atleast_1d(np.asarray(x)) for key, x in columns.items()}
    lengths = {key: x.shape[0] for key, x in arrays.items()}
    if any(x.ndim > 1 for x in arrays.values()) or len(set(lengths.values())) > 1:
        shapes = ", ".join(f"{key} {x.shape}" for key, x in arrays.items())
        raise ValueError(f"The arrays must have one entry a step, got {shapes}.")
    entries = zip(*(x.tolist() for x in arrays.values()), strict=True)
    return [dict(zip(arrays, entry, strict=True)) for entry in entries]


def rows_in(source: Any) -> tuple[list[Row], str]:
    """Returns the rows in ``source``, and the name of ``source`` in error messages.

    Raises:
        TypeError: If ``source`` is of a type that can't hold rows.
        ValueError: If ``source`` is a file that can't be read, or if its arrays differ
            in shape.
    """
    if isinstance(source, (str, Path)):
        path = _file_in(Path(source))
        return _rows_of(path), str(path)
    if isinstance(source, Mapping):
        return _rows_of_arrays(source), "The mapping"
    try:
        rows = list(source)
    except TypeError as error:
        raise TypeError(
            "A run must be a folder, a log, a mapping of arrays, a list of mappings or "
            f"an array of norms, got {type(source).__name__}."
        ) from error
    if all(isinstance(row, Mapping) for row in rows):
        return rows, "The list"
    return _rows_of_arrays({"norm": source}), "The array"
