"""Encodes text as integers: Python's own documentation or the user's file."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

__all__ = ["SHORTEST", "Text", "encode", "load"]

SHORTEST = 1000

# Python 3.11 ships 466,000 characters and later versions ship more. With this limit,
# all versions train on nearly the same amount of text.
_LENGTH = 450_000


class Text(NamedTuple):
    """A text encoded as integers.

    Attributes:
        codes: int32[characters]. 0 is the most frequent character. The last code
            represents all characters that are too rare to have their own code.
        entropy: Unigram entropy of the codes in nats. This is the loss of a model that
            knows the frequency of each character but ignores the context.
        digest: A hash that identifies the text.
    """

    codes: np.ndarray
    entropy: float
    digest: str


def _documentation() -> str:
    """Returns the language reference that ``help()`` displays."""
    try:
        from pydoc_data import topics
    except ImportError as error:
        raise ValueError(
            "This Python comes without `pydoc_data`. Give a text with --text FILE."
        ) from error
    return "\n".join(topics.topics[name] for name in sorted(topics.topics))[:_LENGTH]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(
            f"--text {path} cannot be read ({error.strerror}). Give a text file."
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--text {path} is not UTF-8 text (byte {error.start}). Convert it first."
        ) from error


def encode(text: str, symbols: int) -> Text:
    """Returns the text encoded with at most ``symbols`` different codes."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    _, characters, counts = np.unique(points, return_inverse=True, return_counts=True)
    rank = np.empty(len(counts), np.int32)
    rank[np.argsort(-counts, kind="stable")] = np.arange(len(counts), dtype=np.int32)
    codes = np.minimum(rank, symbols - 1)[characters]
    share = np.unique(codes, return_counts=True)[1] / len(codes)
    entropy = float(-np.sum(share * np.log(share)))
    return Text(codes, entropy, hashlib.sha256(points.tobytes()).hexdigest())


def load(path: Path | None, symbols: int) -> Text:
    """Returns the text of a file, or Python's own documentation.

    Raises:
        ValueError: If the text cannot be read, is too short, or repeats one character.
    """
    text = _documentation() if path is None else _read(path)
    if len(text) < SHORTEST:
        raise ValueError(
            f"--text {path} has {len(text)} characters, which is too short. Give a "
            f"text of at least {SHORTEST:,}."
        )
    encoded = encode(text, symbols)
    if encoded.entropy == 0:
        raise ValueError(
            f"--text {path} repeats one character: there is nothing to learn. Give "
            "another text."
        )
    return encoded
