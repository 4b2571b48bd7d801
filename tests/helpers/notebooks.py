"""Notebooks executed from the first cell to the last, each in a kernel of its own."""

import json
import sys
from pathlib import Path

from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient import NotebookClient
from nbformat import NotebookNode, read

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECONDS = 300  # far more than a start or a cell takes


def execute(path: Path, folder: Path) -> NotebookNode:
    """The notebook with its outputs; CellExecutionError has the cell and its error.

    The kernel is this Python and imports this checkout. It works in `folder`, and sees no settings of
    the user's.
    """
    spec = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "the Python of the tests",
        "language": "python",
        "env": {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(folder / "ipython")},
    }
    place = folder / "kernels" / "python3"
    place.mkdir(parents=True)
    (place / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
    specs = KernelSpecManager(kernel_dirs=[str(place.parent)], ensure_native_kernel=False)
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs)
    notebook = read(path, as_version=4)
    where = {"metadata": {"path": str(folder)}}
    patience = {"timeout": SECONDS, "startup_timeout": SECONDS}
    client = NotebookClient(notebook, km=manager, resources=where, **patience)
    try:
        return client.execute()
    finally:  # a client that was given its manager leaves the kernel running
        run_sync(manager.shutdown_kernel)(now=True)
