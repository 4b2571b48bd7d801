"""How far plans are from the least recomputation that any plan under the same budget could do.

    python benchmarks/gap.py [--models gpt2,bert] [--layers 2] [--limit 600]

Each cell is a model of the zoo with few layers and a budget: the seconds that the default search
recomputes, those after a search that starts from the solution of the bound, and the bound itself, which
an integer programme proves for the order of the backward that the plan has. "left" is what the programme
left open after `--limit` seconds; such a bound is lower than it need be, so that the gap is too large.
Seconds are of the cost model (H100), the step's own left out.
"""

import argparse
import statistics
import time
from typing import Any

from harness import fresh, note, replaced, setup, stored, table, write

from graphopt import Checkpoint, PlanError, zoo
from graphopt.cleanup import cleaned
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import get_device
from graphopt.passes.checkpoint_choice import step_of
from graphopt.passes.ilp_bound import gap, recompute_lower_bound
from graphopt.passes.nested_choice import choose_best
from graphopt.program import Program
from graphopt.tangents import unlikely_tangents, without_gradients
from graphopt.tracing import trace

MODELS = ("gpt2", "llama", "bert", "t5", "resnet50", "swin", "mixtral", "whisper")
BUDGETS = (0.9, 0.75, 0.6, 0.5, "min")
BAR_MEDIAN, BAR_WORST = 0.05, 0.15
DEPTHS = {
    "gpt2": ("n_layer",),
    "t5": ("num_layers",),
    "whisper": ("encoder_layers", "decoder_layers"),
    "resnet50": (),
    "swin": (),
}


def program_of(name: str, layers: int) -> Program:
    """The step of a small model with `layers` layers, as it is planned."""
    depth = DEPTHS.get(name, ("num_hidden_layers",))
    model = zoo.build(name, "small", dict.fromkeys(depth, layers))
    program = cleaned(
        trace(model, zoo.example_batch(name, model, 4, 64 if name == "whisper" else 128), training=True)
    )
    unlikely = unlikely_tangents(program)
    return without_gradients(program, unlikely) if unlikely else program


def cell(name: str, program: Program, costs: Costs, memory: float | str, limit: float) -> dict[str, Any]:
    """One model at one budget."""
    row: dict[str, Any] = {"model": name, "budget": str(memory)}
    begin = time.perf_counter()
    try:
        plan = Checkpoint(memory=memory, solver="graph").plan(program, costs)
    except PlanError as error:
        return row | {"error": str(error)}
    searched = time.perf_counter() - begin
    flow = costs.dataflow(program)
    budget = plan.budget_bytes or plan.peak_bytes
    choice = choose_best(flow, memory == "min", plan.budget_bytes)
    assert abs(step_of(flow, choice).recompute_seconds - plan.recompute_seconds) < 1e-12
    begin = time.perf_counter()
    bound = recompute_lower_bound(flow, choice.order, budget, limit)
    return row | {
        "operators": len(flow.operators),
        "peak_bytes": plan.peak_bytes,
        "step_seconds": plan.step_seconds,
        "recompute_seconds": plan.recompute_seconds,
        "bound_seconds": bound.seconds,
        "gap": gap(plan.recompute_seconds, bound),
        "closed": bound.closed,
        "left": bound.gap,
        "plan_seconds": searched,
        "bound_took_seconds": time.perf_counter() - begin,
    }


def text_of(rows: list[dict[str, Any]]) -> str:
    """The table, how far the bars are met, and the budgets that cannot be."""
    head = [
        "model",
        "budget",
        "operators",
        "recomputed",
        "bound",
        "gap",
        "closed",
        "left",
        "plan s",
        "bound s",
    ]
    shown = [
        [
            r["model"],
            r["budget"],
            r["operators"],
            f"{r['recompute_seconds'] / r['step_seconds']:.2%}",
            f"{r['bound_seconds'] / r['step_seconds']:.2%}",
            f"{r['gap']:.1%}",
            r["closed"],
            f"{r['left']:.1%}",
            r["plan_seconds"],
            r["bound_took_seconds"],
        ]
        for r in rows
        if "error" not in r
    ]
    gaps = [r["gap"] for r in rows if r.get("closed")]
    unreachable = [f"{r['model']} at {r['budget']}: {r['error']}" for r in rows if "error" in r]
    summary = f"{len(gaps)} of {len(shown)} cells closed"
    if gaps:
        median, worst = statistics.median(gaps), max(gaps)
        summary += (
            f"; gap in the median {median:.1%} (bar {BAR_MEDIAN:.0%}: {median <= BAR_MEDIAN}), "
            f"at worst {worst:.1%} (bar {BAR_WORST:.0%}: {worst <= BAR_WORST})"
        )
    return "\n\n".join([table(head, shown), summary + ".", *unreachable])


def main() -> None:
    """Every named model; rows of others stay."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for each bound")
    options = parser.parse_args()
    setup()
    device = get_device("h100")
    rows: list[dict[str, Any]] = stored("gap", [])
    for name in options.models.split(","):
        fresh()
        program = program_of(name, options.layers)
        costs = Costs.of(program, device)
        found = [cell(name, program, costs, b, options.limit) for b in BUDGETS]
        for row in found:
            note(
                f"{name} {row['budget']}: {row.get('gap', row.get('error'))}, closed {row.get('closed')}"
            )
        rows = replaced(rows, found)
        write("gap", f"Gap to the lower bound, {options.limit:.0f} s a cell", rows, text_of(rows))


if __name__ == "__main__":
    main()
