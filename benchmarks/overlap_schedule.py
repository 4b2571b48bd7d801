"""Schedules of large task graphs: how long the search takes, and how far the result is from the bound.

    python benchmarks/overlap_schedule.py [--layers 80]

The graphs are of a forward of Llama-70B on 8 GPUs at several lengths: each layer has the operators of a
captured one, with the costs of the roofline model of an H100. "split": tensor parallel, with
all-reduces that take what was measured (`data/tokenweave.json`) and two halves of the tokens as
independent chains, one behind the other as a transform leaves them. "sharded": every layer's weights
are gathered by a ring over NVLink before it, with memory for two layers. Loading compiled code is not
counted.
"""

import argparse
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from harness import note, setup, table, write
from published_overlap import read

from graphopt.cost_models.collectives import Collective
from graphopt.cost_models.devices import Cluster, Device, get_device
from graphopt.cost_models.link_costs import fitted
from graphopt.cost_models.overlap_run import run_order
from graphopt.cost_models.roofline import seconds
from graphopt.cost_models.task_graph import COMPUTE, Task, TaskGraph
from graphopt.passes.overlap_search import schedule

LENGTHS = (1024, 4096, 8192, 32768)
HIDDEN, WIDE, QUERIES, KEYS, RANKS = 8192, 28672, 8192, 1024, 8
DTYPE = torch.bfloat16
BAR_SECONDS, BAR_GAP = 2.0, 1.01
# 370e9 bytes/s per GPU on the rings of NVLink, and 3.4 us a hop (torch/_inductor/comm_analysis.py).
LINK = (370e9, 3.4e-6, "torch/_inductor/comm_analysis.py")


@dataclass
class Builder:
    """Makes a task graph; every task that takes time writes a buffer of its own."""

    tasks: list[Task] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)

    def add(self, channel: str, needed: float, nbytes: int, *after: int) -> int:
        """A task behind others, whose results it reads; its index. -1 stands for no task."""
        before = tuple(i for i in after if i >= 0)
        number = len(self.tasks)
        self.tasks.append(Task(f"task {number}", channel, needed, before, before, (number,)))
        self.nbytes.append(nbytes)
        return number

    def chain(self, times: list[float], nbytes: int, *after: int) -> int:
        """Tasks of the compute channel, one behind the other; the index of the last."""
        for needed in times:
            after = (self.add(COMPUTE, needed, nbytes if needed else 0, *after),)
        return after[0]

    def graph(self) -> TaskGraph:
        """What was made."""
        return TaskGraph(tuple(self.tasks), tuple(self.nbytes))


def operators(tokens: int, ranks: int, device: Device) -> tuple[list[float], list[float]]:
    """Seconds of the operators of attention and of the feed-forward network of one layer; 0 for views."""
    queries, keys, wide = QUERIES // ranks, KEYS // ranks, WIDE // ranks

    def product(inner: int, columns: int) -> float:
        moved = DTYPE.itemsize * (tokens * inner + inner * columns + tokens * columns)
        return seconds(2 * tokens * inner * columns, moved, DTYPE, device)

    def elementwise(width: int) -> float:
        return seconds(0, 2 * DTYPE.itemsize * tokens * width, DTYPE, device, tokens * width)

    norm = [elementwise(HIDDEN)] * 6
    turned = [elementwise(queries)] * 6 + [elementwise(keys)] * 6
    causal = 2 * tokens * tokens * queries
    core = seconds(causal, 4 * DTYPE.itemsize * tokens * queries, DTYPE, device)
    projections = [product(HIDDEN, columns) for columns in (queries, keys, keys)]
    attention = [*norm, *projections, *[0.0] * 18, *turned, core, product(queries, HIDDEN)]
    gated = [product(HIDDEN, wide)] * 2 + [elementwise(wide)] * 2
    return attention, [*norm, *gated, *[0.0] * 6, product(wide, HIDDEN)]


