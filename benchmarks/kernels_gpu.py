"""Generated CUDA kernels beside eager PyTorch and torch.compile, on one GPU.

    python benchmarks/kernels_gpu.py [--dtypes bfloat16,float32] [--columns 4096,..] [--only softmax]

Six kernels on tensors of 2**27 numbers, several times the second-level cache, as rows of 4096 to 65,536.
Bytes are those that a kernel has to move, each tensor once; the rate is beside that of a copy on the same
device, measured first. Seconds are of the device, between two events around one call, the median of the
rounds; peers run in turn, and all allocate their results anew. Errors are the largest of some rows,
against float64, over the largest value. Launch cost is wall time of a call on small tensors, while the
device is never waited for; and once more as a part of a CUDA graph, which has to see new inputs.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from harness import note, stored, table, write
from torch import Tensor

from graphopt.codegen import regions
from graphopt.codegen.cuda_form import Traits, moved_bytes
from graphopt.codegen.cuda_launch import CudaKernel, Runner
from graphopt.codegen.region import Region

TITLE = "Generated CUDA kernels"
NAME = "kernels_gpu"
PEERS = ("eager", "compiled", "graphopt")
NUMBERS = 2**27
COLUMNS = (4096, 8192, 16384, 32768, 65536)
EPS = 1e-6


@dataclass(frozen=True)
class Case:
    """One kernel: its region, the formula for the peers, and what both are called with."""

    name: str
    region: Region
    formula: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    given: tuple[Any, ...]  # to the generated kernel

    def runs(self, runner: Runner | None = None) -> dict[str, Callable[[], Any]]:
        """The peers as calls without arguments."""
        compiled = torch.compile(self.formula, dynamic=False)
        kernel = CudaKernel(self.region, runner)
        return {
            "eager": lambda: self.formula(*self.inputs),
            "compiled": lambda: compiled(*self.inputs),
            "graphopt": lambda: kernel(*self.given),
        }


def cases(dtype: torch.dtype, rows: int, columns: int, device: str) -> dict[str, Callable[[], Case]]:
    """Makers of the six, with `rows` x `columns` numbers in each tensor."""
    kind: Any = str(dtype).removeprefix("torch.")

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def norm() -> Case:
        x, residual, weight = random(rows, columns), random(rows, columns), random(columns)
        region, given = regions.rms_norm(kind, True), (x, residual, EPS, weight)
        return Case("RMSNorm + residual", region, _norm, (x, residual, weight), given)

    def layer_norm() -> Case:
        x, weight, bias = random(rows, columns), random(columns), random(columns)
        region, given = regions.layer_norm(kind), (x, EPS, weight, bias)
        return Case("LayerNorm", region, _layer_norm, (x, weight, bias), given)

    def softmax() -> Case:
        x = random(rows, columns)
        return Case("softmax", regions.softmax(kind), _softmax, (x,), (x,))

    def loss() -> Case:
        x, target = random(rows, columns), torch.randint(0, columns, (rows,), device=device)
        given = (x, target, -100, 1.0 / rows)
        region = regions.cross_entropy(kind, True)
        return Case("cross-entropy + gradient", region, _loss, (x, target), given)

    def swiglu() -> Case:
        x, y = random(rows, columns), random(rows, columns)
        return Case("SwiGLU", regions.swiglu(kind), _swiglu, (x, y), (x, y))

    def gelu() -> Case:
        x, bias, y = random(rows, columns), random(columns), random(rows, columns)
        region = regions.bias_gelu_residual(kind, "tanh")
        return Case("bias + GELU + residual", region, _gelu, (x, bias, y), (x, bias, y))

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
    """Seconds between two events around one call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
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
    seconds: dict[str, list[float]] = {peer: [] for peer in PEERS}
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
    runs = {**case.runs(), "one addition": lambda: x + x}
    found = {}
    for peer, run in runs.items():
        for _ in range(50):
            run()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        found[peer] = 1e6 * (time.perf_counter() - begin) / calls
        torch.cuda.synchronize()
    graph = captured(lambda: [runs["graphopt"]() for _ in range(100)])
    found["graphopt in a CUDA graph"] = 1e4 * min(device_seconds(graph.replay) for _ in range(20))
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
    head = ["kernel", "dtype", "columns", *(f"{peer}, us" for peer in PEERS)]
    head += ["graphopt, GB/s", "of a copy", "over eager", "over compiled"]
    head += ["error eager", "compiled", "graphopt"]
    cells = []
    for r in found["rows"]:
        ours = r["graphopt"]
        cells.append(
            [
                *(r[k] for k in ("kernel", "dtype", "columns")),
                *(f"{r[peer]['us']:.0f}" for peer in PEERS),
                f"{ours['bytes_per_s'] / 1e9:.0f}",
                f"{ours['bytes_per_s'] / copy:.0%}",
                *(f"{r[peer]['us'] / ours['us']:.2f}" for peer in PEERS[:2]),
                *(f"{r['errors'][peer]:.1e}" for peer in PEERS),
            ]
        )
    launches = [[k, f"{v:.1f}"] for k, v in found["launch_us"].items()]
    return (
        f"{found['device']}; a copy moves {copy / 1e9:.0f} GB/s. Above 1, graphopt is faster.\n\n"
        + table(head, cells)
        + "\n\nOne call, us:\n\n"
        + table(["RMSNorm + residual, 8 x 4096", "us"], launches)
        + f"\n\nA replayed CUDA graph sees new inputs: {'yes' if found['graph'] else 'NO'}.\n"
    )


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
