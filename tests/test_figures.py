"""Figures of the README and the docs are those of committed results."""

import importlib.util
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location(
    "check_figures", ROOT / "tools" / "check_figures.py"
)
check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check)


@pytest.mark.parametrize("page", check.PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_figure_has_a_source(page):
    assert list(check.problems(page)) == []


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Writes a page, next to a result with a few numbers."""
    monkeypatch.setattr(check, "ROOT", tmp_path)
    monkeypatch.setattr(check, "RESULTS", tmp_path)
    table = "| optax | 1.834 | 119.2 MB |\n| found | 27 of 33 |\n"
    (tmp_path / "cost.md").write_text(f"{table}\nOn cpu, JAX 0.12.0, 2 cores.\n")
    (tmp_path / "nowhere.md").write_text(table)

    def problems(text):
        path = tmp_path / "page.md"
        path.write_text(text)
        return list(check.problems(path))

    return problems


COST = "<!-- source: cost.md -->"


@pytest.mark.parametrize("words", [
    f"It takes 1.83 times as long.\n{COST}\n",
    f"- an item\n- It takes 1.8 times as long, with 119 MB.\n  {COST}\n",
    f"| a | b |\n| --- | --- |\n| 27 of 33 | 183% |\n\n{COST}\n",
    "The default is 0.04.\n<!-- source: settings -->\n",
    "It needs Python 3.11 and JAX 0.6.1, and clips at `1.0`.\n",
    "```python\nx = 1.5\n```\n\nSee [this](page.md#1.5).\n",
])  # fmt: skip
def test_figures_with_a_source_are_accepted(page, words):
    assert page(words) == []


@pytest.mark.parametrize(("words", "message"), [
    ("It takes 1.83 times as long.\n", "page.md:1: no source for 1.83"),
    ("a\n\nb\nit is 20% off\n", "page.md:3: no source for 20%"),
    (f"- 9 of 10\n  {COST}\n", "page.md:1: 9 of 10 is not in cost.md"),
    (f"It takes 1.84.\n{COST}\n", "page.md:1: 1.84 is not in cost.md"),
    ("1.83\n<!-- source: none.md -->\n", "page.md:1: there is no result none.md"),
    ("1.83\n<!-- source: nowhere.md -->\n", "nowhere.md does not name its machine"),
])  # fmt: skip
def test_other_figures_are_reported(page, words, message):
    assert any(message in found for found in page(words)), page(words)
