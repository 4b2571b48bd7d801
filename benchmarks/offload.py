"""Keep, recompute or offload: a training step at some budgets, on channels of three speeds.

    python benchmarks/offload.py [--depth 8] [--rows 1024] [--rates 2e8,1e9,4e9] [--budgets 0.7,0.5,0.35]

One thread. The model is a stack of linear maps with norms and dropout. For each budget, a share of the
plain peak, and each speed of the channel (bytes/s): `Checkpoint` alone, offloading alone, and both. Peaks
are predicted and measured by the allocator's events, parameters and inputs left out. Times are
predictions, of a roofline and two channels, relative to the step that keeps everything.
"""

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from harness import megabytes, note, setup, table, write
from torch import Tensor, nn

import graphopt
from graphopt import Checkpoint, OffloadSaved, PlanError
from graphopt.measurement import measure
from graphopt.passes.base import Pass


class Stack(nn.Module):
    """Words (rows, width) through residual blocks to one number."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.wide = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(depth))
        self.narrow = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for norm, wide, narrow in zip(self.norms, self.wide, self.narrow, strict=True):
            x = x + F.dropout(narrow(F.gelu(wide(norm(x)))), 0.1)
        return x.square().mean()


def row(model: nn.Module, x: Tensor, share: float, way: str, pass_: Pass) -> dict[str, Any]:
    """The way's predicted and measured bytes, and the predicted time, split into its parts.

    Where no plan fits, only the least that one needs.
    """
    found: dict[str, Any] = {"budget": share, "way": way}
    model.zero_grad()
    ours = graphopt.optimize(model, passes=[pass_], device="cpu-generic")
    try:
        ours(x).backward()
    except PlanError as error:
        return found | {"least_bytes": error.reachable_bytes}
    model.zero_grad()
    record = ours._graphopt.log.records[-1]
    plan = record.steps[-1].plan
    exposed = getattr(plan, "exposed_seconds", 0.0) / plan.step_seconds
    recomputed = plan.recompute_seconds / plan.step_seconds
    return found | {
        "predicted_bytes": plan.peak_bytes - record.static_bytes,
        "measured_bytes": measure(lambda: ours(x).backward()).peak_bytes,
        "time": 1 + exposed + recomputed,
        "waiting": exposed,
        "recomputing": recomputed,
        "offloaded_bytes": getattr(plan, "offloaded_bytes", 0),
    }


def cells(r: dict[str, Any]) -> list[str]:
    """A row of the table."""
    start = [f"{r['budget']}", r["way"]]
    if "time" not in r:
        return [*start, "-", "-", "-", f"needs {megabytes(r['least_bytes'])} MB in all", "", ""]
    sizes = (megabytes(r[f"{key}_bytes"]) for key in ("predicted", "measured", "offloaded"))
    return [*start, *sizes, f"{r['time']:.3f}", f"{r['waiting']:.1%}", f"{r['recomputing']:.1%}"]


def main() -> None:
    """Writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--rates", default="2e8,1e9,4e9")
    parser.add_argument("--budgets", default="0.7,0.5,0.35")
    given = parser.parse_args()
    setup()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, x = Stack(given.depth, given.width), torch.randn(given.rows, given.width)
    rows = []
    for share in map(float, given.budgets.split(",")):
        rows.append(row(model, x, share, "Checkpoint", Checkpoint(memory=share)))
        for rate in map(float, given.rates.split(",")):
            for way, recompute in (("offload", False), ("both", True)):
                pass_ = OffloadSaved(memory=share, bytes_per_s=rate, recompute=recompute)
                rows.append(row(model, x, share, f"{way} at {rate / 1e9:g} GB/s", pass_))
                note(str(rows[-1]))
    head = [
        "budget",
        "way",
        "predicted MB",
        "measured MB",
        "to the file MB",
        "time",
        "waiting",
        "recomputing",
    ]
    text = (
        f"{given.depth} blocks of width {given.width}, {given.rows} rows. Parameters and inputs are left "
        "out of both peaks, but not of what a plan needs in all.\n\n"
    )
    data = {"rows": rows, "depth": given.depth, "width": given.width, "batch": given.rows}
    write("offload", "Keep, recompute or offload", data, text + table(head, map(cells, rows)))


if __name__ == "__main__":
    main()
