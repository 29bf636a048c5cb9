"""The code in README.md and docs/*.md runs, block by block, as a reader would run it.

A block is fenced as ```` ```python ````; all blocks of a file share one namespace.
``no-run`` in the info string (```` ```python no-run ````) leaves a block out.
"""

import pathlib
import re

import pytest

import optclip

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(
    r"^(?P<fence>`{3,})(?P<info>[^\n`]*)\n(?P<code>.*?)^(?P=fence)[ ]*$", re.M | re.S
)


def blocks(text):
    """Returns (line of the fence, code) of each block that is to be run."""
    found = []
    for match in FENCE.finditer(text):
        info = match["info"].split()
        if info[:1] == ["python"] and "no-run" not in info:
            found.append((text.count("\n", 0, match.start()) + 1, match["code"]))
    return found


WITH_CODE = [page for page in PAGES if blocks(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_code_blocks_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for line, code in blocks(page.read_text(encoding="utf-8")):
        # Blank lines before the code make tracebacks show the line of the page.
        exec(compile("\n" * line + code, str(page), "exec"), namespace)


def test_blocks_are_found_with_their_lines_and_no_run_is_left_out():
    left_out = "```python no-run\n1 / 0\n```\n```console\n$ ls\n```\n"
    text = f"a\n```python\nx = 1\n```\n{left_out}"
    assert blocks(text) == [(2, "x = 1\n")]


def test_readme_shows_code_that_runs():
    assert ROOT / "README.md" in WITH_CODE


MODULES = [optclip, optclip.actions, optclip.norms, optclip.rules, optclip.scopes]


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_every_public_name_is_on_the_api_page(module):
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    modules = {m.__name__ for m in MODULES}
    names = {f"{module.__name__}.{name}" for name in module.__all__} - modules
    described = set(re.findall(r"^\.\. (?:auto|py:)\w+:: (\S+)", page, re.M))
    assert names <= described, f"not in docs/api.md: {sorted(names - described)}"
