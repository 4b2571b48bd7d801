"""How long planning takes, by the size of the graph: deep models, and irregular random graphs.

    python benchmarks/planning.py [--layers 6,12,24,48,96] [--nodes 1000,3000,10000]

Models are GPT-2s of growing depth, traced on fake tensors; a random graph has operators that read one to
three of the latest values, now and then one from far back, and the backward of that. Each is planned with
no budget, at half of its plain peak, and for its least peak. The growth is the slope of the straight line
through the logarithms of operators and seconds.
"""

import argparse
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from harness import fresh, note, setup, table, write

from graphopt import Checkpoint, zoo
from graphopt.cleanup import cleaned
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import get_device
from graphopt.cost_models.memory import NO_PRODUCER, Dataflow, Operator, Value
from graphopt.errors import PlanError
from graphopt.passes.checkpoint_choice import everything, step_of
from graphopt.passes.nested_choice import choose_best
from graphopt.tangents import unlikely_tangents, without_gradients
from graphopt.tracing import trace

BUDGETS = (None, 0.5, "min")
BARS = {"12 layers": 2.0, "96 layers": 6.0, "10000 random operators": 30.0}
WINDOW, LONG_SKIP = 12, 0.02


def deep(layers: int) -> tuple[int, float, dict[str, float | None]]:
    """Operators, seconds of tracing, and seconds of each plan of a GPT-2 with `layers` layers."""
    model = zoo.build("gpt2", "small", {"n_layer": layers})
    batch = zoo.example_batch("gpt2", model, 4, 64)
    begin = time.perf_counter()
    program = cleaned(trace(model, batch, training=True))
    traced = time.perf_counter() - begin
    unlikely = unlikely_tangents(program)
    program = without_gradients(program, unlikely) if unlikely else program
    costs = Costs.of(program, get_device("h100"))
    plans = {str(b): seconds_of(lambda b=b: Checkpoint(memory=b).plan(program, costs)) for b in BUDGETS}
    return sum(1 for _ in program.operators()), traced, plans


def scattered(operators: int, seed: int = 0) -> tuple[int, float | None, dict[str, float | None]]:
    """The same of an irregular graph with about as many operators."""
    flow = irregular(operators, seed)
    plain = flow.static_bytes + step_of(flow, everything(flow)).peak_bytes
    budgets = {"None": (False, None), "0.5": (False, plain // 2), "min": (True, None)}
    plans = {
        name: seconds_of(lambda light=least, b=budget: choose_best(flow, light, b))
        for name, (least, budget) in budgets.items()
    }
    return len(flow.operators), None, plans


def seconds_of(call: Callable[[], Any]) -> float | None:
    """Seconds of one call; None where the budget cannot be met."""
    begin = time.perf_counter()
    try:
        call()
    except PlanError:
        return None
    return time.perf_counter() - begin


def irregular(count: int, seed: int) -> Dataflow:
    """A step of about `count` operators without repeated structure."""
    draw = random.Random(seed)
    values = [Value(1000, NO_PRODUCER, "x")]
    operators: list[Operator] = []

    def add(reads: list[int], nbytes: int, backward: bool) -> int:
        values.append(Value(nbytes, len(operators), f"v{len(values)}"))
        made = len(values) - 1
        name, read = f"op{len(operators)}", tuple(dict.fromkeys(reads))
        seconds = draw.uniform(0.1, 2.0)
        scratch = draw.choice([0, 0, 0, 500])
        operators.append(
            Operator(name, read, (made,), (), seconds, 0, scratch, backward, backward, True, None)
        )
        return made

    forward: list[tuple[list[int], int]] = []
    for _ in range(count // 3):
        recent = range(max(0, len(values) - WINDOW), len(values))
        reads = [len(values) - 1, *draw.sample(recent, min(len(recent), draw.randint(0, 2)))]
        if draw.random() < LONG_SKIP:
            reads.append(draw.randrange(len(values)))
        forward.append((reads, add(reads, draw.randint(1, 20) * 100, False)))
    loss = len(values) - 1
    gradients: dict[int, int] = {}
    for reads, made in reversed(forward):
        incoming = [gradients[made]] if made in gradients else []
        for value in dict.fromkeys(reads):
            needed = draw.sample([*reads, made], draw.randint(0, 2))
            part = add([*incoming, *needed], values[value].nbytes, True)
            before = gradients.get(value)
            gradients[value] = part if before is None else add([before, part], values[value].nbytes, True)
    return Dataflow(
        tuple(operators),
        tuple(values),
        {o.name: o.writes for o in operators},
        frozenset(o.name for o in operators if o.backward),
        (loss,),
        (gradients[0],),
        values[0].nbytes,
    )


def text_of(rows: list[dict[str, Any]]) -> str:
    """The table, the growth of each family, and the bars."""
    head = ["graph", "operators", "trace s", "no budget s", "half s", "min s"]
    shown = [[r["graph"], r["operators"], r["trace"], *r["plans"].values()] for r in rows]
    lines = [table(head, shown)]
    for family in ("layers", "random operators"):
        mine = [r for r in rows if r["graph"].endswith(family)]
        sizes = np.log([r["operators"] for r in mine])
        slopes = []
        for budget in map(str, BUDGETS):
            seconds = [r["plans"][budget] for r in mine]
            if len(mine) > 1 and None not in seconds:
                slopes.append(f"{np.polyfit(sizes, np.log(seconds), 1)[0]:.2f} at {budget}")
        lines.append(f"Growth with operators, {family}: " + ", ".join(slopes) + ".")
    for row in rows:
        if row["graph"] in BARS:
            took = max(s for s in row["plans"].values() if s is not None)
            bar = BARS[row["graph"]]
            lines.append(f"{row['graph']}: at most {took:.1f} s (bar {bar:.0f} s: {took <= bar}).")
    return "\n\n".join(lines)


def main() -> None:
    """Every size, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", default="6,12,24,48,96")
    parser.add_argument("--nodes", default="1000,3000,10000")
    options = parser.parse_args()
    setup()
    rows = []
    sizes = [(deep, "layers", int(n)) for n in options.layers.split(",") if n]
    sizes += [(scattered, "random operators", int(n)) for n in options.nodes.split(",") if n]
    deep(2)  # compiles what is compiled once
    for measured, family, count in sizes:
        fresh()
        operators, traced, plans = measured(count)
        rows.append(
            {"graph": f"{count} {family}", "operators": operators, "trace": traced, "plans": plans}
        )
        note(str(rows[-1]))
    write("planning", "Time of planning", rows, text_of(rows))


if __name__ == "__main__":
    main()
