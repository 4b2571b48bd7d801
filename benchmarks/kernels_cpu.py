"""Generated CPU kernels beside eager PyTorch and Inductor's C++.

    python benchmarks/kernels_cpu.py [--dtypes float32,bfloat16] [--threads 1,2] [--heaps reused,fresh]

Six kernels. Peers of a case run in one process and in turn, round by round; times are of one call, the
median of the rounds: CPU time with one thread, wall time with more. Peers: the library operators of eager
mode, and the same formulas under `torch.compile` (the fused loss and gradient is written out for it, in
one graph). All peers allocate their results anew in each call. Heap "fresh": glibc's defaults, by which
memory for a large tensor comes from the system and costs page faults. Heap "reused": memory that was
freed is used again (`MALLOC_MMAP_MAX_=0`, no trimming), as by given `out=` buffers. A case has a process
of its own. Errors are the largest, against float64, over the largest value.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from harness import answer, note, spawned, stored, table, write
from torch import Tensor

from graphopt import kernels

TITLE = "Generated CPU kernels"
NAME = "kernels_cpu"
PEERS = ("eager", "inductor", "graphopt")
HEAPS = {
    "fresh": {},
    "reused": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "68719476736"},
}
# Bars: geometric means of the ratios to eager and Inductor, and the least ratio to Inductor.
BARS = {"float32": (2.0, 1.3), "bfloat16": (None, 1.5)}
LEAST = 0.95
EPS = 1e-6

Case = tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]


def _norm(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, EPS), total


def _loss(logits: Tensor, target: Tensor) -> Any:
    return F.cross_entropy(logits, target)


def _loss_and_gradient(logits: Tensor, target: Tensor) -> Any:
    logits = logits.detach().requires_grad_()
    loss = F.cross_entropy(logits, target)
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def _loss_and_gradient_written_out(logits: Tensor, target: Tensor) -> Any:
    log_p = torch.log_softmax(logits.float(), -1)
    loss = -log_p.gather(1, target[:, None]).mean()
    columns = torch.arange(logits.shape[1])
    hot = (columns == target[:, None]).float()
    return loss.to(logits.dtype), ((log_p.exp() - hot) / len(target)).to(logits.dtype)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _gelu(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return F.gelu(x + bias, approximate="tanh") + residual


def cases(dtype: torch.dtype) -> dict[str, Callable[[], Case]]:
    """Makers of the six: eager, what Inductor compiles, ours, and the inputs."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    def norm(rows: int, columns: int) -> Case:
        inputs = (random(rows, columns), random(rows, columns), random(columns))
        return _norm, _norm, lambda x, r, w: kernels.rms_norm(x, w, EPS, r), inputs

    def loss(rows: int, columns: int, gradient: bool) -> Case:
        inputs = (random(rows, columns), torch.randint(0, columns, (rows,)))
        if gradient:
            written = _loss_and_gradient_written_out
            return _loss_and_gradient, written, kernels.cross_entropy_with_gradient, inputs
        return _loss, _loss, kernels.cross_entropy, inputs

    def gelu(rows: int, columns: int) -> Case:
        inputs = (random(rows, columns), random(columns), random(rows, columns))
        return _gelu, _gelu, lambda x, b, r: kernels.bias_gelu_residual(x, b, r, "tanh"), inputs

    return {
        "RMSNorm + residual 4096x1024": lambda: norm(4096, 1024),
        "RMSNorm + residual 8192x4096": lambda: norm(8192, 4096),
        "cross-entropy 2048x32000": lambda: loss(2048, 32000, False),
        "cross-entropy + gradient 2048x32000": lambda: loss(2048, 32000, True),
        "SwiGLU 4096x2816": lambda: (
            _swiglu,
            _swiglu,
            kernels.swiglu,
            (random(4096, 2816), random(4096, 2816)),
        ),
        "bias + GELU + residual 4096x4096": lambda: gelu(4096, 4096),
    }


def errors(found: Any, exact: Any) -> float:
    """The largest relative error of several results."""
    pairs = [(found, exact)] if isinstance(found, Tensor) else zip(found, exact, strict=True)
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs)


