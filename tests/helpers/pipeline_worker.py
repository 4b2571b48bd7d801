"""Ranks of a gloo group that run pipelines, and compare losses and gradients with one process.

    python pipeline_worker.py RANKS CASES FOLDER

Rank 0 writes FOLDER/results.json: for each of CASES (separated by commas), what was found.
"""

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from ranks import join, leave
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, schedules

from graphopt.cost_models.stage_costs import StageCost, StageLinks
from graphopt.cost_models.stage_run import run_greedy
from graphopt.distributed import Relay, follow, pipeline_schedule, visits_of
from graphopt.errors import GraphoptError
from graphopt.passes.stage_orders import SCHEDULES
from graphopt.passes.stage_paths import plan_paths
from graphopt.passes.stage_plan import PipelinePlan
from graphopt.passes.stage_routes import Routing
from graphopt.passes.stage_schedule import pipeline_plan, plan_pipeline
from graphopt.pipeline_transfers import with_head

WIDTH, ROWS = 5, 2  # of a microbatch
ONE = StageCost(1.0, 1.0, 1.0)
STOCK = {  # stages on a rank, and whether they are a V
    "GPipe": (1, False),
    "1F1B": (1, False),
    "Interleaved1F1B": (2, False),
    "LoopedBFS": (2, False),
    "InterleavedZeroBubble": (2, False),
    "ZBVZeroBubble": (2, True),
    "DualPipeV": (2, True),
}


def make_stages(count: int, seed: int = 0) -> list[nn.Module]:
    """Stages of a model in float64; every one has a random layer of its own."""
    torch.manual_seed(seed)
    return [nn.Sequential(nn.Tanh(), nn.Linear(WIDTH, WIDTH)).double() for _ in range(count)]


