"""Generated CUDA kernels beside eager PyTorch, torch.compile and kernels in Triton, on one GPU.

    python benchmarks/kernels_gpu.py [--dtypes bfloat16,float32] [--columns 4096,..] [--only softmax]

Six kernels on tensors of 2**27 numbers, several times the second-level cache, as rows of 4096 to 65,536.
Bytes are those that a kernel has to move, each tensor once; the rate is beside that of a copy on the same
device, measured first. Seconds are of the device, between two events around one call, the median of the
rounds; a pause before them lets the host run ahead, so that what a launch costs there is not in them.
Peers run in turn, and all allocate their results anew. The kernels in Triton are `kernels_triton.py`.
Errors are the largest of some rows, against float64, over the largest value. Launch cost is wall time of
a call on small tensors, while the device is never waited for; and once more as a part of a CUDA graph,
which has to see new inputs.
"""

import argparse
import importlib.util
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from harness import note, stored, table, write
from kernel_launches import launches
from torch import Tensor

from graphopt.codegen import regions
from graphopt.codegen.cuda_form import Traits, moved_bytes
from graphopt.codegen.cuda_launch import CudaKernel, cuda_kernel
from graphopt.codegen.cuda_runner import Runner
from graphopt.codegen.region import Region

TITLE = "Generated CUDA kernels"
NAME = "kernels_gpu"
PEERS = ("eager", "compiled", "triton", "graphopt")
NUMBERS = 2**27
COLUMNS = (4096, 8192, 16384, 32768, 65536)
EPS = 1e-6
PAUSE_CYCLES = 400_000  # some 0.2 ms
COPY_BAR, LAUNCH_BAR_US = 0.85, 6.0


@dataclass(frozen=True)
class Case:
    """One kernel: its region, the formula for the peers, and what both are called with.

    `twin` is the name of the same in kernels_triton.py, which also takes the numbers `more`.
    """

    name: str
    region: Region
    formula: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    given: tuple[Any, ...]  # to the generated kernel
    twin: str
    more: tuple[float, ...] = ()

    def runs(self, runner: Runner | None = None) -> dict[str, Callable[[], Any]]:
        """The peers as calls without arguments."""
        compiled = torch.compile(self.formula, dynamic=False)
        kernel = CudaKernel(self.region, runner)
        found = {
            "eager": lambda: self.formula(*self.inputs),
            "compiled": lambda: compiled(*self.inputs),
            "graphopt": lambda: kernel(*self.given),
        }
        if has_triton():
            import kernels_triton

            twin = getattr(kernels_triton, self.twin)
            found["triton"] = lambda: twin(*self.inputs, *self.more)
        return {peer: found[peer] for peer in PEERS if peer in found}


def has_triton() -> bool:
    """Whether the kernels in Triton can run here."""
    return importlib.util.find_spec("triton") is not None


def cases(dtype: torch.dtype, rows: int, columns: int, device: str) -> dict[str, Callable[[], Case]]:
    """Makers of the six, with `rows` x `columns` numbers in each tensor."""
    kind: Any = str(dtype).removeprefix("torch.")

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def norm() -> Case:
        x, residual, weight = random(rows, columns), random(rows, columns), random(columns)
        region, given = regions.rms_norm(kind, True), (x, residual, EPS, weight)
        return Case("RMSNorm + residual", region, _norm, (x, residual, weight), given, "norm", (EPS,))

    def layer_norm() -> Case:
        x, weight, bias = random(rows, columns), random(columns), random(columns)
        region, given = regions.layer_norm(kind), (x, EPS, weight, bias)
        return Case("LayerNorm", region, _layer_norm, (x, weight, bias), given, "layer_norm", (EPS,))

    def softmax() -> Case:
        x = random(rows, columns)
        return Case("softmax", regions.softmax(kind), _softmax, (x,), (x,), "softmax")

    def loss() -> Case:
        x, target = random(rows, columns), torch.randint(0, columns, (rows,), device=device)
        given = (x, target, -100, 1.0 / rows)
        region = regions.cross_entropy(kind, True)
        return Case("cross-entropy + gradient", region, _loss, (x, target), given, "loss", (1.0 / rows,))

    def swiglu() -> Case:
        x, y = random(rows, columns), random(rows, columns)
        return Case("SwiGLU", regions.swiglu(kind), _swiglu, (x, y), (x, y), "swiglu")

    def gelu() -> Case:
        x, bias, y = random(rows, columns), random(columns), random(rows, columns)
        region = regions.bias_gelu_residual(kind, "tanh")
        return Case("bias + GELU + residual", region, _gelu, (x, bias, y), (x, bias, y), "gelu")

    makers = (norm, layer_norm, softmax, loss, swiglu, gelu)
    return {maker.__name__: maker for maker in makers}


