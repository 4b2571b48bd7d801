"""Pipelines that run: the time of a step on real processes against that of the plan.

    python benchmarks/pipeline_run.py [--rounds 5]

First, four gloo ranks whose stages sleep: every schedule of the planner, eight microbatches, forward,
gradient of the input and gradient of the weights of a rank taking as long as each other; then ten
microbatches that skip a quarter of the model, by relay and by direct routing, on equal stages and on
stages that have as many more layers as they have fewer visits. Then, on two ranks, a transformer of
twelve blocks: six and six, against four and eight where every other microbatch skips the eight. Blocks
are timed on both ranks at once, which share the memory of the machine. Seconds of a step are from the
first rank that begins to the last that ends, the median of the rounds after one that warms up.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from harness import answer, note, setup, spawned, table, write
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from graphopt.cost_models.stage_costs import StageCost
from graphopt.distributed import Relay, pipeline_schedule, visits_of
from graphopt.passes.stage_orders import SCHEDULES
from graphopt.passes.stage_paths import plan_paths
from graphopt.passes.stage_plan import PipelinePlan
from graphopt.passes.stage_schedule import plan_pipeline
from graphopt.pipeline_transfers import with_head

SLEEP_S = 0.04  # of each pass of a rank
SLEEPERS, MICROBATCHES = 4, 8
# Which of the two middle stages each of ten microbatches visits: three quarters of the model in the mean.
MIDDLE = ((1, 2), (1,), (2,), (1,), (2,), (1, 2), (1,), (2,), (1,), (2,))
EQUAL, BALANCED = (1.0, 1.0, 1.0, 1.0), (0.75, 1.25, 1.25, 0.75)  # layers of a stage
BLOCKS, WIDTH, LENGTH, ROWS, WORDS = 12, 192, 256, 2, 512
TOP_SLEEP, LEAST_GAIN = 0.10, 0.8


class Asleep(torch.autograd.Function):
    """Hands its input on, and takes its time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward_s: float, input_s: float) -> Tensor:
        """Sleeps `forward_s`."""
        ctx.seconds = input_s
        time.sleep(forward_s)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Sleeps `input_s`."""
        time.sleep(ctx.seconds)
        return gradient, None, None


class Sleeper(nn.Module):
    """A stage that sleeps as long as its cost says; `weight_s` is slept by the runner of `builder`."""

    def __init__(self, cost: StageCost) -> None:
        super().__init__()
        self.cost, self.shift = cost, nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """The input and a parameter."""
        return Asleep.apply(x + self.shift, self.cost.forward_s, self.cost.input_s)

    def builder(self) -> Callable[[], None]:
        """What runs as gradient of the weights."""
        return lambda: time.sleep(self.cost.weight_s)


def seconds_of(steps: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """The median time of each step over all ranks; they run in turns."""
    found: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds + 1):
        for step, times in zip(steps, found, strict=True):
            dist.barrier()
            begin = time.perf_counter()
            step()
            spans: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(spans, (begin, time.perf_counter()))
            times.append(max(end for _, end in spans) - min(start for start, _ in spans))
    return [statistics.median(times[1:]) for times in found]


def planned_step(
    plan: PipelinePlan, own: Mapping[int, nn.Module], loss: Any, batch: tuple[Tensor, Tensor]
) -> Callable[[], Any]:
    """A step of `plan` on this rank."""
    builders = {s: m.builder for s, m in own.items() if isinstance(m, Sleeper)}
    x, y = batch
    example = (x[: len(x) // plan.microbatches],)
    schedule = pipeline_schedule(plan, own, loss, example, dw_builders=builders)
    inputs = [x] if 0 in own else []
    target = y if schedule.plan.stages - 1 in own else None
    return lambda: schedule.step(*inputs, target=target, return_outputs=False)


def held(plan: PipelinePlan) -> list[int]:
    """The stages of this rank."""
    return [s for s, devices in enumerate(plan.stage_devices) if dist.get_rank() in devices]


# --- sleeping stages ---------------------------------------------------------------------------


def rest() -> float:
    """What sleeping takes, more than asked for: the mean over the ranks."""
    begin = time.perf_counter()
    for _ in range(20):
        time.sleep(SLEEP_S)
    over = torch.tensor((time.perf_counter() - begin) / 20 - SLEEP_S, dtype=torch.float64)
    dist.all_reduce(over)
    return float(over) / dist.get_world_size()


def sleep_cost(layers: float, over: float) -> tuple[StageCost, StageCost]:
    """What a stage of so many layers is asked to sleep, and what it takes."""
    asked = SLEEP_S * layers
    return StageCost(*(asked,) * 3), StageCost(*(asked + over,) * 3)


def sleepers(rounds: int) -> list[dict[str, Any]]:
    """Every schedule, and the ways to skip, on four ranks."""
    over, rows = rest(), []

    def run(name: str, plan: PipelinePlan, layers: Sequence[float]) -> None:
        own = {s: Sleeper(sleep_cost(layers[s], over)[0]) for s in held(plan)}
        batch = (torch.zeros(plan.microbatches, 1), torch.zeros(plan.microbatches, 1))
        (seconds,) = seconds_of([planned_step(plan, own, loss_of_sleep, batch)], rounds)
        rows.append({"name": name, "planned_s": plan.makespan_s, "seconds": seconds})

    for name in SCHEDULES:
        whole = plan_pipeline([sleep_cost(1.0, over)[1]] * SLEEPERS, MICROBATCHES, schedule=name)
        layers = [SLEEPERS / whole.stages] * whole.stages
        run(name, whole, layers)
    full = plan_pipeline([sleep_cost(1.0, over)[1]] * SLEEPERS, len(MIDDLE), schedule="1f1b")
    run("1f1b, ten microbatches", full, EQUAL)
    paths = [tuple((s, s) for s in (0, *middle, 3)) for middle in MIDDLE]
    for name, layers in (("a quarter skipped, routed", EQUAL), ("the same, rebalanced", BALANCED)):
        costs = [sleep_cost(share, over)[1] for share in layers]
        routed = plan_paths(costs, paths, memory=6)
        run(name, routed, layers)
        if layers is EQUAL:
            (seconds,) = seconds_of([relayed_step(routed, over)], rounds)
            rows.append({"name": "a quarter skipped, relay", "planned_s": None, "seconds": seconds})
    return rows


def relayed_step(plan: PipelinePlan, over: float) -> Callable[[], Any]:
    """torch's 1F1B with relays."""
    rank = dist.get_rank()
    asked = sleep_cost(1.0, over)[0]  # the backward is slept in one: a stage that is skipped has none
    module = Sleeper(StageCost(asked.forward_s, asked.backward_s, 0.0))
    stage = PipelineStage(Relay(module, rank), rank, SLEEPERS, torch.device("cpu"))
    visits = visits_of(plan)
    schedule = Schedule1F1B(stage, plan.microbatches, loss_fn=loss_of_sleep)
    batch = torch.zeros(plan.microbatches, 1)
    target = batch if rank == SLEEPERS - 1 else None
    inputs = [batch] if rank == 0 else []
    return lambda: schedule.step(*inputs, target=target, visits=visits, return_outputs=False)


