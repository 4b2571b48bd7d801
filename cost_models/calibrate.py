"""What this machine's CPU can do, measured in about two seconds and remembered.

The result is a `Device` whose rates are those that torch's own kernels reach here, so that a
roofline built on it predicts eager execution.
"""

import functools
import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from graphopt.cost_models.devices import Device

DEFAULT_CACHE = Path.home() / ".cache" / "graphopt"

# The half-precision products are smaller: a CPU without instructions for them needs 0.1 s for one.
MATMUL_SIDES = {
    torch.bfloat16: 512,
    torch.float16: 512,
    torch.float32: 1024,
    torch.float64: 1024,
}
# Beyond most second-level caches, and below the 32 MiB from which glibc maps every block afresh.
COPY_BYTES = 1 << 24
_BUDGET_S = 0.15


def calibrated_cpu(cache: Path | None = DEFAULT_CACHE) -> Device:
    """This machine's CPU as a `Device`: from the folder `cache`, or measured now.

    What is kept there holds for one CPU model, number of threads and version of torch. It is not
    kept where other load may have disturbed it: the machine was busy, or two rounds differ. With
    None nothing is kept.
    """
    key = f"{cpu_model()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    path = None if cache is None else cache_file(cache, "cpu", key)
    known = None if path is None else read_json(path)
    if known is not None:
        rates = tuple((name, rate) for name, rate in known["flops_per_s"])
        return Device(**{**known, "flops_per_s": rates})
    idle = os.getloadavg()[0] < torch.get_num_threads()
    rounds = [_measure_rates() for _ in range(2)]
    device = _device({name: max(found[name] for found in rounds) for name in rounds[0]})
    if path is not None and idle and _agree(*rounds):
        write_json(path, asdict(device))
    return device


def _device(rates: dict[str, float]) -> Device:
    """The CPU with `rates` per second: copied bytes, ops, and operations by dtype."""
    rates = dict(rates)
    return Device(
        name="cpu",
        kind="cpu",
        memory_bytes=physical_memory_bytes(),
        bytes_per_s=rates.pop("copied bytes"),
        overhead_s=1 / rates.pop("ops"),
        flops_per_s=tuple(sorted(rates.items())),
        cores=os.cpu_count() or 1,
        source=f"measured: {cpu_model()}, {torch.get_num_threads()} threads",
    )


def _measure_rates() -> dict[str, float]:
    """Rates per second of matrix products, copies into fresh memory, and tiny ops."""
    with torch.no_grad():
        rates = {
            str(dtype).removeprefix("torch."): _matmul_flops_per_s(dtype, side)
            for dtype, side in MATMUL_SIDES.items()
        }
        return {**rates, "copied bytes": _copy_bytes_per_s(), "ops": _ops_per_s()}


def _agree(first: dict[str, float], second: dict[str, float]) -> bool:
    """True where no rate of two rounds differs by more than half."""
    return all(max(rate, second[name]) <= 1.5 * min(rate, second[name]) for name, rate in first.items())


def _matmul_flops_per_s(dtype: torch.dtype, side: int) -> float:
    """Operations per second of a square matrix product."""
    a = torch.full((side, side), 0.5, dtype=dtype)
    return 2 * side**3 / _least_seconds(functools.partial(torch.mm, a, a), _BUDGET_S)


def _copy_bytes_per_s() -> float:
    """Bytes read and written per second by a copy into a new tensor."""
    source = torch.ones(COPY_BYTES // 4)
    return 2 * COPY_BYTES / _least_seconds(source.clone, _BUDGET_S)


def _ops_per_s() -> float:
    """How many ops on one element run per second, one after the other."""
    one, count = torch.ones(1), 100

    def many() -> None:
        for _ in range(count):
            torch.ops.aten.mul.Tensor(one, one)

    return count / _least_seconds(many, _BUDGET_S / 4)


def _least_seconds(run: Callable[[], Any], budget_s: float) -> float:
    """The least time of the calls that fit into a budget, two at least; a first call warms up."""
    run()
    least, count, stop = float("inf"), 0, time.perf_counter() + budget_s
    while count < 2 or time.perf_counter() < stop:
        start = time.perf_counter()
        run()
        least, count = min(least, time.perf_counter() - start), count + 1
    return least


def physical_memory_bytes() -> int:
    """The memory of this machine, in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def cpu_model() -> str:
    """The CPU's name and widest vector instructions, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def cache_file(folder: Path, prefix: str, key: str) -> Path:
    """The file in `folder` that holds what was measured for `key`."""
    return folder / f"{prefix}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def read_json(path: Path) -> Any:
    """The content of a JSON file; None where there is none, or it was cut short."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file in one step; where the folder cannot be written, nothing is kept."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, suffix=".tmp", delete=False
        ) as file:
            file.write(json.dumps(content))
        os.replace(file.name, path)
    except OSError:
        return
