"""The notebooks: as they are in git, and that they run; `test_more_notebooks.py` runs the other half."""

import json
import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from notebooks import NOTEBOOKS, ROOT, execute


def strip_module() -> ModuleType:
    spec = spec_from_file_location("strip", ROOT / "notebooks" / "strip.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", NOTEBOOKS[::2], ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path) -> None:
    notebook = execute(path, tmp_path)
    pictures = [cell for cell in notebook.cells if cell.source.rpartition("\n")[2].startswith("SVG(")]
    assert all(len(cell.outputs) == 1 for cell in pictures), "a picture comes alone"
    assert any(cell.outputs for cell in notebook.cells if cell.cell_type == "code"), "nothing is shown"


def test_the_kernel_imports_this_checkout_and_fails_with_the_error_of_a_cell(tmp_path: Path) -> None:
    where = f"import graphopt\nassert graphopt.__file__ == {str(ROOT / 'graphopt/__init__.py')!r}"
    cells = [nbformat.v4.new_code_cell(text) for text in (where, "raise ValueError('of the cell')")]
    path = tmp_path / "wrong.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    with pytest.raises(CellExecutionError, match="of the cell") as caught:
        execute(path, tmp_path)
    assert caught.value.ename == "ValueError"


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) >= 7
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"{n:02d}" for n in range(1, len(NOTEBOOKS) + 1)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_stripped(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text == strip_module().stripped(text), "run: make notebooks"
    assert not re.search(r"/(home|tmp|root|Users|work)/", text), "a path of one machine"
    cells = json.loads(text)["cells"]
    assert cells[0]["cell_type"] == "markdown" and cells[0]["source"][0].startswith("# ")
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert sum("assert " in source for source in code) >= 3, "it checks what it claims"


def test_stripping_takes_outputs_away() -> None:
    cell = nbformat.v4.new_code_cell("1 + 1", execution_count=3, metadata={"collapsed": True})
    cell.outputs = [nbformat.v4.new_output("stream", text="2")]
    dirty = nbformat.v4.new_notebook(
        cells=[cell], metadata={"kernelspec": {"display_name": "Mine", "name": "mine"}}
    )
    module = strip_module()
    clean = nbformat.reads(module.stripped(nbformat.writes(dirty)), as_version=4)
    assert clean.cells[0].outputs == [] and clean.cells[0].execution_count is None
    assert clean.cells[0].metadata == {} and clean.cells[0].source == "1 + 1"
    assert clean.metadata == module.METADATA
    first, second = (module.stripped(nbformat.writes(dirty)) for _ in range(2))
    assert first == second == module.stripped(first)
