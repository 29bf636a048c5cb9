"""Imports go down only, and only public names of others are used."""

import ast
import pathlib
import sys

import pytest

import optclip

ROOT = pathlib.Path(optclip.__file__).parent
FILES = {p.relative_to(ROOT).as_posix(): p for p in sorted(ROOT.rglob("*.py"))}

# Each room, and the rooms that it may import from. `__init__` and the demo see all.
MAY_IMPORT = {
    "_checks": set(),
    "_numbers": set(),
    "_names": set(),
    "_leaves": {"_names"},
    "_trees": {"_leaves"},
    "_reads": {"_trees"},
    "_sums": {"_numbers", "_reads", "_trees"},
    "_layouts": set(),
    "_validation": {"_names"},
    "_state": {"_names", "_numbers", "_validation"},
    "_measure": {"_layouts", "_numbers", "_reads", "_sums", "_trees"},
    "norms": {"_checks", "_layouts", "_measure", "_trees"},
    "rules": {"_checks", "_layouts", "_numbers"},
    "actions": {"_checks", "_numbers", "rules"},
    "scopes": {"_layouts", "_trees"},
    "_engine": {"_layouts", "_measure", "_trees", "actions", "rules", "scopes"},
    "_groups": {
        "_engine", "_layouts", "_measure", "_reads", "_trees", "actions", "rules",
    },
    "_elements": {
        "_engine", "_groups", "_layouts", "_measure", "_numbers", "_trees", "actions",
        "rules",
    },
    "clipping": {
        "_checks", "_elements", "_engine", "_groups", "_measure", "_numbers", "_state",
        "_trees", "actions", "norms", "rules", "scopes",
    },
    "methods": {"_checks", "actions", "clipping", "norms", "rules", "scopes"},
    "monitoring": {"_checks", "_measure", "_numbers", "_state", "_trees"},
    "_spectra": {"_numbers"},
    "spectral": {
        "_checks", "_engine", "_layouts", "_measure", "_numbers", "_spectra", "_state",
        "_trees",
    },
    "stable_adam": {"_checks", "_numbers", "_state", "_trees", "rules"},
    "feedback": {"_checks", "_state", "_trees", "methods"},
    "per_example": {
        "_checks", "_groups", "_measure", "_names", "_trees", "actions", "methods",
        "rules",
    },
    "_masks": set(),
    "_jaxprs": set(),
    "_holding": {"_jaxprs", "_state"},
    "stabilize": {
        "_checks", "_holding", "_masks", "_state", "_trees", "methods", "scopes",
    },
    "_spikes": {"_checks", "_engine", "_measure", "_state", "_trees", "rules"},
    "skipping": {
        "_checks", "_holding", "_masks", "_measure", "_spikes", "_state", "_trees",
        "rules",
    },
    "sharding": {"_names"},
    "_lookup": {"_names", "_trees"},
    "taken": {"_lookup", "skipping", "stabilize"},
    "telemetry": {"_lookup", "clipping", "monitoring", "skipping"},
    "attribution": {"_lookup", "clipping", "monitoring", "skipping"},
    "diagnosis": {
        "_checks", "_jaxprs", "_lookup", "_names", "_trees", "attribution", "clipping",
        "monitoring", "norms", "rules", "skipping",
    },
}  # fmt: skip
ABOVE = {"__init__", "__main__", "demo"}


def room(path):
    return path.removesuffix(".py").split("/")[0]


def imported(path):
    """Returns the full names that a file imports, from anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(FILES[path].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms_imported(path):
    parts = [name.split(".") for name in imported(path)]
    return {p[1] for p in parts if p[0] == "optclip" and len(p) > 1}


def test_the_table_only_points_down():
    order = list(MAY_IMPORT)
    for name, below in MAY_IMPORT.items():
        assert below <= set(order[: order.index(name)]), name


@pytest.mark.parametrize("path", FILES)
def test_imports_go_down_only(path):
    if room(path) in ABOVE:
        return
    assert room(path) in MAY_IMPORT, "a new room: write it into the table"
    assert rooms_imported(path) - {room(path)} <= MAY_IMPORT[room(path)]


@pytest.mark.parametrize("path", FILES)
def test_no_private_module_of_jax_or_optax_is_imported(path):
    for name in imported(path):
        assert not name.startswith(("jax._src", "optax._src", "jaxlib")), name
    assert "._src" not in FILES[path].read_text()


# The pictures of a report; only `report` imports them, when it is called.
NAMES = ("_axes", "_panels", "_signal_panels", "pictures")
PICTURES = {f"diagnosis/{name}.py" for name in NAMES}


@pytest.mark.parametrize("path", [p for p in FILES if room(p) != "demo"])
def test_only_jax_optax_and_numpy_are_needed(path):
    allowed = {
        "__future__",
        "collections",
        "functools",
        "itertools",
        "jax",
        "numpy",
        "optax",
        "optclip",
        "re",
    }
    allowed |= {"math", "operator", "typing", "zlib"}
    if room(path) == "diagnosis":
        allowed |= set(sys.stdlib_module_names)
    if path in PICTURES:
        allowed.add("matplotlib")
    assert {name.split(".")[0] for name in imported(path)} <= allowed
