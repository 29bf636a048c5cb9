"""The code in README.md and docs/*.md runs, block by block, as a reader would run it.

A block is fenced as ```` ```python ````; all blocks of a file share one namespace.
``no-run`` in the info string (```` ```python no-run ````) excludes a block, and
``needs-wandb`` excludes it if that package is missing. If a ```` ```text ```` block
follows directly, the code must print its content, except for numbers and spaces.
"""

import importlib
import importlib.util
import inspect
import pathlib
import re

import jax
import numpy as np
import pytest

import optclip

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(
    r"^(?P<fence>`{3,})(?P<info>[^\n`]*)\n(?P<code>.*?)^(?P=fence)[ ]*$", re.M | re.S
)


def left_out(word):
    """Returns whether this word of an info string excludes the block."""
    needs = word.removeprefix("needs-")
    return word == "no-run" or (needs != word and not importlib.util.find_spec(needs))


def blocks(text):
    """Returns (line of the fence, code, shown output) of each block to run."""
    found, fences = [], [*FENCE.finditer(text)]
    for match, after in zip(fences, [*fences, None][1:], strict=True):
        info = match["info"].split()
        if info[:1] == ["python"] and not any(map(left_out, info)):
            below = after and not text[match.end() : after.start()].strip()
            shown = after["code"] if below and after["info"] == "text" else None
            found.append((text.count("\n", 0, match.start()) + 1, match["code"], shown))
    return found


def words(text):
    """Returns the words of printed text, with numbers replaced by a placeholder."""
    return re.sub(r"\d[\d.e+-]*", "0", text.replace("-", "")).split()


def numbers(text):
    """Returns the numbers in printed text."""
    found = re.findall(r"-?\d+\.?\d*(?:e[+-]?\d+)?%?", text)
    return [float(x.rstrip("%")) for x in found]


