"""Trains a small transformer as a pipeline over the processes of torchrun.

    torchrun --nproc-per-node 2 examples/train_pipeline.py

The layers are timed, cut into stages, and scheduled; every process holds its stages only. A plain copy
takes the same steps on the last rank, for comparison.
"""

import argparse
import copy
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.cost_models.stage_costs import StageCost
from graphopt.distributed import pipeline_schedule
from graphopt.passes.stage_partition import even_stages
from graphopt.passes.stage_schedule import plan_pipeline

WORDS = 100


def parse_arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description="Trains a small transformer as a pipeline.")
    parser.add_argument("--steps", type=int, default=5, help="training steps (default 5)")
    parser.add_argument("--layers", type=int, default=8, help="layers of the transformer (default 8)")
    parser.add_argument("--width", type=int, default=128, help="embedding size (default 128)")
    parser.add_argument("--length", type=int, default=64, help="tokens of a sequence (default 64)")
    parser.add_argument("--microbatches", type=int, default=8, help="sequences of a step (default 8)")
    parser.add_argument("--schedule", default="best", help="1f1b, zbv, ...: see plan_pipeline")
    return parser.parse_args()


def make_layers(layers: int, width: int) -> list[nn.Module]:
    """An embedding, the blocks, and the head, with the same random weights on every rank."""
    torch.manual_seed(0)
    block = dict(nhead=4, dim_feedforward=4 * width, dropout=0.0, batch_first=True)
    blocks = [nn.TransformerEncoderLayer(width, **block) for _ in range(layers)]
    return [nn.Embedding(WORDS, width), *blocks, nn.Linear(width, WORDS)]


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean over the tokens of a microbatch."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def seconds_of(layers: list[nn.Module], ids: Tensor) -> list[float]:
    """Forward and backward of each layer, as rank 0 measures it: all ranks have to plan the same."""
    found, value = [], ids
    for layer in layers:
        for _ in range(2):  # the first run is not counted
            begin = time.perf_counter()
            output = layer(value)
            output.sum().backward()
            seconds = time.perf_counter() - begin
        found.append(seconds)
        value = output.detach().requires_grad_()
        layer.zero_grad()
    dist.broadcast_object_list(found, 0)
    return found


def main() -> None:
    """Plans, trains both, and prints losses from the last rank."""
    arguments = parse_arguments()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, ranks = dist.get_rank(), dist.get_world_size()

    layers = make_layers(arguments.layers, arguments.width)
    shape = (arguments.microbatches, arguments.length)
    example = torch.zeros(1, arguments.length, dtype=torch.long)
    seconds = seconds_of(layers, example)
    parts = even_stages(seconds, 2 * ranks)  # two stages to a rank
    costs = [StageCost(*(sum(seconds[i] for i in part) / 3,) * 3) for part in parts]
    pairs = [
        StageCost(*((a.forward_s + b.forward_s),) * 3)
        for a, b in zip(costs[::2], costs[1::2], strict=True)
    ]
    plan = plan_pipeline(pairs, arguments.microbatches, schedule=arguments.schedule)
    if plan.stages == ranks:
        parts = tuple((*a, *b) for a, b in zip(parts[::2], parts[1::2], strict=True))
    stages = [nn.Sequential(*(layers[i] for i in part)) for part in parts]
    plain = nn.Sequential(*copy.deepcopy(layers))
    own = {s: stages[s] for s in range(plan.stages) if rank in plan.stage_devices[s]}
    schedule = pipeline_schedule(plan, own, loss_of, (example,))
    parameters = [p for module in own.values() for p in module.parameters()]
    optimizers = [torch.optim.AdamW(p, lr=3e-3) for p in (plain.parameters(), parameters)]

    is_last = plan.stages - 1 in own
    if is_last:
        print(plan, "\n\n     one process      pipeline", sep="")
    generator = torch.Generator().manual_seed(1)
    for number in range(arguments.steps):
        ids = torch.randint(WORDS, shape, generator=generator)
        targets = (ids + 1) % WORDS
        losses: list[Tensor] = []
        schedule.step(*([ids] if 0 in own else []), target=targets if is_last else None, losses=losses)
        if is_last:
            loss = loss_of(plain(ids), targets)
            loss.backward()
            print(f"{number + 1:3} {loss.item():12.6f} {torch.stack(losses).mean().item():13.6f}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
