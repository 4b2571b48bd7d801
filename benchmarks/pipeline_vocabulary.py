"""Pipelines whose vocabulary is split over the ranks, against one whose last stage holds the head.

    python benchmarks/pipeline_vocabulary.py [--words 32000,128000] [--ranks 2,4] [--rounds 5]

A transformer of eight blocks trains with AdamW on gloo ranks. Memory is how much the resident memory
of a rank's process grows, at its highest, from before the model is made to the end of a step and of the
optimizer, with the optimizer's states there; each pipeline is measured in processes of its own. Seconds
of a step, the optimizer's left out, are medians of interleaved rounds in one group, from the first rank
that begins to the last that ends. Where there are more ranks than cores, they are left out.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from harness import answer, high_water, megabytes, note, setup, spawned, table, write
from pipeline_run import held, loss_of, seconds_of, sum_of
from torch import Tensor, nn

from graphopt.cost_models.stage_costs import StageCost
from graphopt.distributed import pipeline_schedule
from graphopt.passes.stage_plan import PipelinePlan
from graphopt.passes.stage_schedule import plan_pipeline
from graphopt.passes.stage_vocab import VocabularyCost
from graphopt.pipeline_vocabulary import PipelineVocabulary

BLOCKS, WIDTH, LENGTH, MICROBATCHES = 8, 256, 256, 8
HEAD = "head on the last stage"
SPLIT = {  # schedule, algorithm, whether logits are made again
    "1f1b vocab-1": ("1f1b", "vocab-1", False),
    "1f1b vocab-2": ("1f1b", "vocab-2", False),
    "v-half vocab-1": ("v-half", "vocab-1", False),
    "v-half vocab-2": ("v-half", "vocab-2", False),
    "v-half vocab-1, logits streamed": ("v-half", "vocab-1", True),
    "v-half vocab-2, logits streamed": ("v-half", "vocab-2", True),
}
BALANCE, SAME = 0.05, 1e-4


def seconds_to_run(run: Callable[[], Any], turns: int = 3) -> float:
    """The least of some runs; the slowest rank counts."""
    found = []
    for _ in range(turns):
        begin = time.perf_counter()
        run()
        found.append(time.perf_counter() - begin)
    least = torch.tensor(min(found), dtype=torch.float64)
    dist.all_reduce(least, dist.ReduceOp.MAX)
    return float(least)


def costs_of(words: int) -> tuple[StageCost, float]:
    """A block, and the whole head with its loss, forward and backward."""
    block, head = make_block(), nn.Linear(WIDTH, words, bias=False)
    x = torch.randn(1, LENGTH, WIDTH, requires_grad=True)
    target = torch.zeros(1, LENGTH, dtype=torch.long)
    forward = seconds_to_run(lambda: block(x))
    both = seconds_to_run(lambda: block(x).sum().backward())
    whole = seconds_to_run(lambda: loss_of(head(x), target).backward())
    return StageCost(forward, (both - forward) / 2, (both - forward) / 2), whole


def make_block() -> nn.Module:
    """A layer of the transformer."""
    return nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True)


def plan_of(name: str, ranks: int, block: StageCost, head_s: float) -> PipelinePlan:
    """The schedule of one pipeline."""
    each = sum_of([block] * (BLOCKS // ranks))
    if name == HEAD:
        head = StageCost(head_s / 3, head_s / 3, head_s / 3)
        costs = [each] * (ranks - 1) + [sum_of([each, head])]
        return plan_pipeline(costs, MICROBATCHES, schedule="1f1b")
    schedule, algorithm, is_streamed = SPLIT[name]
    products = {"vocab-1": (1, 2), "vocab-2": (2, 1)}[algorithm]
    again = (0, 1) if is_streamed else (0, 0)
    s_s, t_s = (head_s / 3 / ranks * (p + a) for p, a in zip(products, again, strict=True))
    cost = VocabularyCost(s_s, t_s)
    return plan_pipeline(
        [each] * ranks, MICROBATCHES, schedule=schedule, vocabulary=cost, algorithm=algorithm
    )


class Pipeline:
    """One pipeline on this rank, with its optimizer."""

    def __init__(self, name: str, words: int, plan: PipelinePlan) -> None:
        torch.manual_seed(0)
        embedding, head = nn.Embedding(words, WIDTH), nn.Linear(WIDTH, words, bias=False)
        blocks = [make_block() for _ in range(BLOCKS)]
        size = BLOCKS // plan.stages
        parts = [blocks[s * size : (s + 1) * size] for s in range(plan.stages)]
        vocabulary = None
        if name == HEAD:
            parts = [[embedding, *parts[0]], *parts[1:-1], [*parts[-1], head]]
        else:
            vocabulary = PipelineVocabulary(embedding, head, streamed=SPLIT[name][2])
        self.own = {s: nn.Sequential(*parts[s]) for s in held(plan)}
        del embedding, head, blocks, parts
        generator = torch.Generator().manual_seed(1)
        shape = (MICROBATCHES, LENGTH)
        self.ids, self.target = (torch.randint(words, shape, generator=generator) for _ in range(2))
        loss = loss_of if vocabulary is None else None
        self.schedule = pipeline_schedule(plan, self.own, loss, (self.ids[:1],), vocabulary=vocabulary)
        modules = [*self.own.values(), *([] if vocabulary is None else [vocabulary])]
        self.optimizer = torch.optim.AdamW([p for m in modules for p in m.parameters()], foreach=False)
        self.is_split, self.losses = vocabulary is not None, list[Tensor]()

    def step(self) -> None:
        """Gradients."""
        self.optimizer.zero_grad()
        inputs = [self.ids] if self.is_split or 0 in self.own else []
        last = self.schedule.plan.stages - 1
        target = self.target if self.is_split or last in self.own else None
        self.schedule.step(*inputs, target=target, losses=self.losses, return_outputs=False)

    def train(self) -> None:
        """Gradients, and the optimizer."""
        self.step()
        self.optimizer.step()


def memory_of(name: str, words: int, ranks: int) -> dict[str, Any]:
    """Bytes of each rank."""
    plan = plan_of(name, ranks, *costs_of(words))
    before = high_water(lambda: None)
    pipeline = Pipeline(name, words, plan)
    pipeline.train()
    loss = float(torch.stack(pipeline.losses).detach().mean()) if pipeline.losses else 0.0
    grown: list[Any] = [None] * ranks
    dist.all_gather_object(grown, high_water(pipeline.train) - before)
    losses: list[Any] = [None] * ranks
    dist.all_gather_object(losses, loss)
    return {"name": name, "words": words, "ranks": ranks, "bytes": grown, "loss": max(losses)}


def times_of(names: Sequence[str], words: int, ranks: int, rounds: int) -> list[dict[str, Any]]:
    """Seconds of a step of each pipeline, planned and measured."""
    costs = costs_of(words)
    plans = [plan_of(name, ranks, *costs) for name in names]
    pipelines = [Pipeline(name, words, plan) for name, plan in zip(names, plans, strict=True)]
    found = seconds_of([p.step for p in pipelines], rounds)
    return [
        {"name": n, "planned_s": p.makespan_s, "seconds": s, "rounds": rounds}
        for n, p, s in zip(names, plans, found, strict=True)
    ]


def work(rank: int, folder: str, names: Sequence[str], words: int, ranks: int, rounds: int) -> None:
    """One rank; rank 0 writes what it found."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    wait = timedelta(seconds=300)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=wait)
    found: Any = times_of(names, words, ranks, rounds) if rounds else memory_of(names[0], words, ranks)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)