def measured(case: Case, rounds: int) -> dict[str, Any]:
    """Medians and quartiles of all peers, in milliseconds, and their errors."""
    eager, written, ours, inputs = case
    runs = dict(zip(PEERS, (eager, torch.compile(written, dynamic=False), ours), strict=True))
    exact = eager(*(x.double() if x.is_floating_point() else x for x in inputs))
    row: dict[str, Any] = {"errors": {k: errors(run(*inputs), exact) for k, run in runs.items()}}
    del exact
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {peer: [] for peer in PEERS}
    for number in range(rounds + 2):
        for peer, run in runs.items():
            begin = clock()
            run(*inputs)
            if number >= 2:
                seconds[peer].append(clock() - begin)
    for peer, found in seconds.items():
        low, _, high = statistics.quantiles(found, n=4)
        row[peer] = [1e3 * v for v in (statistics.median(found), low, high, min(found))]
    for peer in PEERS[:2]:
        pairs = zip(seconds[peer], seconds["graphopt"], strict=True)
        row[f"over {peer}"] = statistics.median(a / b for a, b in pairs)
    return row


def run_case(dtype: str, name: str, threads: int, rounds: int) -> dict[str, Any]:
    """One case in this process."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    with torch.no_grad():
        case = cases(getattr(torch, dtype))[name]()
    return measured(case, rounds)


def geometric(values: list[float]) -> float:
    """The geometric mean."""
    return statistics.geometric_mean(values)


def shown(rows: list[dict[str, Any]]) -> str:
    """Tables of all cases, and the geometric means beside the bars."""
    head = ["kernel", "dtype", "threads", "heap"]
    head += [f"{peer}, ms" for peer in PEERS] + ["over eager", "over Inductor"]
    head += ["error eager", "Inductor", "graphopt"]
    cells = [[*(r[k] for k in ("kernel", "dtype", "threads", "heap")), *_cells(r)] for r in rows]
    means = []
    groups = sorted({(r["dtype"], r["threads"], r["heap"]) for r in rows}, reverse=True)
    for group in groups:
        own = [r for r in rows if (r["dtype"], r["threads"], r["heap"]) == group]
        found = [geometric([r[f"over {peer}"] for r in own]) for peer in PEERS[:2]]
        bars = BARS[group[0]]
        met = [
            f"{v:.2f}" + ("" if b is None else f" (bar {b})") for v, b in zip(found, bars, strict=True)
        ]
        least = min(r["over inductor"] for r in own)
        means.append([*group, *met, f"{least:.2f} (bar {LEAST})"])
    mean_head = ["dtype", "threads", "heap", "over eager", "over Inductor", "least over Inductor"]
    return (
        "Geometric means of the median ratios; above 1 graphopt is faster.\n\n"
        + table(mean_head, means)
        + "\n\nMedian (quartiles) of each.\n\n"
        + table(head, cells)
    )


def _cells(row: dict[str, Any]) -> list[Any]:
    times = ["{:.2f} ({:.2f}-{:.2f})".format(*row[peer][:3]) for peer in PEERS]
    ratios = [f"{row[f'over {peer}']:.2f}" for peer in PEERS[:2]]
    return [*times, *ratios, *(f"{row['errors'][peer]:.1e}" for peer in PEERS)]


def main() -> None:
    """Measure what the options name, beside what was stored before."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--heaps", default="reused,fresh")
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
            for heap in options.heaps.split(","):
                for name in cases(torch.float32):
                    if options.only in name:
                        found = one(dtype, threads, heap, name, options.rounds)
                        rows = sorted([r for r in rows if key(r) != key(found)] + [found], key=key)
                write(NAME, TITLE, rows, shown(rows))


def one(dtype: str, threads: str, heap: str, name: str, rounds: int) -> dict[str, Any]:
    """One case in a process of its own."""
    variables = {**HEAPS[heap], "OMP_NUM_THREADS": threads}
    arguments = ["--rounds", str(rounds), "--case", dtype, threads, name]
    found: dict[str, Any] = spawned(__file__, arguments, variables)
    note(f"{dtype} {threads} {heap} {name}: {found}")
    return {"kernel": name, "dtype": dtype, "threads": int(threads), "heap": heap, **found}


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """The order of the tables."""
    order = list(cases(torch.float32))
    return row["dtype"] != "float32", row["threads"], row["heap"] != "reused", order.index(row["kernel"])


if __name__ == "__main__":
    main()
