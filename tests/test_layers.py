"""Files import only from lower layers, and only public names of other packages."""

import ast
import pathlib
import subprocess
import sys

import pytest

import optclip

ROOT = pathlib.Path(optclip.__file__).parent
FILES = {p.relative_to(ROOT).as_posix(): p for p in sorted(ROOT.rglob("*.py"))}

# The layers in order: a file imports only from files listed before it. Files of a
# folder, which ends with "/", may import each other. `__init__` and the demo may import
# everything.
ORDER = [
    "_engine/types.py",
    "_engine/numerics.py",
    "_engine/names.py",
    "_engine/validation.py",
    "_engine/jaxprs.py",
    "_engine/pytrees.py",
    "_engine/scale_invariance.py",
    "_engine/sharding.py",
    "_engine/lookup.py",
    "_engine/state.py",
    "_engine/grouping.py",
    "_engine/power_sums.py",
    "_engine/group_norms.py",
    "_engine/rule.py",
    "_engine/thresholds.py",
    "actions.py",
    "scopes.py",
    "norms.py",
    "sharding.py",
    "_engine/update.py",
    "_engine/scaling.py",
    "_engine/elements.py",
    "clipping.py",
    "methods/",
    "wrappers/",
    "rules.py",
    "telemetry.py",
    "states.py",
    "diagnosis/",
]
# The building blocks of rules and actions only handle arrays: no trees, no mesh axes.
ARRAYS_ONLY = {
    "_engine/types.py",
    "_engine/numerics.py",
    "_engine/validation.py",
    "_engine/grouping.py",
    "_engine/rule.py",
    "_engine/thresholds.py",
    "actions.py",
    "methods/_history.py",
}
ABOVE = {"__init__.py", "__main__.py", "demo"}


def layer(path):
    """Returns the position of a file in the order."""
    fits = [
        i
        for i, name in enumerate(ORDER)
        if path == name or (name.endswith("/") and path.startswith(name))
    ]
    assert fits, f"{path} is a new file: write it into the order"
    return fits[0]


def is_above(path):
    return path.split("/")[0] in ABOVE or path.endswith("__init__.py")


def imported(path):
    """Returns the full names of all imports anywhere in a file."""
    names = set()
    for node in ast.walk(ast.parse(FILES[path].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def files_imported(path):
    """Returns the files of the library that a file imports from."""
    found = set()
    for name in imported(path):
        parts = name.split(".")[1:]
        if name.split(".")[0] == "optclip":
            tries = ["/".join(parts[:n]) + ".py" for n in range(len(parts), 0, -1)]
            found |= set([f for f in tries if f in FILES][:1])
    return found


def test_every_listed_file_exists():
    for name in ORDER:
        assert any(p == name or p.startswith(name) for p in FILES), name


@pytest.mark.parametrize("path", [p for p in FILES if not is_above(p)])
def test_files_import_only_from_lower_layers(path):
    own = layer(path)
    for other in files_imported(path):
        within = ORDER[own].endswith("/") and layer(other) == own
        assert layer(other) < own or within, f"{path} imports {other}"


@pytest.mark.parametrize("path", sorted(ARRAYS_ONLY))
def test_rules_and_actions_depend_on_arrays_only(path):
    assert files_imported(path) <= ARRAYS_ONLY


@pytest.mark.parametrize("path", FILES)
def test_no_private_module_of_jax_or_optax_is_imported(path):
    for name in imported(path):
        assert not name.startswith(("jax._src", "optax._src", "jaxlib")), name
    assert "._src" not in FILES[path].read_text()


# The plots of a report; only `report` imports them, when it is called.
NAMES = ("_axes", "_panels", "_signal_panels", "pictures")
PICTURES = {f"diagnosis/{name}.py" for name in NAMES}


@pytest.mark.parametrize("path", [p for p in FILES if not p.startswith("demo/")])
def test_only_jax_optax_and_numpy_are_needed(path):
    allowed = {"jax", "numpy", "optax", "optclip", *sys.stdlib_module_names}
    if path in PICTURES:
        allowed.add("matplotlib")
    assert {name.split(".")[0] for name in imported(path)} <= allowed


def test_importing_optclip_does_not_import_the_diagnosis():
    program = (
        "import sys, optax; before = set(sys.modules); import optclip; "
        "print(*(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    new = done.stdout.split()
    late = ("optclip.diagnosis", "optclip.demo", "jax.extend", "matplotlib", "flax")
    assert not [name for name in new if name.startswith(late)]
    assert "optclip.clipping" in new


def test_tab_completion_shows_public_names_only():
    assert set(dir(optclip)) == {*optclip.__all__, "__version__"}
    for name in dir(optclip):
        getattr(optclip, name)


def test_optclip_clip_raises_an_error_naming_the_replacements():
    with pytest.raises(AttributeError, match=r"`optclip.clip_by_value`.*clip_by_rule"):
        optclip.clip  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'clop'"):
        optclip.clop  # noqa: B018