def on_ranks(names: Sequence[str], words: int, ranks: int, rounds: int) -> Any:
    """What the ranks of a fresh group find."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (folder, names, words, ranks, rounds)
        mp.start_processes(work, arguments, nprocs=ranks, start_method="spawn")
        return json.loads(Path(folder, "found.json").read_text())


def report(rows: Sequence[dict[str, Any]]) -> str:
    """A table for each size, and the bars."""
    parts = [
        f"{BLOCKS} blocks of width {WIDTH}, {MICROBATCHES} microbatches of {LENGTH} tokens, float32."
    ]
    for words, ranks in dict.fromkeys((r["words"], r["ranks"]) for r in rows):
        mine = [r for r in rows if (r["words"], r["ranks"]) == (words, ranks)]
        base = next(r for r in mine if r["name"] == HEAD)
        cells = []
        for row in mine:
            spread = max(row["bytes"]) / min(row["bytes"]) - 1
            seconds = row.get("seconds")
            cells.append(
                [
                    row["name"],
                    " ".join(megabytes(b) for b in row["bytes"]),
                    f"{spread:.1%}",
                    f"{max(row['bytes']) / max(base['bytes']):.2f}",
                    f"{row['planned_s']:.2f}" if seconds else "-",
                    f"{seconds:.2f}" if seconds else "-",
                    f"{base['seconds'] / seconds:.2f}" if seconds else "-",
                    abs(row["loss"] - base["loss"]) < SAME * abs(base["loss"]),
                ]
            )
        head = [
            "pipeline",
            "MB of each rank",
            "spread",
            "of the largest",
            "planned s",
            "s",
            "faster",
            "loss",
        ]
        parts += [f"{words} words on {ranks} ranks:", table(head, cells)]
    split = [r for r in rows if r["name"].startswith("v-half")]
    worst = max(max(r["bytes"]) / min(r["bytes"]) - 1 for r in split)
    parts.append(
        f"Memory of the ranks in V-Half within {BALANCE:.0%} of each other: {worst <= BALANCE} "
        f"(at most {worst:.1%})."
    )
    return "\n\n".join(parts)


def main() -> None:
    """Every size in groups of fresh processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--words", default="32000,128000")
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        names, words, ranks, rounds = json.loads(options.worker)
        answer(on_ranks(names, words, ranks, rounds))
        return
    setup()
    names = [HEAD, *SPLIT]
    low = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    rows = []
    for words in map(int, options.words.split(",")):
        for ranks in map(int, options.ranks.split(",")):
            here = []
            for name in names:
                here.append(spawned(__file__, ["--worker", json.dumps([[name], words, ranks, 0])], low))
                note(f"{name}, {words} words, {ranks} ranks: {here[-1]}")
            if ranks <= (os.cpu_count() or 1) and options.rounds:
                timed = ["--worker", json.dumps([names, words, ranks, options.rounds])]
                times = spawned(__file__, timed, {"OMP_NUM_THREADS": "1"})
                note(f"{times}")
                for row, found in zip(here, times, strict=True):
                    row |= found
            rows += here
    write("pipeline_vocabulary", "A vocabulary split over a pipeline", rows, report(rows))


if __name__ == "__main__":
    main()