def loss_of_sleep(output: Tensor, target: Tensor) -> Tensor:
    """Nothing to speak of."""
    return (output - target).sum()


# --- a transformer -----------------------------------------------------------------------------


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Of a microbatch."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def block_costs(layers: Sequence[nn.Module], rounds: int) -> list[StageCost]:
    """Each layer's forward and backward, all ranks at once; the slower rank counts."""
    found = torch.zeros(rounds + 1, len(layers), 2, dtype=torch.float64)
    for turn in range(rounds + 1):
        value: Tensor = torch.zeros(ROWS, LENGTH, dtype=torch.long)
        for number, layer in enumerate(layers):
            begin = time.perf_counter()
            output = layer(value)
            middle = time.perf_counter()
            if number == len(layers) - 1:
                loss_of(output, torch.zeros(ROWS, LENGTH, dtype=torch.long)).backward()
            else:
                output.backward(torch.ones_like(output))
            found[turn, number, 0] = middle - begin
            found[turn, number, 1] = time.perf_counter() - middle
            value = output.detach().requires_grad_()
    median = found[1:].median(0).values
    dist.all_reduce(median, dist.ReduceOp.MAX)
    return [StageCost(f, b / 2, b / 2) for f, b in median.tolist()]


def sum_of(costs: Sequence[StageCost]) -> StageCost:
    """Of a stage with several layers."""
    columns = zip(*((c.forward_s, c.input_s, c.weight_s) for c in costs), strict=True)
    return StageCost(*map(sum, columns))


