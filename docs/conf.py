"""How Sphinx builds the site; works without a network."""

import os
import pathlib
import re
import shutil
import sys

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))

import methods_table  # noqa: E402

import optclip  # noqa: E402

project = "optclip"
author = "The optclip authors"
copyright = author
version = release = optclip.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_nb"]
exclude_patterns = ["_build", "_generated", "**.ipynb_checkpoints"]
nitpicky = False
default_role = "py:obj"

html_theme = "sphinx_book_theme"
html_title = "optclip"
html_static_path = ["_static"] if (HERE / "_static").is_dir() else []
html_css_files = ["style.css"]
html_show_copyright = False
html_show_sphinx = False
html_theme_options = {
    "show_navbar_depth": 2,
    "use_download_button": False,
    "navbar_persistent": [],
}

autodoc_typehints = "none"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
napoleon_custom_sections = [("Reference", "references")]
python_maximum_signature_line_length = 72

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
# The outputs stored in the notebooks are shown; tools/build_notebooks.py makes them.
nb_execution_mode = "off"

# Links to other projects need their inventories, so only where there is a network.
if os.environ.get("READTHEDOCS"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "jax": ("https://docs.jax.dev/en/latest", None),
        "optax": ("https://optax.readthedocs.io/en/latest", None),
    }


def write_tables(app, config):
    """Writes what is made from the code."""
    methods_table.write(HERE / "_generated")


def copy_notebooks(app, config):
    """Copies the notebooks beside the pages, where Sphinx finds them."""
    target = HERE / "notebooks"
    target.mkdir(exist_ok=True)
    sources = sorted((HERE.parent / "notebooks").glob("*.ipynb"))
    for old in target.glob("*.ipynb"):
        if old.name not in {source.name for source in sources}:
            old.unlink()
    for source in sources:
        copy = target / source.name
        if not copy.exists() or copy.read_bytes() != source.read_bytes():
            shutil.copyfile(source, copy)


def _escaped(line):
    """Escapes what reStructuredText would read as markup, outside of backticks."""
    parts = re.split(r"(``.*?``|`[^`]*`)", line)
    parts[::2] = [re.sub(r"([*|]|(?<=\w)_(?=\W|$))", r"\\\1", p) for p in parts[::2]]
    return "".join(parts)


def _cells(row):
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


def translate_docstring(app, what, name, obj, options, lines):
    """Turns the Markdown of docstrings (tables, literal signs) into reStructuredText.

    Docstrings are written to be read in an editor: tables with bars, `|x|` and `x * y`
    as they are.
    """
    out, example = [], False
    for number, line in enumerate(lines):
        indent = line[: len(line) - len(line.lstrip())]
        example = bool(line.strip()) and (example or line.lstrip().startswith(">>> "))
        if example:
            out.append(line)
        elif line.lstrip().startswith("| "):
            if set(line.strip()) <= set("| -"):
                continue
            if number == 0 or not lines[number - 1].lstrip().startswith("| "):
                out += [f"{indent}.. list-table::", f"{indent}   :header-rows: 1", ""]
            for at, cell in enumerate(_cells(line)):
                mark = "* -" if at == 0 else "  -"
                out.append(f"{indent}   {mark} {_escaped(cell)}")
        else:
            out.append(_escaped(line))
    lines[:] = out


def setup(app):
    """Registers the steps above; docstrings are translated before napoleon."""
    app.connect("config-inited", write_tables)
    app.connect("config-inited", copy_notebooks)
    app.connect("autodoc-process-docstring", translate_docstring, priority=400)
