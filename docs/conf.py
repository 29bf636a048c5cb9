"""How Sphinx builds the site; works without a network."""

import pathlib
import re
import shutil
import sys

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))

import methods_table  # noqa: E402
from docutils import nodes  # noqa: E402
from sphinx import addnodes  # noqa: E402
from sphinx.transforms.post_transforms import SphinxPostTransform  # noqa: E402
from sphinx.util.nodes import make_refnode  # noqa: E402

import optclip  # noqa: E402

project = "optclip"
author = "The optclip authors"
copyright = author
version = release = optclip.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "myst_nb",
]
templates_path = ["_templates"]
# A page per function, in api/, from the tables of api.md.
autosummary_generate = True
exclude_patterns = ["_build", "_generated", "**.ipynb_checkpoints"]
nitpicky = False
default_role = "py:obj"

html_theme = "sphinx_book_theme"
html_title = "optclip"
html_static_path = ["_static"] if (HERE / "_static").is_dir() else []
html_css_files = ["style.css"]
html_favicon = "_static/favicon.svg"
html_show_copyright = False
html_show_sphinx = False
html_theme_options = {
    "show_navbar_depth": 2,
    "use_download_button": False,
    "navbar_persistent": [],
}

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
# Types are shown by the names that the code gives them.
NAMED = {
    "Clip": "GradientTransformationExtraArgs",
    "jax.typing.ArrayLike": "ArrayLike",
    "optax.GradientTransformationExtraArgs": "GradientTransformationExtraArgs",
}
NAMES = ("ClipOption", "CurveName", "DType", "Mode", "NonfinitePolicy", "Order")
NAMES += ("RecordedNorm", "StackAxes", "Threshold")
autodoc_type_aliases = {name: name for name in NAMES} | NAMED
copybutton_prompt_text = r"\$ |>>> |\.\.\. "
copybutton_prompt_is_regexp = True
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

# Names of other libraries, and where they are documented. Each file in `inventories`
# holds the address of a site, and a line per name: the name and its page. They are kept
# here, so that the site builds without a network.
SHORT = {"jnp.": "jax.numpy.", "lax.": "jax.lax."}


def other_names():
    """Returns the address of the documentation of each name in `inventories`."""
    found = {}
    for file in sorted((HERE / "inventories").glob("*.txt")):
        first, *rows = file.read_text(encoding="utf-8").splitlines()
        site = first.removeprefix("# ")
        pairs = [row.split() for row in rows]
        found |= {name: f"{site}/{page}" for name, page in pairs}
    return found


def write_tables(app, config):
    """Writes what is made from the code."""
    methods_table.write(HERE / "_generated")


def copy_notebooks(app, config):
    """Copies the notebooks next to the pages, where Sphinx finds them."""
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


def tidy_signature(app, what, name, obj, options, signature, returns):
    """Shows types by their names, and default values as a user would write them."""

    def tidy(text):
        text = re.sub(r"TypeAliasForwardRef\('([\w.]+)'\)", r"\1", text)
        constants = getattr(obj, "__globals__", {})
        known = lambda m: m[1] + repr(constants.get(m[2], m[2]))  # noqa: E731
        return re.sub(r"(= ?)([A-Z][A-Z_]+)\b", known, text)

    return signature and tidy(signature), returns and tidy(returns)


class LinkCode(SphinxPostTransform):
    """Makes the name of a function or class in prose a link to its documentation."""

    default_priority = 5
    formats = ("html",)

    def run(self, **kwargs):
        """Replaces each literal that names a public object, or one of `inventories`."""
        objects, others = self.env.domains["py"].objects, other_names()
        for node in list(self.document.findall(nodes.literal)):
            if isinstance(node.parent, (nodes.reference, addnodes.pending_xref)):
                continue
            found = re.match(r"^([A-Za-z][\w.]*)(?:\(.*\))?$", node.astext())
            name = found and found[1]
            places = ("", "optclip.", "optclip.states.", "optclip.diagnosis.")
            name = next(
                (p + name for p in places if name and p + name in objects), None
            )
            if name is None and found:
                start = next((x for x in SHORT if found[1].startswith(x)), "")
                full = SHORT.get(start, "") + found[1].removeprefix(start)
                if full in others:
                    link = nodes.reference(
                        "", "", node.deepcopy(), internal=False, refuri=others[full]
                    )
                    node.replace_self(link)
                continue
            if name is None or objects[name].docname == self.env.docname:
                continue
            entry = objects[name]
            link = make_refnode(
                self.app.builder,
                self.env.docname,
                entry.docname,
                entry.node_id,
                node.deepcopy(),
                name,
            )
            node.replace_self(link)


def link_other(app, env, node, contnode):
    """Links a name in a docstring that is one of `inventories`."""
    address = other_names().get(node.get("reftarget", ""))
    if address is None:
        return None
    return nodes.reference("", "", contnode, internal=False, refuri=address)


def describe(app, pagename, templatename, context, doctree):
    """Adds the description of the page, for search engines."""
    rows = (HERE / "descriptions.txt").read_text(encoding="utf-8").splitlines()[1:]
    found = dict(row.split(": ", 1) for row in rows)
    if pagename in found:
        tag = f'<meta name="description" content="{found[pagename]}" />'
        context["metatags"] = context.get("metatags", "") + tag


def setup(app):
    """Registers the steps above; docstrings are translated before napoleon."""
    app.add_post_transform(LinkCode)
    app.connect("missing-reference", link_other)
    app.connect("html-page-context", describe)
    app.connect("config-inited", write_tables)
    app.connect("config-inited", copy_notebooks)
    app.connect("autodoc-process-signature", tidy_signature)
    app.connect("autodoc-process-docstring", translate_docstring, priority=400)