def split(layers: int, tokens: int, device: Device) -> TaskGraph:
    """Both halves of the tokens through all layers, one half behind the other."""
    micro = read("tokenweave")["micro"]
    line = fitted([(row[0], row[3] / 1e6) for row in micro])
    half, size = tokens // 2, DTYPE.itemsize * tokens // 2 * HIDDEN
    built = Builder()
    add_s = seconds(0, 3 * size, DTYPE, device, half * HIDDEN)
    for _ in range(2):
        residual = -1
        for _ in range(layers):
            for times in operators(half, RANKS, device):
                made = built.chain(times, size, residual)
                sent = built.add("group", line.seconds(half), size, made)
                waited = built.add(COMPUTE, 0.0, 0, sent, made)
                residual = built.add(COMPUTE, add_s, size, waited, sent, residual)
    return built.graph()


def sharded(layers: int, tokens: int, device: Device) -> tuple[TaskGraph, int]:
    """All layers with gathered weights, and the bytes of two layers and of what is computed."""
    weight = DTYPE.itemsize * (2 * HIDDEN * QUERIES + 2 * HIDDEN * KEYS + 3 * HIDDEN * WIDE)
    gather_s = Collective("all_gather", weight // RANKS).seconds(Cluster(device, RANKS, *LINK))
    size = DTYPE.itemsize * tokens * HIDDEN
    built, last = Builder(), -1
    for _ in range(layers):
        gathered = built.add("group", gather_s, weight)
        waited = built.add(COMPUTE, 0.0, 0, gathered)
        for times in operators(tokens, 1, device):
            for needed in times:
                last = built.add(COMPUTE, needed, size if needed else 0, last, waited, gathered)
    return built.graph(), 2 * weight + 4 * size


def row(name: str, tokens: int, graph: TaskGraph, memory_bytes: int | None) -> dict[str, Any]:
    """One graph: scheduled, and beside its order as it is."""
    graph.arrays  # noqa: B018 # made once, whatever is asked of the graph
    begin = time.perf_counter()
    found = schedule(graph, memory_bytes=memory_bytes)
    took = time.perf_counter() - begin
    graph.check_order(found.order)
    plain = run_order(graph, range(len(graph.tasks)))
    return {
        "graph": name,
        "tokens": tokens,
        "tasks": len(graph.tasks),
        "captured_ms": plain.seconds * 1e3,
        "planned_ms": found.run.seconds * 1e3,
        "bound_ms": found.bound.seconds * 1e3,
        "bound_by": found.bound.by,
        "gap": found.gap,
        "memory_bytes": memory_bytes,
        "peak_bytes": found.run.peak_bytes,
        "found_by": found.found_by,
        "tried": found.tried,
        "search_seconds": took,
    }


def text_of(rows: list[dict[str, Any]]) -> str:
    """The table, and how far the bars are met."""
    head = ["graph", "tokens", "tasks", "captured ms", "planned ms", "bound ms", "bound by", "gap"]
    keys = ("graph", "tokens", "tasks", "captured_ms", "planned_ms", "bound_ms", "bound_by")
    shown = [
        [
            *(r[k] for k in keys),
            f"{r['gap']:.4f}",
            r["found_by"],
            r["tried"],
            f"{r['search_seconds']:.2f}",
        ]
        for r in rows
    ]
    slowest, widest = max(r["search_seconds"] for r in rows), max(r["gap"] for r in rows)
    summary = (
        f"Slowest search {slowest:.2f} s (bar {BAR_SECONDS:.0f} s: {slowest <= BAR_SECONDS}), widest gap "
        f"{widest:.4f} (bar {BAR_GAP}: {widest <= BAR_GAP})."
    )
    return "\n\n".join([table([*head, "found by", "orders", "search s"], shown), summary])


def main() -> None:
    """Every graph at every length."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=80)
    options = parser.parse_args()
    setup()
    device = get_device("h100")
    schedule(split(1, 1024, device))
    rows = []
    for tokens in LENGTHS:
        rows.append(row("split", tokens, split(options.layers, tokens, device), None))
        rows.append(row("sharded", tokens, *sharded(options.layers, tokens, device)))
        note(f"{tokens} tokens: gaps {rows[-2]['gap']:.4f} and {rows[-1]['gap']:.4f}")
    write("overlap_schedule", f"Schedules of {options.layers} layers of Llama-70B", rows, text_of(rows))


if __name__ == "__main__":
    main()
