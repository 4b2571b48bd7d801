"""Tests with several processes: a worker script beside the tests, and what its ranks join."""

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent.parent


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python on this checkout, one thread to a process; a failed assertion where it fails."""
    run = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run


def found_by(worker: str, folder: Path, *arguments: str) -> Any:
    """What the script `worker` of this folder writes to `folder`, given last, as results.json."""
    run_python(str(Path(__file__).with_name(f"{worker}.py")), *arguments, str(folder))
    return json.loads((folder / "results.json").read_text())


def join(rank: int, folder: str, ranks: int = 2) -> None:
    """Make this process a rank of a gloo group that meets in `folder`."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    wait = timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=wait)


def leave(rank: int, folder: str, found: Any) -> NoReturn:
    """End this rank; rank 0 writes what it `found` to results.json first.

    The process ends at once: gloo's threads may still let go of tensors, and torch aborts where one
    of them does so while the interpreter is being torn down.
    """
    if rank == 0:
        Path(folder, "results.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)
