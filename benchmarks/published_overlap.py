"""Published measurements of communication overlap beside what the cost model and the scheduler say.

    python benchmarks/published_overlap.py

TokenWeave: prefill of two 70B models on 8 GPUs, without overlap and with. A step without overlap takes
what it takes without communication, and its all-reduces as the micro-benchmark has them. For the
overlapped one, the two halves of the tokens are tasks of a task graph: each of the 160 modules
computes, then sends what the fused all-reduce and norm take for its half. A split costs what two halves
compute longer than the whole, read off the two shortest prompts; the blocks that communicate are taken
from the processor.

Ladder residual: tokens per second of a 70B model, without the rewrite and with. Computing is what the
published run without communication takes, communication what the standard model takes longer. In the
ladder a module reads what the one before the last sent. One number, the contention, is fitted to the 20
points.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.cost_models.link_costs import fitted
from graphopt.cost_models.task_graph import Task, TaskGraph
from graphopt.passes.overlap_search import schedule

DATA = Path(__file__).with_name("data")
BAR_TOKENWEAVE, BAR_LADDER = 0.05, 0.04


def read(name: str) -> Any:
    """A table of `benchmarks/data`."""
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


def modules(chains: int, count: int, compute_s: float, send_s: float, contention: float) -> TaskGraph:
    """`chains` independent chains of modules that compute and then send, for the next module to read."""
    tasks: list[Task] = []
    for chain in range(chains):
        last: tuple[int, ...] = ()
        for module in range(count):
            tasks.append(Task(f"module {chain}.{module}", "compute", compute_s, last))
            tasks.append(Task(f"send {chain}.{module}", "group", send_s, (len(tasks) - 1,)))
            last = (len(tasks) - 1,)
    return TaskGraph(tuple(tasks), contention={"group": contention})


def ladder(count: int, compute_s: float, send_s: float, contention: float) -> TaskGraph:
    """Modules that read what the one before the last sent, and what the last computed itself."""
    tasks: list[Task] = []
    for module in range(count):
        before = (len(tasks) - 2,) if module else ()
        sent = (len(tasks) - 3,) if module > 1 else ()
        tasks.append(Task(f"module {module}", "compute", compute_s, (*sent, *before)))
        tasks.append(Task(f"send {module}", "group", send_s, (len(tasks) - 1,)))
    return TaskGraph(tuple(tasks), contention={"group": contention})


def tokenweave() -> list[dict[str, Any]]:
    """One row for each model and length: predicted and published milliseconds, and the errors."""
    data = read("tokenweave")
    norm, together = _micro(data, "norm_us"), _micro(data, "all_reduce_and_norm_us")
    all_reduce, count = _micro(data, "all_reduce_us"), data["modules"]
    alone = {(model, tokens): ms for model, tokens, _, ms, _ in data["prefill"]}
    rows = []
    for model, tokens, base_ms, without_ms, overlapped_ms in data["prefill"]:
        shortest, next_ = sorted(t for m, t in alone if m == model)[:2]
        split_ms = 2 * alone[model, shortest] - alone[model, next_]
        compute_ms = without_ms - count * norm(tokens) + split_ms
        taken = data["blocks_for_communication"][str(tokens)]
        contention = taken / (data["multiprocessors"] - taken)
        graph = modules(2, count, compute_ms / (2 * count), together(tokens / 2), contention)
        predicted = without_ms + count * all_reduce(tokens), schedule(graph, trials=0).run.seconds
        rows.append(
            {
                "model": model,
                "tokens": tokens,
                "base_ms": (base_ms, predicted[0]),
                "overlapped_ms": (overlapped_ms, predicted[1]),
                "errors": (predicted[0] / base_ms - 1, predicted[1] / overlapped_ms - 1),
            }
        )
    return rows


def _micro(data: dict[str, Any], column: str) -> Callable[[float], float]:
    """Milliseconds of an operator by tokens: as measured, and by a line beyond that."""
    place = data["micro_columns"].index(column)
    samples = [(row[0], row[place] / 1e3) for row in data["micro"]]
    sizes, times = zip(*samples, strict=True)
    line = fitted(samples[len(samples) // 2 :])

    def milliseconds(tokens: float) -> float:
        return (
            float(np.interp(tokens, sizes, times)) if tokens <= sizes[-1] else line.seconds(int(tokens))
        )

    return milliseconds


def ladder_70b(contention: float | None = None) -> list[dict[str, Any]]:
    """One row for each point: predicted and published tokens per second of the ladder, and the error."""
    data = read("ladder_70b")
    share, count = data["contention"] if contention is None else contention, data["modules"]
    rows = []
    for batch, ranks, links, standard, published, bound in data["tokens_per_s"]:
        compute_s, send_s = 1 / bound / count, (1 / standard - 1 / bound) / count
        found = schedule(ladder(count, compute_s, send_s, share), trials=0)
        predicted = 1 / found.run.seconds
        row = {"batch": batch, "ranks": ranks, "links": links, "standard": standard}
        rows.append(row | {"ladder": (published, predicted), "error": predicted / published - 1})
    return rows


def text_of(weave: list[dict[str, Any]], rungs: list[dict[str, Any]]) -> str:
    """Both tables, and how far the bars are met."""
    from harness import table

    head = ["model", "tokens", "base ms", "predicted", "error", "overlapped ms", "predicted", "error"]
    shown = [
        [r["model"], r["tokens"], *_three(*r["base_ms"]), *_three(*r["overlapped_ms"])] for r in weave
    ]
    worst = max(abs(e) for r in weave for e in r["errors"])
    first = f"TokenWeave: worst error {worst:.1%} (bar {BAR_TOKENWEAVE:.0%}: {worst <= BAR_TOKENWEAVE})."
    other = ["batch", "ranks", "links", "standard tok/s", "ladder tok/s", "predicted", "error"]
    lines = [
        [*(r[k] for k in ("batch", "ranks", "links", "standard")), *_three(*r["ladder"])] for r in rungs
    ]
    mean = sum(abs(r["error"]) for r in rungs) / len(rungs)
    second = f"Ladder: mean error {mean:.1%} (bar {BAR_LADDER:.0%}: {mean <= BAR_LADDER})."
    return "\n\n".join([table(head, shown), first, table(other, lines), second])


def _three(published: float, predicted: float) -> list[str]:
    return [f"{published:.2f}", f"{predicted:.2f}", f"{predicted / published - 1:+.1%}"]


def main() -> None:
    """Both tables, written to `results`."""
    from harness import setup, write

    setup()
    weave, rungs = tokenweave(), ladder_70b()
    data = {"tokenweave": weave, "ladder_70b": rungs}
    write("published_overlap", "Published overlap, predicted", data, text_of(weave, rungs))


if __name__ == "__main__":
    main()
