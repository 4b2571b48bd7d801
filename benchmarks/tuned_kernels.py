"""Generated CPU kernels as the rules launch them, beside the launches that measurement chose.

    python benchmarks/tuned_kernels.py [--dtypes float32] [--threads 1,2] [--rounds 15] [--only NAME]

The six kernels of `kernels_cpu.py`, on its inputs, with outputs that are given. A case has a process of
its own, which tunes the kernel, and then runs both launches in turn, round by round: other runs than
those that chose. Times are of one call, the median of the rounds: CPU time with one thread, wall time
with two. Compiled kernels are kept in `build/tuned_kernels`, choices are not.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import kernels_cpu
import torch
from harness import answer, note, spawned, stored, table, write
from torch import Tensor

from graphopt.codegen import regions
from graphopt.codegen.numba_cpu import NumbaKernel
from graphopt.codegen.region import Dtype, Region

TITLE = "Tuned CPU kernels"
NAME = "tuned_kernels"
FOLDER = Path(__file__).parent.parent / "build" / NAME
PEERS = ("default", "tuned")


def case(dtype: Dtype, name: str) -> tuple[Region, tuple[Any, ...]]:
    """A kernel of `kernels_cpu.py`, and its inputs in the order of the region's."""
    x: tuple[Tensor, ...] = kernels_cpu.cases(getattr(torch, dtype))[name]()[3]
    if name.startswith("RMSNorm"):
        return regions.rms_norm(dtype, True), (x[0], x[1], kernels_cpu.EPS, x[2])
    if name.startswith("cross-entropy"):
        gradient = "gradient" in name
        return regions.cross_entropy(dtype, gradient), (*x, -100, *([1 / len(x[1])] if gradient else []))
    if name.startswith("SwiGLU"):
        return regions.swiglu(dtype), x
    return regions.bias_gelu_residual(dtype, "tanh"), x


def run_case(dtype: Dtype, name: str, threads: int, rounds: int) -> dict[str, Any]:
    """One case in this process."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    region, inputs = case(dtype, name)
    for old in FOLDER.glob("*.tuned"):
        old.unlink()
    default, tuned = NumbaKernel(region, FOLDER), NumbaKernel(region, FOLDER)
    out = default(*inputs)
    default(*inputs, out=out)  # its launch is planned from now on
    begin = time.perf_counter()
    found = tuned.tune(*inputs, out=out)
    row: dict[str, Any] = {"seconds": time.perf_counter() - begin}
    row |= {"choice": found.chosen.beside(found.default), "measured": found.to_data()}
    runs = dict(zip(PEERS, (default, tuned), strict=True))
    clock = time.process_time if threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {peer: [] for peer in PEERS}
    for number in range(rounds + 2):
        for peer in PEERS if number % 2 else PEERS[::-1]:
            begin = clock()
            runs[peer](*inputs, out=out)
            if number >= 2:
                times[peer].append(clock() - begin)
    for peer, own in times.items():
        row[peer] = [1e3 * v for v in statistics.quantiles(own, n=4)]
    ratios = [a / b for a, b in zip(*times.values(), strict=True)]
    return {**row, "over default": statistics.quantiles(ratios, n=4)}


def shown(rows: list[dict[str, Any]]) -> str:
    """The table of all cases, and geometric means."""
    head = [
        "kernel",
        "dtype",
        "threads",
        "default, ms",
        "tuned, ms",
        "over default",
        "chosen",
        "tuning, s",
    ]
    cells = [
        [*(r[k] for k in ("kernel", "dtype", "threads")), *_cells(r), r["choice"], f"{r['seconds']:.1f}"]
        for r in rows
    ]
    groups = sorted({(r["dtype"], r["threads"]) for r in rows}, key=str)
    means = [
        [*group, f"{kernels_cpu.geometric(found):.2f}", f"{min(found):.2f}", f"{max(found):.2f}"]
        for group in groups
        if (found := [r["over default"][1] for r in rows if (r["dtype"], r["threads"]) == group])
    ]
    return (
        "Median ratios of the default's time to the tuned one's; above 1 the tuned launch is faster.\n\n"
        + table(["dtype", "threads", "geometric mean", "least", "most"], means)
        + "\n\nMedian (quartiles) of each.\n\n"
        + table(head, cells)
    )


def _cells(row: dict[str, Any]) -> list[str]:
    found = [row[peer] for peer in (*PEERS, "over default")]
    return [f"{middle:.2f} ({low:.2f}-{high:.2f})" for low, middle, high in found]


def main() -> None:
    """Measure what the options name, beside what was stored before."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtypes", default="float32")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="")
    parser.add_argument("--case", nargs=3)
    options = parser.parse_args()
    if options.case:
        dtype, threads, name = options.case
        answer(run_case(dtype, name, int(threads), options.rounds))
        return
    rows = stored(NAME, [])
    for dtype in options.dtypes.split(","):
        for threads in options.threads.split(","):
            for name in kernels_cpu.cases(torch.float32):
                if options.only in name:
                    found = one(dtype, threads, name, options.rounds)
                    rows = sorted([r for r in rows if key(r) != key(found)] + [found], key=key)
    write(NAME, TITLE, rows, shown(rows))


def one(dtype: str, threads: str, name: str, rounds: int) -> dict[str, Any]:
    """One case in a process of its own."""
    variables = {"OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads}
    arguments = ["--rounds", str(rounds), "--case", dtype, threads, name]
    found: dict[str, Any] = spawned(__file__, arguments, variables)
    note(f"{dtype} {threads} {name}: {found['choice']}")
    return {"kernel": name, "dtype": dtype, "threads": int(threads), **found}


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """The order of the table."""
    order = list(kernels_cpu.cases(torch.float32))
    return row["dtype"] != "float32", row["threads"], order.index(row["kernel"])


if __name__ == "__main__":
    main()
