"""Predicted against measured peaks of 17 models, run in eager mode or by Inductor.

    python benchmarks/prediction.py [--models gpt2,bert] [--compiler inductor]

One measured step for each model and budget, after two that warm up; the allocator's events repeat
exactly, so one run is enough. `ratio` compares what is above the static bytes (parameters, buffers,
batch), `total` the whole peak as it is predicted. Results of models that are not named are kept.
"""

import argparse
import time
from typing import Any

from harness import (
    build,
    fresh,
    megabytes,
    note,
    peak_of,
    prediction,
    replaced,
    setup,
    stored,
    table,
    write,
)

import graphopt
from graphopt import PlanError, zoo

BUDGETS = (None, 0.6, "min")
BAR = 0.02


def cell(name: str, budget: Any, compiler: str) -> dict[str, Any]:
    """One model at one budget: planned and measured."""
    fresh()
    model, batch = build(name)
    found: dict[str, Any] = {"model": name, "budget": str(budget)}
    try:
        ours = graphopt.optimize(model, memory=budget, compiler=compiler)
        measured = peak_of(ours, batch)
    except PlanError as error:
        found["budget"] = f"{budget} -> reachable"
        fresh()
        try:
            ours = graphopt.optimize(model, memory=error.reachable_bytes, compiler=compiler)
            measured = peak_of(ours, batch)
        except PlanError as second:
            return found | {"error": f"PlanError twice: {second}"}
    except Exception as error:
        return found | {"error": f"{type(error).__name__}: {str(error)[:200]}"}
    plan = prediction(ours)
    above = plan["predicted_bytes"] - plan["static_bytes"]
    total = measured.peak + plan["static_bytes"]
    found |= plan | {"measured_peak": measured.peak, "predicted_peak": above}
    found["ratio"] = measured.peak / above
    found["total_ratio"] = total / plan["predicted_bytes"]
    if plan["budget_bytes"] is not None:
        found["within"] = total <= plan["budget_bytes"]
    return found


def report(rows: list[dict[str, Any]]) -> str:
    """The table of ratios and how many cells meet the bar: near enough, or not above."""
    head = ["model", "budget", "predicted MB", "measured MB", "measured/predicted", "with static"]
    head += ["measured <= budget", f"within {BAR:.0%}"]
    lines = []
    for row in rows:
        if "error" in row:
            lines.append([row["model"], row["budget"], row["error"].replace("|", "/"), *[None] * 5])
            continue
        shown = [megabytes(row["predicted_peak"]), megabytes(row["measured_peak"])]
        shown += [f"{row['ratio']:.4f}", f"{row['total_ratio']:.4f}"]
        met = [row.get("within"), abs(row["ratio"] - 1) <= BAR]
        lines.append([row["model"], row["budget"], *shown, *met])
    done = [r for r in rows if "error" not in r]
    good = sum(abs(r["ratio"] - 1) <= BAR for r in done)
    kept = [r["within"] for r in done if "within" in r]
    below = sum(r["ratio"] <= 1 + BAR for r in done)
    return (
        f"{table(head, lines)}\n\nWithin {BAR:.0%}: {good} of {len(rows)} cells. "
        f"At most {BAR:.0%} above the prediction: {below} of {len(rows)}. "
        f"Budgets kept: {sum(kept)} of {len(kept)}."
    )


def main() -> None:
    """All models at all budgets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(zoo.names()))
    parser.add_argument("--compiler", default="eager", choices=["eager", "inductor"])
    options = parser.parse_args()
    setup()
    result = "prediction" if options.compiler == "eager" else "prediction_inductor"
    title = "Predicted and measured peak" + (", run by Inductor" if options.compiler != "eager" else "")
    rows = stored(result, [])
    for name in options.models.split(","):
        found = []
        for budget in BUDGETS:
            begin = time.perf_counter()
            found.append(cell(name, budget, options.compiler))
            shown = found[-1].get("error") or f"{found[-1]['ratio']:.4f}"
            note(f"{name} {budget}: {shown} ({time.perf_counter() - begin:.0f} s)")
        rows = replaced(rows, found)
        write(result, title, rows, report(rows))


if __name__ == "__main__":
    main()
