"""What graphopt costs besides the step: importing, tracing, planning, and one call.

    python benchmarks/overheads.py [--layers 24] [--runs 7]

Tracing is `graphopt.trace` (Dynamo, AOTAutograd and the Program); planning is the pass, its
application and the checks. Both are medians of three runs after one on a small model, which loads
what is loaded on first use.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from harness import Size, build, fresh, note, prediction, run_step, setup, table, write
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop

import graphopt
from graphopt import zoo

BAR_CALL_MICROSECONDS = 100
BAR_PLANNING_SHARE = 0.25
BAR_IMPORT_SECONDS = 1.0
BUDGETS = (None, 0.6, "min")
REPEATS = 3
CALLS = 2000


def large(name: str, layers: int) -> Size:
    """A deep and narrow model: many nodes, little arithmetic."""
    if name == "gpt2":
        return Size({"n_layer": layers, "n_embd": 128, "n_head": 4, "n_positions": 128}, 4, 128)
    widths = {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4}
    return Size({"num_hidden_layers": layers, **widths}, 4, 128)


def planning(name: str, layers: int) -> list[dict[str, Any]]:
    """Seconds to trace and to plan a model with that many layers."""
    small, small_batch = build(name, large(name, 1))
    graphopt.trace(small, small_batch)
    for budget in (None, "min"):
        run_step(graphopt.optimize(small, memory=budget), small_batch)
    model, batch = build(name, large(name, layers))
    traced, nodes = [], 0
    for _ in range(REPEATS):
        fresh()
        begin = time.perf_counter()
        program = graphopt.trace(model, batch)
        traced.append(time.perf_counter() - begin)
        nodes = sum(1 for _ in program.operators())
    rows = []
    for budget in BUDGETS:
        thought, first = [], []
        for _ in range(REPEATS):
            fresh()
            ours = graphopt.optimize(model, memory=budget)
            begin = time.perf_counter()
            run_step(ours, batch)
            first.append(time.perf_counter() - begin)
            thought.append(prediction(ours)["plan_seconds"])
        row: dict[str, Any] = {"model": f"{name}, {layers} layers", "nodes": nodes}
        row |= {"budget": str(budget), "trace_seconds": statistics.median(traced)}
        row |= {"plan_seconds": statistics.median(thought)}
        row |= {"first_step_seconds": statistics.median(first)}
        row["share"] = row["plan_seconds"] / row["trace_seconds"]
        rows.append(row)
        note(str(row))
    return rows


# --- importing ---------------------------------------------------------------------------------


def imports(runs: int) -> dict[str, float]:
    """Median seconds of fresh processes, one of each kind in turn."""
    kinds = {
        "import torch": "import torch",
        "import torch, graphopt": "import torch, graphopt",
        "import torch; from graphopt import optimize": "import torch; from graphopt import optimize",
        "import graphopt": "import graphopt",
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(runs):
        for kind, code in kinds.items():
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            seconds[kind].append(time.perf_counter() - begin)
    return {kind: statistics.median(times) for kind, times in seconds.items()}


# --- one call ----------------------------------------------------------------------------------


def calls() -> list[dict[str, Any]]:
    """Microseconds of one call of a tiny layer, by what wraps it."""
    layer, x = nn.Linear(4, 4), torch.ones(2, 4)
    plain = aot_autograd(fw_compiler=boxed_nop, bw_compiler=boxed_nop)
    ways: dict[str, Any] = {
        "torch.compile, no-op backend": torch.compile(layer, backend=lambda graph, _: graph.forward),
        "torch.compile, AOTAutograd with no-op compilers": torch.compile(layer, backend=plain),
        "graphopt.optimize": graphopt.optimize(layer, device="cpu-generic"),
    }
    rows = []
    for mode in ("no_grad", "forward", "forward and backward"):
        found = _in_turn({way: _call(module, x, mode) for way, module in ways.items()})
        base = found["torch.compile, AOTAutograd with no-op compilers"]
        noop = found["torch.compile, no-op backend"]
        for way, microseconds in found.items():
            over = {"over_aot": microseconds - base, "over_noop": microseconds - noop}
            rows.append({"mode": mode, "way": way, "microseconds": microseconds, **over})
    return rows


def _call(module: Any, x: torch.Tensor, mode: str) -> Callable[[], Any]:
    def no_grad() -> Any:
        with torch.no_grad():
            return module(x)

    def both() -> Any:
        return module(x).sum().backward()

    return {"no_grad": no_grad, "forward": lambda: module(x), "forward and backward": both}[mode]


def _in_turn(ways: dict[str, Callable[[], Any]], rounds: int = 9) -> dict[str, float]:
    """Median over rounds of the microseconds per call; the ways take turns."""
    for run in ways.values():
        for _ in range(20):
            run()
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, run in ways.items():
            begin = time.perf_counter()
            for _ in range(CALLS // rounds):
                run()
            times[way].append((time.perf_counter() - begin) / (CALLS // rounds) * 1e6)
    return {way: statistics.median(found) for way, found in times.items()}


# --- the report --------------------------------------------------------------------------------


def report(data: dict[str, Any]) -> str:
    """Three tables, with the bars."""
    head = ["model", "budget", "operators", "trace s", "plan s", "first step s", "plan/trace"]
    keys = ("model", "budget", "nodes", "trace_seconds", "plan_seconds", "first_step_seconds")
    rows = [
        [*(r[key] for key in keys), r["share"], r["share"] < BAR_PLANNING_SHARE] for r in data["planning"]
    ]
    parts = [f"## Tracing and planning (median of {REPEATS})"]
    parts += [table([*head, f"< {BAR_PLANNING_SHARE}"], rows)]
    base = data["imports"]["import torch"]
    over = [
        [kind, seconds, None if kind == "import graphopt" else seconds - base]
        for kind, seconds in data["imports"].items()
    ]
    met = over[2][2] < BAR_IMPORT_SECONDS
    parts += [f"## Importing (median of {data['runs']} fresh processes; bar 1 s: {met})"]
    parts += [table(["code", "seconds", "over import torch"], over)]
    parts += [f"## One call of a 4x4 linear layer (bar {BAR_CALL_MICROSECONDS} us over a no-op)"]
    keys = ("microseconds", "over_noop", "over_aot")
    rows = [[r["mode"], r["way"], *(f"{r[key]:.0f}" for key in keys)] for r in data["calls"]]
    head = ["mode", "wrapped by", "microseconds", "over no-op backend", "over AOTAutograd no-op"]
    return "\n\n".join([*parts, table(head, rows)])


def main() -> None:
    """Importing first, in fresh processes; then calls, then the large models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    setup()
    assert {"gpt2", "llama"} <= set(zoo.names())
    data: dict[str, Any] = {"runs": options.runs, "imports": imports(options.runs)}
    note(str(data["imports"]))
    data["calls"] = calls()
    data["planning"] = planning("gpt2", options.layers) + planning("llama", options.layers)
    write("overheads", "Overheads", data, report(data))


if __name__ == "__main__":
    main()