def make_batch(microbatches: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Inputs and targets, [microbatches * ROWS, WIDTH]."""
    generator = torch.Generator().manual_seed(seed)
    rows = microbatches * ROWS
    x, y = (torch.randn(rows, WIDTH, dtype=torch.float64, generator=generator) for _ in range(2))
    return x, y


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    """Cross entropy with `target` as logits; no operator keeps `output` for its gradient."""
    return F.cross_entropy(output, target.softmax(-1))


def alone(
    stages: Sequence[nn.Module], paths: Sequence[Sequence[int]], x: Tensor, y: Tensor
) -> tuple[list[Tensor], list[list[Tensor]], Tensor]:
    """Losses, gradients of every stage, and outputs in one process, microbatch by microbatch."""
    for module in stages:
        module.zero_grad()
    losses, outputs = [], []
    for path, rows, target in zip(paths, x.chunk(len(paths)), y.chunk(len(paths)), strict=True):
        for number in path:
            rows = stages[number](rows)
        loss = loss_of(rows, target)
        (loss / len(paths)).backward()
        losses.append(loss.detach())
        outputs.append(rows.detach())
    zero = [[torch.zeros_like(p) if p.grad is None else p.grad for p in m.parameters()] for m in stages]
    return losses, zero, torch.cat(outputs)


def difference(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    pairs = zip(found, exact, strict=True)
    return max((float((a.detach() - b).abs().max()) for a, b in pairs), default=0.0)


def compare(
    schedule: Any,
    own: dict[int, nn.Module],
    plan: PipelinePlan,
    reference: Sequence[nn.Module],
    seed: int = 1,
    **kwargs: Any,
) -> float:
    """The worst difference on any rank of losses, outputs and gradients after one step."""
    paths = [[stage for stage, _ in path] for path in plan.paths]
    x, y = make_batch(plan.microbatches, seed)
    exact_losses, exact_grads, exact_output = alone(reference, paths, x, y)
    for module in own.values():
        module.zero_grad()
    rank, last = dist.get_rank(), plan.stages - 1
    losses: list[Tensor] = []
    has_first, has_last = (s in own for s in (0, last))
    output = schedule.step(
        *([x] if has_first else []), target=y if has_last else None, losses=losses, **kwargs
    )
    worst = [0.0]
    for number, module in own.items():
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]
        worst.append(difference(grads, exact_grads[number]))
    if has_last:
        here = [m for m, path in enumerate(plan.paths) if path[-1] == (last, rank)]
        worst.append(difference(losses, [exact_losses[m] for m in here]))
        rows = exact_output.unflatten(0, (plan.microbatches, ROWS))[here].flatten(0, 1)
        worst.append(difference([output], [rows]) if here else 0.0)
    return largest(max(worst))


def largest(value: float) -> float:
    every = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(every, dist.ReduceOp.MAX)
    return float(every)


def held_by(plan: PipelinePlan, rank: int) -> list[int]:
    return [s for s, devices in enumerate(plan.stage_devices) if rank in devices]


def run_plan(plan: PipelinePlan, seed: int = 0) -> float:
    """The worst difference of a step with `plan`."""
    reference, model = make_stages(plan.stages, seed), make_stages(plan.stages, seed)
    own = {s: model[s] for s in held_by(plan, dist.get_rank())}
    schedule = pipeline_schedule(plan, own, loss_of, make_batch(1)[:1])
    return max(compare(schedule, own, plan, reference, step) for step in (1, 2))


def ours(ranks: int) -> Any:
    """Every schedule of the planner, with stages that take different times."""
    found = {}
    for name in SCHEDULES:
        costs = [StageCost(1.0 + s % 2, 1.0, 1.5) for s in range(ranks)]
        found[name] = run_plan(plan_pipeline(costs, 2 * ranks, schedule=name))
    return found


def stock(ranks: int) -> Any:
    """torch's own schedules on stages of torch's, for comparison."""
    found = {}
    for name, (per_rank, is_v) in STOCK.items():
        found[name] = run_stock(name, ranks, per_rank, is_v)
    return found


def run_stock(name: str, ranks: int, per_rank: int, is_v: bool, visits: Tensor | None = None) -> float:
    """A step of one of torch's schedules; of relays where there are `visits`."""
    count, microbatches, rank = ranks * per_rank, 2 * ranks, dist.get_rank()
    reference, model = make_stages(count), make_stages(count)
    v_shaped = [rank, count - 1 - rank]
    numbers = v_shaped if is_v else [rank + ranks * k for k in range(per_rank)]
    own = {s: model[s] for s in numbers}
    run = {s: m if visits is None else Relay(m, s) for s, m in own.items()}
    stages = [PipelineStage(run[s], s, count, torch.device("cpu")) for s in numbers]
    made = schedules.get_schedule_class(name)
    is_single = issubclass(made, schedules.PipelineScheduleSingle)
    schedule = made(stages[0] if is_single else stages, microbatches, loss_fn=loss_of)
    paths = tuple(
        tuple((s, s) for s in range(count) if visits is None or visits[m, s]) for m in range(microbatches)
    )
    everywhere = tuple((s,) for s in range(count))
    plan = PipelinePlan(name, everywhere, paths, (), (), (), (), ())
    plan = replace(plan, paths=tuple((*p[:-1], (count - 1, rank)) for p in paths))
    kwargs = {} if visits is None else {"visits": visits}
    return compare(schedule, own, plan, reference, **kwargs)


def drawn_paths(stages: int, microbatches: int, seed: int, swaps: bool = True) -> list[list[int]]:
    """Paths from the first to the last stage through some of the others, in any order."""
    chance = random.Random(seed)
    paths = []
    for _ in range(microbatches):
        middle = [s for s in range(1, stages - 1) if chance.random() < 0.6]
        if swaps:
            chance.shuffle(middle)
        paths.append([0, *middle, stages - 1])
    return paths


def routed_plan(ranks: int, seed: int, split: bool, per_rank: int = 2) -> PipelinePlan:
    """Drawn paths over stages that go around, with drawn costs."""
    chance, count = random.Random(seed), ranks * per_rank
    costs = [StageCost(*(chance.uniform(0.5, 2.0) for _ in range(3))) for _ in range(count)]
    paths = drawn_paths(count, 3 * ranks, seed)
    hops = [tuple((s, s % ranks) for s in path) for path in paths]
    return plan_paths(costs, hops, stage_devices=[[s % ranks] for s in range(count)], split=split)


def routes(ranks: int) -> Any:
    """Ten sets of paths, with whole backwards and with split ones."""
    return [run_plan(routed_plan(ranks, seed, bool(seed % 2))) for seed in range(10)]


def changes(ranks: int) -> Any:
    """Paths that change between the steps of one schedule."""
    plans = [routed_plan(ranks, seed, False) for seed in range(4)]
    reference, model = make_stages(plans[0].stages), make_stages(plans[0].stages)
    own = {s: model[s] for s in held_by(plans[0], dist.get_rank())}
    schedule = pipeline_schedule(plans[0], own, loss_of, make_batch(1)[:1])
    found = []
    for step, plan in enumerate((*plans, plans[0])):
        follow(schedule, plan)
        found.append(compare(schedule, own, plan, reference, step))
    return found


def head(ranks: int) -> Any:
    """Paths that come back to the first stage for the head, as SkipPipe's; the head is one stage more."""
    count = min(ranks, 3)
    places = tuple(tuple(range(d, ranks, count)) for d in range(count))  # of four ranks, two begin
    links = StageLinks.even(ranks, 0.1)
    routing = Routing((ONE,) * count, links, places, 4, visited=2, memory=3, head_s=0.5)
    paths = routing.first_paths()
    run = run_greedy(routing.step(paths), routing.memory)
    plan = pipeline_plan("head", places, paths, run)
    assert any("H" in text for text in plan.orders[0])
    whole = with_head(plan)
    reference, model = make_stages(whole.stages), make_stages(whole.stages)
    own = {s: model[s] for s in held_by(whole, dist.get_rank())}
    schedule = pipeline_schedule(plan, own, loss_of, make_batch(1)[:1])
    return compare(schedule, own, whole, reference)


def replicas(ranks: int) -> Any:
    """Stages on several ranks: each microbatch on one of them, gradients of all."""
    if ranks == 2:
        devices = [[0, 1], [0, 1]]
        paths = [((0, m % 2), (1, m % 2)) for m in (0, 1, 1, 0, 1)]
    else:  # one rank, some that share a stage, one rank
        devices = [[0], list(range(1, ranks - 1)), [ranks - 1]]
        paths = [((0, 0), (1, 1 + m % (ranks - 2)), (2, ranks - 1)) for m in range(6)]
    return run_plan(plan_paths([ONE] * len(devices), paths, stage_devices=devices))


def reversed_losses(ranks: int) -> Any:
    """The last stage computes the last microbatch first: how far we are off, and how far torch is."""
    count = 4
    orders = tuple(
        tuple(f"{s}{kind}{m}" for kind in "FB" for m in reversed(range(count))) for s in range(ranks)
    )
    path = tuple((s, s) for s in range(ranks))
    times = tuple(tuple(float(10 * s + i) for i in range(2 * count)) for s in range(ranks))
    plan = PipelinePlan(
        "reversed", tuple((s,) for s in range(ranks)), (path,) * count, orders, times, times, (), ()
    )
    found = {"ours": run_plan(plan)}
    model, reference, rank = make_stages(ranks), make_stages(ranks), dist.get_rank()
    stage = PipelineStage(model[rank], rank, ranks, torch.device("cpu"))
    runtime = schedules._PipelineScheduleRuntime([stage], count, loss_fn=loss_of)
    runtime._prepare_schedule_with_comms(
        {d: [schedules._Action.from_str(text) for text in row] for d, row in enumerate(orders)}
    )
    found["torch"] = compare(runtime, {rank: model[rank]}, plan, reference)
    return found


def relays(ranks: int) -> Any:
    """Stages that hand their input on, in torch's schedules and in ours."""
    found = {}
    for name in ("GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble"):
        per_rank, is_v = STOCK[name]
        count = ranks * per_rank
        visits = torch.zeros(2 * ranks, count, dtype=torch.bool)
        for m, path in enumerate(drawn_paths(count, 2 * ranks, 5, swaps=False)):
            visits[m, path] = True
        found[name] = run_stock(name, ranks, per_rank, is_v, visits)
    full = plan_pipeline([ONE] * ranks, 2 * ranks, schedule="zbv")
    hops = [
        tuple((s, full.stage_devices[s][0]) for s in path)
        for path in drawn_paths(full.stages, 2 * ranks, 7, False)
    ]
    partial = replace(full, paths=tuple(hops))
    reference, model = make_stages(full.stages), make_stages(full.stages)
    own = {s: model[s] for s in held_by(full, dist.get_rank())}
    relayed = {s: Relay(m, s) for s, m in own.items()}
    visits = visits_of(partial)
    schedule = pipeline_schedule(
        full,
        relayed,
        loss_of,
        make_batch(1)[:1],
        example_kwargs={"visits": torch.ones_like(visits[:1])},
    )
    found["zbv"] = compare(schedule, own, partial, reference, visits=visits)
    return found


def evaluation(ranks: int) -> Any:
    """Losses without gradients, then a step, then losses again, and a step."""
    plan = plan_pipeline([ONE] * ranks, 4, schedule="1f1b")
    reference, model, rank = make_stages(ranks), make_stages(ranks), dist.get_rank()
    own = {rank: model[rank]}
    schedule = pipeline_schedule(plan, own, loss_of, make_batch(1)[:1])
    x, y = make_batch(4)
    exact = alone(reference, [list(range(ranks))] * 4, x, y)[0]
    inputs, target = [x] if rank == 0 else [], y if rank == ranks - 1 else None
    found = []
    for seed in (1, 3):
        losses: list[Tensor] = []
        schedule.eval(*inputs, target=target, losses=losses)
        found.append(largest(difference(losses, exact) if rank == ranks - 1 else 0.0))
        found.append(compare(schedule, own, plan, reference, seed))
    return found


def refused(run: Callable[[], Any]) -> str:
    """The text of the error that `run` raises."""
    try:
        run()
    except GraphoptError as error:
        return str(error)
    return ""


def refusals(ranks: int) -> Any:
    """What does not fit, by the same error on every rank."""
    x, model = make_batch(1)[:1], make_stages(8)
    rank = dist.get_rank()
    every = dict(enumerate(model))
    right = plan_pipeline([ONE] * ranks, 4, schedule="1f1b")
    other = plan_pipeline([ONE] * ranks, 8, schedule="1f1b")
    more = plan_pipeline([ONE] * (ranks + 1), 4, schedule="1f1b")
    wide = {**every, 1: nn.Linear(WIDTH, WIDTH + 1).double()}
    fitting = {**wide, 2: nn.Linear(WIDTH + 1, WIDTH).double()}
    skips = plan_paths(
        [ONE] * 4,
        [((0, 0), (2, 0), (3, 1)), ((0, 0), (1, 1), (3, 1))],
        stage_devices=[[0], [1], [0], [1]],
    )
    v_shaped = plan_paths([ONE] * 4, [((0, 0), (2, 1), (3, 0))], stage_devices=[[0], [1], [1], [0]])

    def build(plan: PipelinePlan, stages: dict[int, nn.Module] = every) -> Any:
        return pipeline_schedule(plan, stages, loss_of, x)

    texts = {
        "ranks": refused(lambda: build(more)),
        "stage": refused(lambda: build(right, {0: model[0]})),
        "differ": refused(lambda: build(right if rank else other)),
        "neighbours": refused(lambda: build(v_shaped)),
        "runs": refused(lambda: build(skips, wide)),
        "shape": refused(lambda: build(skips, fitting)),
        "follow": refused(lambda: follow(build(right), other)),
    }
    every_rank: list[Any] = [None] * ranks
    dist.all_gather_object(every_rank, texts)
    return {"texts": texts, "same": all(t == texts for t in every_rank)}


CASES: dict[str, Callable[[int], Any]] = {
    case.__name__: case
    for case in (
        *(ours, stock, routes, changes, head, replicas),
        *(reversed_losses, relays, evaluation, refusals),
    )
}


def work(rank: int, ranks: int, cases: str, folder: str) -> None:
    """One rank."""
    join(rank, folder, ranks)
    leave(rank, folder, {case: CASES[case](ranks) for case in cases.split(",")})


if __name__ == "__main__":
    count = int(sys.argv[1])
    mp.start_processes(work, (count, *sys.argv[2:]), nprocs=count, start_method="fork")
