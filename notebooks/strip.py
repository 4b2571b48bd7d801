"""Notebooks as they are in git: without outputs, counts and what an editor left in them.

python notebooks/strip.py [FILE ...]   # all of this folder, if none is named
"""

import sys
from pathlib import Path

import nbformat

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def stripped(text: str) -> str:
    """The text of a notebook with its cells only, numbered; the same for the same cells."""
    notebook = nbformat.reads(text, as_version=4)
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number:02d}", nbformat.from_dict({})
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.validate(notebook)
    return nbformat.writes(notebook).rstrip("\n") + "\n"


if __name__ == "__main__":
    here = Path(__file__).parent
    for file in [Path(name) for name in sys.argv[1:]] or sorted(here.glob("*.ipynb")):
        file.write_text(stripped(file.read_text(encoding="utf-8")), encoding="utf-8")