def _norm(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, EPS), total


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


def _softmax(x: Tensor) -> Any:
    return x.softmax(-1)


def _loss(logits: Tensor, target: Tensor) -> Any:
    """The loss of each row, and the gradient of their mean."""
    log_p = torch.log_softmax(logits.float() if logits.dtype != torch.float64 else logits, -1)
    loss = -log_p.gather(1, target[:, None]).squeeze(1)
    hot = torch.arange(logits.shape[1], device=logits.device) == target[:, None]
    return loss, ((log_p.exp() - hot.to(log_p.dtype)) / len(target)).to(logits.dtype)


def _swiglu(gate: Tensor, up: Tensor) -> Any:
    return F.silu(gate) * up


def _gelu(x: Tensor, bias: Tensor, residual: Tensor) -> Any:
    return F.gelu(x + bias, approximate="tanh") + residual


def error(case: Case, found: Any, rows: int = 64) -> float:
    """The largest relative error of the first results of some rows."""
    few = [x[:rows] if x.dim() == 2 or not x.is_floating_point() else x for x in case.inputs]
    exact = case.formula(*(x.double() if x.is_floating_point() else x for x in few))
    results = [r if isinstance(r, Tensor) else r[0] for r in (found, exact)]
    wrong = (results[0][:rows].double() - results[1]).abs().max() / results[1].abs().max()
    return float(wrong)


# --- measuring ---------------------------------------------------------------------------------


