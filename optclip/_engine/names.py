"""Names of leaves, such as "encoder/0/kernel", and their integer codes in states."""

from __future__ import annotations

import collections
import functools
import zlib
from typing import Any

import jax
import numpy as np
from optax import MaskedNode

__all__ = ["leaf_names", "path_codes", "path_name"]

# Flax wraps arrays in these classes or their subclasses. They are pytree nodes with a
# field `value`, which is not part of a parameter's name.
_BOXES = {"Variable", "VariableState", "AxisMetadata"}


@functools.lru_cache(maxsize=4096)
def _is_box_type(kind: type) -> bool:
    # Modules and names are compared, so that Flax need not be installed.
    return any(
        base.__name__ in _BOXES and base.__module__.split(".")[0] == "flax"
        for base in kind.__mro__
    )


def _is_box(node: Any) -> bool:
    return _is_box_type(type(node))


def path_name(path: tuple) -> str:
    """Returns "a/b/0" for a key path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _by_keys(path: tuple) -> str:
    """Returns "['a'].b[0]" for a key path, which shows the type of each key."""
    return jax.tree_util.keystr(path)


def _is_hole(node: Any) -> bool:
    return node is None or isinstance(node, MaskedNode)


def _entries(tree: Any) -> list[tuple[tuple, Any]]:
    """Returns the (key path, leaf) of each leaf, without the field `value` of boxes.

    Masked and absent leaves also have entries, so that the parameters in a subset of
    the tree have the same names as in the whole tree.
    """

    def stop(node):
        return _is_hole(node) or (node is not tree and _is_box(node))

    entries: list[tuple[tuple, Any]] = []
    for path, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=stop)[0]:
        inside = _entries(node) if _is_box(node) and node is not tree else [((), node)]
        entries += [(path + rest, leaf) for rest, leaf in inside]
    if _is_box(tree) and len({path[:1] for path, _ in entries}) == 1:
        entries = [(path[1:], leaf) for path, leaf in entries]
    return entries


def _numbered(names: list[str]) -> list[str]:
    """Returns the names, with a number appended to each repeated name."""
    used, out = set(), []
    for name in names:
        new, k = name, 1
        while new in used or (k > 1 and new in names):
            k += 1
            new = f"{name}#{k}"
        used.add(new)
        out.append(new)
    return out


# The code that a state without leaves stores. It is not 0, since 0 is the checksum of
# the empty name, which is the name of an array without a container.
NO_LEAF = -1


def leaf_names(tree: Any) -> list[str]:
    """Returns a distinct name for each leaf of ``tree``.

    Leaves whose names would be the same, as in ``{"a/b": x, "a": {"b": y}}``, are named
    by their keys instead: "['a/b']" and "['a']['b']".
    """
    entries = _entries(tree)
    names = [path_name(path) for path, _ in entries]
    if len(set(names)) < len(names):
        counts = collections.Counter(names)
        pairs = zip(entries, names, strict=True)
        spelled = [_by_keys(e[0]) if counts[n] > 1 else n for e, n in pairs]
        names = _numbered(spelled)
    pairs = zip(entries, names, strict=True)
    return [name for (_, leaf), name in pairs if not _is_hole(leaf)]


def _checksum(name: str) -> int:
    return int(np.uint32(zlib.crc32(name.encode())).astype(np.int32))


def path_codes(names: list[str]) -> np.ndarray:
    """Returns one int32 per name, which identifies a leaf in a state.

    Codes are CRC-32 checksums. If two names have the same checksum, zero bytes are
    appended to the second name until its checksum is distinct.
    """
    codes: list[int] = []
    taken: set[int] = set()
    for name in names:
        code = _checksum(name)
        while code in taken:
            name += "\0"
            code = _checksum(name)
        taken.add(code)
        codes.append(code)
    return np.asarray(codes or [NO_LEAF], np.int32)
