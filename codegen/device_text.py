"""All that tells one kind of device from another, as text: measurements are kept by it."""

import functools
import os
from pathlib import Path

import torch

from graphopt.cost_models.calibrate import cpu_model


def cpu_text() -> str:
    """This machine's CPU: its model, processors, caches (of the first core), and torch's threads."""
    return f"{_processors()}, {torch.get_num_threads()} threads"


@functools.cache
def _processors() -> str:
    facts = [cpu_model(), *_facts(Path("/proc/cpuinfo")), f"{os.cpu_count()} processors"]
    return ", ".join([*facts, *_caches(Path("/sys/devices/system/cpu/cpu0/cache"))])


def _facts(file: Path) -> list[str]:
    """The numbers of the model, which its name may leave out."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    known = dict(reversed([line.split(":", 1) for line in lines if ":" in line]))
    rows = {key.strip(): value.strip() for key, value in known.items()}
    return [f"{key} {rows[key]}" for key in ("cpu family", "model", "stepping") if key in rows]


def _caches(folder: Path) -> list[str]:
    """`L1 Data 32K` and so on, as Linux tells them."""
    found = []
    for index in sorted(folder.glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:  # a virtual machine may hide some
            continue
        found.append(f"L{level} {kind} {size}")
    return found


@functools.lru_cache(maxsize=64)
def cuda_text(index: int, libraries: str) -> str:
    """A GPU by torch's number: name, compute capability, processors, memory, and CUDA's `libraries`."""
    facts = torch.cuda.get_device_properties(index)
    return (
        f"{facts.name}, compute capability {facts.major}.{facts.minor}, "
        f"{facts.multi_processor_count} processors, {facts.total_memory} bytes, {libraries}"
    )
