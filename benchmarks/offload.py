"""Keep, recompute or offload: a training step at some budgets, on channels of three speeds.

    python benchmarks/offload.py [--depth 8] [--rows 1024] [--rates 2e8,1e9,4e9] [--budgets 0.7,0.5,0.35]

One thread. The model is a stack of linear maps with norms and dropout. For each budget, a share of the
plain peak, and each speed of the channel (bytes/s): `Checkpoint` alone, offloading alone, and both. Peaks
are predicted and measured by the allocator's events, parameters and inputs left out. Times are
predictions, of a roofline and two channels, relative to the step that keeps everything.
"""

import argparse

import torch
import torch.nn.functional as F
from harness import table
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


def row(model: nn.Module, x: Tensor, way: str, pass_: Pass) -> tuple[str, ...]:
    """The way's predicted and measured MB, and the predicted time, split into its parts."""
    model.zero_grad()
    ours = graphopt.optimize(model, passes=[pass_], device="cpu-generic")
    try:
        ours(x).backward()
    except PlanError as error:
        reachable = error.reachable_bytes or 0
        return way, "-", "-", f"no: {reachable / 1e6:.1f} MB at least", "", ""
    model.zero_grad()
    record = ours._graphopt.log.records[-1]
    plan = record.steps[-1].plan
    measured = measure(lambda: ours(x).backward()).peak_bytes
    exposed = getattr(plan, "exposed_seconds", 0.0) / plan.step_seconds
    recomputed = plan.recompute_seconds / plan.step_seconds
    predicted = (plan.peak_bytes - record.static_bytes) / 1e6
    times = (f"{1 + exposed + recomputed:.3f}", f"{exposed:.1%}", f"{recomputed:.1%}")
    return way, f"{predicted:.2f}", f"{measured / 1e6:.2f}", *times


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--rates", default="2e8,1e9,4e9")
    parser.add_argument("--budgets", default="0.7,0.5,0.35")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, x = Stack(given.depth, given.width), torch.randn(given.rows, given.width)
    heads = ("budget, way", "predicted MB", "measured MB", "time", "waiting", "recomputing")
    rows = []
    for share in map(float, given.budgets.split(",")):
        rows.append(row(model, x, f"{share}, Checkpoint", Checkpoint(memory=share)))
        for rate in map(float, given.rates.split(",")):
            for way, recompute in (("offload", False), ("both", True)):
                pass_ = OffloadSaved(memory=share, bytes_per_s=rate, recompute=recompute)
                rows.append(row(model, x, f"{share}, {way} at {rate / 1e9:g} GB/s", pass_))
    print(table(heads, rows))


if __name__ == "__main__":
    main()