def transformers(rounds: int) -> list[dict[str, Any]]:
    """The full pipeline and the partial one, on two ranks."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"dropout": 0.0, "batch_first": True}
    blocks = [nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, **shape) for _ in range(BLOCKS)]
    layers = [nn.Embedding(WORDS, WIDTH), *blocks, nn.Linear(WIDTH, WORDS)]
    costs = block_costs(layers, rounds)
    ids = torch.randint(WORDS, (MICROBATCHES * ROWS, LENGTH))
    half, third = 1 + BLOCKS // 2, 1 + BLOCKS // 3
    even, uneven = [0, half, BLOCKS + 2], [0, third, BLOCKS + 1, BLOCKS + 2]
    full = plan_pipeline([sum_of(costs[a:b]) for a, b in pairwise(even)], MICROBATCHES, schedule="1f1b")
    parts = [sum_of(costs[a:b]) for a, b in pairwise(uneven)]  # the third is the head, on the first rank
    paths = [((0, 0), (1, 1))[: 1 + m % 2] for m in range(MICROBATCHES)]
    partial = plan_paths(parts[:2], paths, head_s=parts[2].seconds, memory=3)
    plans = {"1f1b, 6 and 6 blocks": (full, even), "4, and 8 or none": (partial, uneven)}
    steps = []
    for plan, ends in plans.values():
        own = {s: nn.Sequential(*layers[slice(*ends[s : s + 2])]) for s in held(with_head(plan))}
        steps.append(planned_step(plan, own, loss_of, (ids, ids)))
    return [
        {"name": name, "planned_s": plan.makespan_s, "seconds": seconds}
        for (name, (plan, _)), seconds in zip(plans.items(), seconds_of(steps, rounds), strict=True)
    ]


# --- report ------------------------------------------------------------------------------------


def work(rank: int, ranks: int, rounds: int, folder: str) -> None:
    """One rank; rank 0 writes what it found."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store{ranks}", ranks)
    wait = timedelta(seconds=120)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=wait)
    found = sleepers(rounds) if ranks == SLEEPERS else transformers(rounds)
    if rank == 0:
        Path(folder, f"{ranks}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)


def report(asleep: Sequence[dict[str, Any]], real: Sequence[dict[str, Any]]) -> str:
    """Both tables, and the bars."""
    head = ["pipeline", "planned s", "measured s", "measured / planned"]

    def cells(row: dict[str, Any]) -> list[str]:
        planned = row["planned_s"]
        last = (
            [f"{planned:.3f}", f"{row['seconds']:.3f}", f"{row['seconds'] / planned:.3f}"]
            if planned
            else []
        )
        return [row["name"], *(last or ["", f"{row['seconds']:.3f}", ""])]

    worst = max(row["seconds"] / row["planned_s"] - 1 for row in asleep if row["planned_s"])
    (full, partial) = real
    planned = full["planned_s"] / partial["planned_s"]
    gain = full["seconds"] / partial["seconds"]
    share = (gain - 1) / (planned - 1)
    return "\n\n".join(
        [
            f"Four ranks whose stages sleep {SLEEP_S * 1000:.0f} ms in each of three passes.",
            table(head, map(cells, asleep)),
            f"Bar: within {TOP_SLEEP:.0%} of the plan; the worst is {worst:+.1%}: "
            f"{'met' if abs(worst) <= TOP_SLEEP else 'NOT met'}.",
            f"Two ranks, {BLOCKS} blocks of width {WIDTH}, {MICROBATCHES} microbatches of {ROWS} rows "
            f"of {LENGTH} tokens.",
            table(head, map(cells, real)),
            f"The partial pipeline is {gain:.2f} times as fast as the full one, planned {planned:.2f}. "
            f"Bar: {LEAST_GAIN} of the planned gain; it is {share:.2f} of it: "
            f"{'met' if share >= LEAST_GAIN else 'NOT met'}.",
        ]
    )


def main() -> None:
    """Ranks in fresh processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        with tempfile.TemporaryDirectory() as folder:
            for ranks in (SLEEPERS, 2):
                mp.start_processes(
                    work, (ranks, options.rounds, folder), nprocs=ranks, start_method="spawn"
                )
            answer([json.loads(Path(folder, f"{ranks}.json").read_text()) for ranks in (SLEEPERS, 2)])
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    setup()
    torch.set_num_threads(1)
    found = spawned(__file__, ["--worker", "--rounds", str(options.rounds)])
    if isinstance(found, dict):
        raise SystemExit(found["error"])
    note(f"{sum(map(len, found))} pipelines")
    data = {"sleeping": found[0], "transformer": found[1]}
    write("pipeline_run", "Pipelines of real processes against their plans", data, report(*found))


if __name__ == "__main__":
    main()
