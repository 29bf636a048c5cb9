"""Runs the notebooks and stores their outputs, with reproducible bytes.

The source of `notebooks/NN_name.ipynb` is `notebooks/NN_name.py` (jupytext's percent
format). With --check nothing is written: each source is run, and the check fails if
that run fails or if the cells of the notebook differ from its source.
"""

import argparse
import os
import pathlib
import sys
import time

import jupytext
import nbclient
import nbformat

FOLDER = pathlib.Path(__file__).parent.parent / "notebooks"
METADATA = {
    "kernelspec": {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    },
    "language_info": {"name": "python"},
}
SECONDS_A_CELL = 300


def read_source(path):
    """Returns the notebook of a source, with cell ids that do not change."""
    notebook = jupytext.read(path, fmt="py:percent")
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02d}"
        cell.metadata = nbformat.NotebookNode()
    return notebook


def run(notebook):
    """Runs all cells and removes what differs from one run to the next."""
    client = nbclient.NotebookClient(
        notebook,
        timeout=SECONDS_A_CELL,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,  # otherwise the output of a cell is sometimes split
        resources={"metadata": {"path": str(FOLDER)}},
    )
    client.execute()
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = nbformat.NotebookNode()
        # Text on stderr depends on the machine: driver warnings, progress bars.
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    return notebook


def cells_of(notebook):
    """Returns the cells as the author wrote them, without outputs."""
    return [(cell.cell_type, cell.source.rstrip("\n")) for cell in notebook.cells]


def check(source, notebook):
    """Returns what is wrong with the notebook that belongs to ``source``, or None."""
    path = source.with_suffix(".ipynb")
    if not path.exists():
        return f"{path.name} is missing"
    stored = nbformat.read(path, as_version=4)
    if cells_of(stored) != cells_of(notebook):
        return f"{path.name} has cells that differ from {source.name}"
    if any(c.cell_type == "code" and c.execution_count is None for c in stored.cells):
        return f"{path.name} has cells without outputs"
    return None


def main():
    """Builds or checks the given notebooks, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="01_first_clip ...; all by default")
    parser.add_argument("--check", action="store_true", help="run, but write nothing")
    options = parser.parse_args()

    # These settings give the same pictures and numbers on every machine.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"

    wrong = 0
    for source in sorted(FOLDER.glob("[0-9]*.py")):
        if options.names and source.stem not in options.names:
            continue
        start = time.monotonic()
        try:
            notebook = run(read_source(source))
            fault = check(source, notebook) if options.check else None
        except nbclient.exceptions.CellExecutionError as error:
            fault = f"{source.name} fails: {error}"
        if fault is not None:
            print(f"{fault}\nRun `make notebooks` and commit what it writes.")
            wrong += 1
            continue
        if not options.check:
            text = nbformat.writes(notebook, version=4) + "\n"
            source.with_suffix(".ipynb").write_text(text, encoding="utf-8")
        seconds = time.monotonic() - start
        print(f"{source.stem}: {'runs' if options.check else 'built'}, {seconds:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
