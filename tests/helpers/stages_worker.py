"""Ranks of a gloo group that train the stages of traced models, and compare them with one process.

    python stages_worker.py RANKS FOLDER

Rank 0 writes FOLDER/results.json: for each model and schedule the worst difference.
"""

import copy
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pipeline_worker import difference, held_by, largest
from ranks import join, leave
from torch import Tensor, nn

from graphopt import trace, zoo
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import get_device
from graphopt.distributed import pipeline_schedule
from graphopt.passes.stage_partition import cut_stages
from graphopt.passes.stage_schedule import plan_pipeline
from graphopt.stage_modules import own_loss, stage_modules

MICROBATCHES, ROWS, LENGTH = 4, 2, 8
TINY = {
    "llama": {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 48},
    "gpt2": {"n_layer": 4, "n_embd": 32, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}


def run(name: str, schedule: str, ranks: int) -> float:
    """The worst difference of losses and gradients on any rank, over two steps."""
    torch.manual_seed(0)
    model = zoo.build(name, "small", TINY[name]).double().train()
    whole = copy.deepcopy(model)
    batch = zoo.example_batch(name, model, MICROBATCHES * ROWS, LENGTH)
    first = {key: value[:ROWS] for key, value in batch.items()}
    program = trace(model, first)
    count = ranks * (2 if schedule == "zbv" else 1)
    cut = cut_stages(program, Costs.of(program, get_device("a100")), count)
    costs = cut.costs()
    if count > ranks:
        costs = tuple(a.part(1) for a in costs[::2])
    plan = plan_pipeline(costs, MICROBATCHES, schedule=schedule)
    stages = stage_modules(program, cut, model, stage_devices=plan.stage_devices)
    own: dict[int, nn.Module] = {s: stages[s] for s in held_by(plan, dist.get_rank())}
    runs = pipeline_schedule(plan, own, own_loss, (), example_kwargs=first)
    worst = [0.0]
    for _ in range(2):
        for module in (whole, model):
            module.zero_grad()
        exact = []
        for m in range(MICROBATCHES):
            rows = {key: value[m * ROWS : (m + 1) * ROWS] for key, value in batch.items()}
            loss = whole(**rows).loss
            (loss / MICROBATCHES).backward()
            exact.append(loss.detach())
        losses: list[Tensor] = []
        runs.step(target=batch["labels"], losses=losses, return_outputs=False, **batch)
        worst.append(difference(losses, exact if losses else []))
        mine = {id(p) for module in own.values() for p in module.parameters()}
        pairs = zip(model.parameters(), whole.parameters(), strict=True)
        same = [(p.grad, q.grad) for p, q in pairs if id(p) in mine]
        worst.append(difference([p for p, _ in same], [q for _, q in same]))
    return largest(max(worst))


def work(rank: int, folder: str, ranks: int) -> None:
    join(rank, folder, ranks)
    cases = [("llama", "1f1b"), ("gpt2", "zbv")]
    leave(rank, folder, {f"{name} {schedule}": run(name, schedule, ranks) for name, schedule in cases})


if __name__ == "__main__":
    mp.spawn(work, (sys.argv[2], int(sys.argv[1])), nprocs=int(sys.argv[1]))