def device_seconds(run: Callable[[], Any]) -> float:
    """Seconds between two events around one call, which is given to the device while it waits."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(PAUSE_CYCLES)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def copy_bytes_per_s(rounds: int) -> float:
    """What the device copies, reads and writes counted."""
    x = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    seconds = [device_seconds(lambda: y.copy_(x)) for _ in range(rounds + 3)][3:]
    return 2 * x.numel() / statistics.median(seconds)


def measured(case: Case, rounds: int) -> dict[str, Any]:
    """Microseconds, rates and errors of all peers."""
    runs = case.runs()
    nbytes = moved_bytes(Traits(case.region), tuple(case.inputs[0].shape))
    row: dict[str, Any] = {"bytes": nbytes, "errors": {k: error(case, run()) for k, run in runs.items()}}
    seconds: dict[str, list[float]] = {peer: [] for peer in runs}
    for number in range(rounds + 3):
        for peer, run in runs.items():
            found = device_seconds(run)
            if number >= 3:
                seconds[peer].append(found)
    for peer, values in seconds.items():
        middle = statistics.median(values)
        row[peer] = {"us": 1e6 * middle, "least_us": 1e6 * min(values), "bytes_per_s": nbytes / middle}
    return row


def launch_cost(calls: int = 2000) -> dict[str, float]:
    """Microseconds of a call on small tensors: on the host, and as one kernel of a CUDA graph."""
    case = cases(torch.bfloat16, 8, 4096, "cuda")["norm"]()
    x = case.inputs[0]
    ours = launches("cuda", cuda_kernel)
    peers = {f"RMSNorm + residual, {k}": run for k, run in case.runs().items() if k != "graphopt"}
    runs = {**ours, **peers, "one addition": lambda: x + x}
    found = {}
    for name, run in runs.items():
        for _ in range(50):
            run()
        rounds = []
        for _ in range(5):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(calls // 5):
                run()
            rounds.append(1e6 * (time.perf_counter() - begin) / (calls // 5))
        found[name] = statistics.median(rounds)
    torch.cuda.synchronize()
    graph = captured(lambda: [ours["RMSNorm + residual, out="]() for _ in range(100)])
    found["in a CUDA graph"] = 1e4 * min(device_seconds(graph.replay) for _ in range(20))
    return found


def captured(run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of what `run` launches."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def graph_sees_new_inputs() -> bool:
    """Whether a captured kernel computes again when its graph is replayed."""
    x = torch.randn(64, 4096, device="cuda")
    out, kernel = torch.empty_like(x), CudaKernel(regions.softmax("float32"))
    kernel(x, out=(out,))
    graph = captured(lambda: kernel(x, out=(out,)))
    x.normal_()
    graph.replay()
    torch.cuda.synchronize()
    return torch.allclose(out, x.softmax(-1), rtol=1e-5, atol=1e-7)


# --- results -----------------------------------------------------------------------------------


def shown(found: dict[str, Any]) -> str:
    """The tables of a run."""
    copy = found["copy_bytes_per_s"]
    peers = [peer for peer in PEERS if any(peer in r for r in found["rows"])]
    head = ["kernel", "dtype", "columns", *(f"{peer}, us" for peer in peers)]
    head += ["graphopt, GB/s", "of a copy", *(f"over {peer}" for peer in peers[:-1])]
    head += [f"error {peer}" for peer in peers]
    cells = []
    for r in found["rows"]:
        ours = r["graphopt"]
        cells.append(
            [
                *(r[k] for k in ("kernel", "dtype", "columns")),
                *(f"{r[peer]['us']:.0f}" if peer in r else "" for peer in peers),
                f"{ours['bytes_per_s'] / 1e9:.0f}",
                f"{ours['bytes_per_s'] / copy:.0%}",
                *(f"{r[peer]['us'] / ours['us']:.2f}" if peer in r else "" for peer in peers[:-1]),
                *(f"{r['errors'][peer]:.1e}" if peer in r else "" for peer in peers),
            ]
        )
    costs = [[k, f"{v:.1f}"] for k, v in found["launch_us"].items()]
    return (
        f"{found['device']}; a copy moves {copy / 1e9:.0f} GB/s. Above 1, graphopt is faster.\n\n"
        + table(["all kernels, dtypes and sizes", "geometric mean", "bar", "met"], bars(found))
        + "\n\n"
        + table(head, cells)
        + "\n\nOne call on small tensors, us:\n\n"
        + table(["call", "us"], costs)
        + f"\n\nA replayed CUDA graph sees new inputs: {'yes' if found['graph'] else 'NO'}.\n"
    )


def bars(found: dict[str, Any]) -> list[list[str]]:
    """What is aimed at, and what was found: geometric means over all rows; the dearest launch."""
    rows, lines = found["rows"], []
    shares = [r["graphopt"]["bytes_per_s"] / found["copy_bytes_per_s"] for r in rows]
    aims = [("bandwidth, of a copy", shares, COPY_BAR, f">= {COPY_BAR:.0%}", "{:.1%}")]
    for peer in PEERS[:-1]:
        ratios = [r[peer]["us"] / r["graphopt"]["us"] for r in rows if peer in r]
        aims.append((f"speed-up over {peer}", ratios, 1.0, "> 1", "{:.2f}"))
    for name, values, bar, shown_bar, form in aims:
        if not values:
            lines.append([name, "not measured", shown_bar, "unknown"])
            continue
        mean = math.exp(statistics.fmean(map(math.log, values)))
        met = "yes" if mean > bar or mean == bar == COPY_BAR else "NO"
        lines.append([name, form.format(mean), shown_bar, met])
    kinds = ("out=", "fused call")
    dearest = max((v for k, v in found["launch_us"].items() if k.endswith(kinds)), default=math.nan)
    met = "yes" if dearest < LAUNCH_BAR_US else "NO"
    return [*lines, ["dearest launch, us", f"{dearest:.1f}", f"< {LAUNCH_BAR_US:.0f}", met]]


def main() -> None:
    """Measure what the options name, beside what was stored before."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--columns", default=",".join(map(str, COLUMNS)))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("kernels_gpu: there is no CUDA device here, and nothing was measured")
    torch.manual_seed(0)
    found: dict[str, Any] = stored(NAME, {"rows": []})
    found |= {
        "device": torch.cuda.get_device_name(),
        "copy_bytes_per_s": copy_bytes_per_s(options.rounds),
    }
    found |= {"launch_us": launch_cost(), "graph": graph_sees_new_inputs()}
    for dtype in options.dtypes.split(","):
        for columns in map(int, options.columns.split(",")):
            makers = cases(getattr(torch, dtype), NUMBERS // columns, columns, "cuda")
            for name, make in makers.items():
                if options.only not in name:
                    continue
                torch._dynamo.reset()
                case = make()
                row = {"kernel": case.name, "dtype": dtype, "columns": columns}
                rows = [r for r in found["rows"] if any(r[k] != v for k, v in row.items())]
                row |= measured(case, options.rounds)
                note(str(row))
                found["rows"] = sorted(
                    [*rows, row], key=lambda r: (r["kernel"], r["dtype"], r["columns"])
                )
                del case
    write(NAME, TITLE, found, shown(found))


if __name__ == "__main__":
    main()
