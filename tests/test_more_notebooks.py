"""The other half of the notebooks, in a file of their own: files are what runs side by side."""

from pathlib import Path

import pytest

from notebooks import NOTEBOOKS, execute


@pytest.mark.parametrize("path", NOTEBOOKS[1::2], ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path) -> None:
    notebook = execute(path, tmp_path)
    assert any(cell.outputs for cell in notebook.cells if cell.cell_type == "code"), "nothing is shown"
