"""Nested recomputation in deep models: how little memory it needs, and how much is recomputed for that.

    python benchmarks/nested.py [--models gpt2-24,gpt2-48,mlp-64]

Steps are traced on fake tensors, and their figures predicted (H100): nothing runs. "labels" are the plans
of `Checkpoint` before there was nesting, "graph" and "chain" what these solvers find. Peaks are of what a
step allocates besides gradients, parameters and inputs left out; budgets are shares of that with
everything kept. Recomputation is in forwards: its seconds by those of the forward.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from harness import fresh, megabytes, note, setup, table, write
from torch import nn

from graphopt import PlanError, zoo
from graphopt.cleanup import cleaned
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import get_device
from graphopt.cost_models.memory import Dataflow
from graphopt.passes.chain_solver import Choice
from graphopt.passes.checkpoint_choice import choose, everything, step_of, without_gradient_bytes
from graphopt.passes.nested_choice import choose_best, choose_nested
from graphopt.program import Program
from graphopt.tangents import unlikely_tangents, without_gradients
from graphopt.tracing import trace

SHARES: tuple[float | None, ...] = (0.5, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, None)
SOLVERS: dict[str, Callable[[Dataflow, bool, int | None], Choice]] = {
    "labels": choose,
    "graph": choose_best,
    "chain": choose_nested,
}
WIDTH, ROWS = 64, 4096


class ResidualMLP(nn.Module):
    """`depth` residual blocks: norm, a layer four times as wide, and back."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
            )
            for _ in range(depth)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The mean of the squares."""
        for block in self.blocks:
            x = x + block(x)
        return x.square().mean()


def program_of(name: str) -> Program:
    """The step of a model called `kind-layers`, without gradients that do not arrive."""
    kind, layers = name.split("-")
    if kind == "mlp":
        with torch.device("meta"):
            return cleaned(trace(ResidualMLP(int(layers)), torch.empty(ROWS, WIDTH), training=True))
    narrow = {"n_layer": int(layers), "n_embd": 128, "n_head": 4, "vocab_size": 1024, "n_positions": 256}
    model = zoo.build("gpt2", "small", narrow)
    program = cleaned(trace(model, zoo.example_batch("gpt2", model, 4, 256), training=True))
    unlikely = unlikely_tangents(program)
    return without_gradients(program, unlikely) if unlikely else program


def rows_of(name: str) -> list[dict[str, Any]]:
    """One row for each budget and solver."""
    program = program_of(name)
    flow = without_gradient_bytes(Costs.of(program, get_device("h100")).dataflow(program))
    plain = step_of(flow, everything(flow)).peak_bytes
    forward = sum(flow.operators[i].seconds for i in flow.forward)
    found = []
    for share in SHARES:
        for solver, solve in SOLVERS.items():
            budget = None if share is None else flow.static_bytes + int(share * plain)
            row: dict[str, Any] = {"model": name, "operators": len(flow.operators), "plain_bytes": plain}
            row |= {"budget": share, "solver": solver, "peak_bytes": None, "forwards": None}
            begin = time.perf_counter()
            try:
                step = step_of(flow, solve(flow, share is None, budget))
                row |= {"peak_bytes": step.peak_bytes, "forwards": step.recompute_seconds / forward}
            except PlanError as error:
                row["reachable_bytes"] = (error.reachable_bytes or 0) - flow.static_bytes
            row["plan_seconds"] = time.perf_counter() - begin
            found.append(row)
            note(str(row))
    return found


def text_of(rows: list[dict[str, Any]]) -> str:
    """One table for each model."""
    parts = []
    for name in dict.fromkeys(r["model"] for r in rows):
        mine = [r for r in rows if r["model"] == name]
        plain = mine[0]["plain_bytes"]
        parts.append(f"## {name}: {mine[0]['operators']} operators, plain peak {megabytes(plain)} MB")
        shown = []
        for share in SHARES:
            cells: list[Any] = ["min" if share is None else f"{share:.0%}"]
            for solver in SOLVERS:
                row = next(r for r in mine if r["budget"] == share and r["solver"] == solver)
                peak = row["peak_bytes"]
                cells += ["-" if peak is None else f"{peak / plain:.1%}", row["forwards"]]
                cells.append(f"{row['plan_seconds']:.2f}")
            shown.append(cells)
        head = [f"{solver} {what}" for solver in SOLVERS for what in ("peak", "forwards", "plan s")]
        parts.append(table(["budget", *head], shown))
    return "\n\n".join(parts)


def main() -> None:
    """Every model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="gpt2-24,gpt2-48,mlp-64")
    options = parser.parse_args()
    setup()
    rows_of("mlp-8")  # compiles what is compiled once
    rows = []
    for name in options.models.split(","):
        fresh()
        rows += rows_of(name)
    write("nested", "Nested recomputation in deep models", rows, text_of(rows))


if __name__ == "__main__":
    main()