WITH_CODE = [page for page in PAGES if blocks(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_code_blocks_run_in_order(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for line, code, shown in blocks(page.read_text(encoding="utf-8")):
        capsys.readouterr()
        # Blank lines before the code make tracebacks show the line of the page.
        with jax.numpy_rank_promotion("allow"):  # the default for readers
            exec(compile("\n" * line + code, str(page), "exec"), namespace)
        if shown is not None:
            printed = capsys.readouterr().out
            assert words(printed) == words(shown), f"line {line}"
            # Rounding differs between versions and machines.
            np.testing.assert_allclose(
                numbers(printed), numbers(shown), rtol=0.1, err_msg=f"line {line}"
            )


def test_blocks_are_found_with_line_numbers_and_no_run_blocks_are_excluded():
    none = "```python no-run\n1 / 0\n```\n```console\n$ ls\n```\n"
    lacking = "```python needs-no_such_package\nimport no_such_package\n```\n"
    here = "```python needs-optax\nimport optax\n```\n"
    text = f"a\n```python\nx = 1\n```\n{none}{lacking}{here}"
    assert [code for _, code, _ in blocks(text)] == ["x = 1\n", "import optax\n"]
    assert blocks(text)[0] == (2, "x = 1\n", None)


def test_output_below_a_block_is_found_and_compared_without_numbers():
    text = "```python\nprint(2)\n```\n\n```text\n2\n```\n\nb\n\n```text\n3\n```\n"
    assert blocks(text) == [(1, "print(2)\n", "2\n")]
    assert words("a layer0:  2.5e+06,\n -1.5 b") == words("a layer0: 1e-3, 2 b")
    assert words("grows by 2") != words("falls by 2")


def test_readme_shows_code_that_runs():
    assert ROOT / "README.md" in WITH_CODE


MODULES = [
    optclip, optclip.actions, optclip.diagnosis, optclip.norms, optclip.rules,
    optclip.scopes, optclip.states,
]  # fmt: skip


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_every_public_name_is_on_the_api_page(module):
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    modules = {m.__name__ for m in MODULES}
    names = {f"{module.__name__}.{name}" for name in module.__all__} - modules
    described = set(re.findall(r"^(?:\.\. py:\w+::|  ) (optclip\.\S+)", page, re.M))
    assert names <= described, f"not in docs/api.md: {sorted(names - described)}"


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_signatures_are_readable(module):
    """Annotations are short text, and defaults show how they are made."""
    for name in module.__all__:
        if inspect.isfunction(function := getattr(module, name)):
            shown = str(inspect.signature(function))
            assert "jaxlib" not in shown, name
            assert "layout=" not in shown, name


LINK = re.compile(r"\]\((?!https?://|mailto:|#)([^)#\s]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_names_in_prose_exist(page):
    """The site links each `optclip.name` to its page."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for name in re.findall(r"`(optclip(?:\.\w+)+)(?:\(.*?\))?`", text):
        found = optclip
        for part in name.split(".")[1:]:
            assert hasattr(found, part), f"{page.name}: there is no `{name}`"
            found = getattr(found, part)


def test_every_page_has_a_description():
    rows = (ROOT / "docs" / "descriptions.txt").read_text(encoding="utf-8").splitlines()
    pages = {page.stem for page in PAGES if page.parent != ROOT} - {"changelog"}
    assert {row.split(": ")[0] for row in rows[1:]} == pages


INVENTORIES = {
    row.split()[0]
    for file in (ROOT / "docs" / "inventories").glob("*.txt")
    for row in file.read_text(encoding="utf-8").splitlines()[1:]
}
# Modules, methods and options without a separate page.
UNLINKED = {
    "flax.nnx", "flax.nnx.Optimizer.update", "flax.serialization", "jax.config.update",
    "jax.extend", "jax.numpy.inf", "optax.MaskedNode", "optax.losses",
}  # fmt: skip
SHORT = {"jnp.": "jax.numpy.", "lax.": "jax.lax."}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_names_of_other_libraries_in_prose_have_a_link(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    names = r"`((?:jax|jnp|lax|optax|flax|numpy)(?:\.\w+)+)(?:\(.*?\))?`"
    for name in re.findall(names, text):
        start = next((x for x in SHORT if name.startswith(x)), "")
        full = SHORT.get(start, "") + name.removeprefix(start)
        assert full in INVENTORIES | UNLINKED, f"{page.name}: {name}"


@pytest.mark.parametrize("name", sorted(INVENTORIES))
def test_names_of_other_libraries_exist(name):
    package, *parts = name.split(".")
    found = importlib.import_module(package)
    for at, part in enumerate(parts):
        if not hasattr(found, part):
            importlib.import_module(".".join([package, *parts[: at + 1]]))
        found = getattr(found, part)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_that_pages_link_to_exist(page):
    """Unlike Sphinx, this also checks links to other files of the repository."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        # Building the site copies the notebooks next to the pages.
        copied = page.parent != ROOT and target.startswith("notebooks/")
        file = (ROOT if copied else page.parent) / target
        assert file.exists(), f"{page.name} links to {target}"


def held_out():
    """Returns the rows of the table over all held-out tasks, by method."""
    text = (ROOT / "benchmarks/results/training/held_out.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.split("\n\n")[0].split("\n")]
    fields = rows[0]
    return {row[0]: dict(zip(fields, row, strict=True)) for row in rows[2:]}


@pytest.mark.parametrize("page", ["README.md", "docs/choosing.md"])
def test_claims_about_stabilize_are_the_figures_of_the_benchmark(page):
    text = (ROOT / page).read_text()
    rows = held_out()
    own, _ = rows["stabilize"]["own best rate"].split()
    high, _ = rows["stabilize"]["worst higher rate"].split()
    one, _ = rows["clip_by_global_norm(1)"]["own best rate"].split()
    for figure in (own, high, one):
        assert figure in text
    others = [
        float(row["worst higher rate"].split()[0])
        for name, row in rows.items()
        if not name.startswith("stabilize")
    ]
    assert min(others) > 10
    assert "above 10" in " ".join(text.replace("\n", " ").split())
