"""Ranks of a gloo group that train a pipeline with a split vocabulary, and compare it with one process.

    python vocabulary_worker.py RANKS FOLDER

Rank 0 writes FOLDER/results.json.
"""

import copy
import sys
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from pipeline_worker import ONE, difference, held_by, largest, refused
from ranks import join, leave
from torch import Tensor, nn

from graphopt.distributed import pipeline_schedule
from graphopt.passes.stage_plan import PipelinePlan
from graphopt.passes.stage_schedule import plan_pipeline
from graphopt.passes.stage_vocab import VocabularyCost
from graphopt.pipeline_vocabulary import PipelineVocabulary
from graphopt.streamed import Head
from graphopt.vocab_loss import LossOptions

WORDS, WIDTH, ROWS, LENGTH = 37, 8, 2, 5
COST = VocabularyCost(0.3, 0.3, embedding_s=0.1)


def make_plan(ranks: int, schedule: str, algorithm: str, microbatches: int = 5) -> PipelinePlan:
    return plan_pipeline(
        [ONE] * ranks, microbatches, schedule=schedule, vocabulary=COST, algorithm=algorithm
    )


def make_model(stages: int, tied: bool) -> nn.ModuleList:
    """Embedding, head, and the stages, in float64."""
    torch.manual_seed(0)
    embedding, head = nn.Embedding(WORDS, WIDTH, padding_idx=3), nn.Linear(WIDTH, WORDS, bias=not tied)
    if tied:
        head.weight = embedding.weight
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(stages)]
    return nn.ModuleList([embedding, head, *blocks]).double()


def make_batch(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ids and targets [rows, LENGTH], of which some are ignored."""
    generator = torch.Generator().manual_seed(seed)
    ids, target = (torch.randint(WORDS, (rows, LENGTH), generator=generator) for _ in range(2))
    target[0, 0] = -100
    return ids, target


def alone(
    model: nn.ModuleList, ids: Tensor, target: Tensor, count: int, options: LossOptions, scale: Head
) -> list[Tensor]:
    """Losses of the microbatches in one process; gradients stay in the model."""
    losses = []
    for rows, words in zip(ids.chunk(count), target.chunk(count), strict=True):
        x = model[0](rows)
        for block in model[2:]:
            x = block(x)
        logits = model[1](x).flatten(0, 1) * scale.inner
        logits = scale.cap * torch.tanh(logits / 1.0) if scale.cap else logits
        loss = F.cross_entropy(logits, words.flatten(), label_smoothing=options.label_smoothing)
        (loss / count).backward()
        losses.append(loss.detach())
    return losses


def compare(plan: PipelinePlan, tied: bool, streamed: bool, smoothing: float, scale: Head) -> float:
    """The worst difference on any rank of losses and gradients, over two steps and an evaluation."""
    rank, count, options = dist.get_rank(), plan.microbatches, LossOptions(label_smoothing=smoothing)
    whole, model = make_model(plan.stages, tied), make_model(plan.stages, tied)
    vocabulary = PipelineVocabulary(
        model[0], model[1], options=options, scale=scale, streamed=streamed, block=7
    )
    own: dict[int, nn.Module] = {s: model[2 + s] for s in held_by(plan, rank)}
    schedule = pipeline_schedule(plan, own, None, make_batch(ROWS, 0)[:1], vocabulary=vocabulary)
    worst = [0.0]
    for step in (1, 2):
        ids, target = make_batch(count * ROWS, step)
        whole.zero_grad()
        exact = alone(whole, ids, target, count, options, scale)
        for module in (vocabulary, *own.values()):
            module.zero_grad()
        for run in (schedule.eval, schedule.step):
            losses: list[Tensor] = []
            run(ids, target=target, losses=losses)
            worst.append(difference(losses, exact))
        part = vocabulary.shard.part
        pairs = [(vocabulary.head, part(whole[1].weight.grad)), (vocabulary.embedding, None)]
        pairs[1] = (vocabulary.embedding, part(whole[0].weight.grad))
        if vocabulary.bias is not None:
            pairs.append((vocabulary.bias, part(whole[1].bias.grad)))
        for stage, module in own.items():
            pairs += [
                (p, q.grad)
                for p, q in zip(module.parameters(), whole[2 + stage].parameters(), strict=True)
            ]
        worst.append(difference([p.grad for p, _ in pairs], [q for _, q in pairs]))
    return largest(max(worst))


def cases(ranks: int) -> dict[str, float]:
    """Every algorithm in every schedule, with one weight or two, with logits kept or made again."""
    found = {}
    for schedule, algorithm in product(("1f1b", "v-half"), ("vocab-1", "vocab-2")):
        plan = make_plan(ranks, schedule, algorithm)
        for tied, streamed in product((True, False), repeat=2):
            capped = Head(1.0, 5.0) if algorithm == "vocab-1" and tied else Head(0.5)
            smoothing = 0.1 if tied != streamed else 0.0
            name = f"{schedule} {algorithm} {'one weight' if tied else 'two'} {streamed}"
            found[name] = compare(plan, tied, streamed, smoothing, capped)
    return found


def refusals(ranks: int) -> dict[str, str]:
    """What does not fit, by the same error on every rank."""
    x, rank = make_batch(ROWS, 0)[:1], dist.get_rank()
    right, plain = make_plan(ranks, "1f1b", "vocab-2"), plan_pipeline([ONE] * ranks, 4, schedule="1f1b")
    model = make_model(ranks, True)
    own = {rank: model[2 + rank]}
    good, capped = (PipelineVocabulary(model[0], model[1], scale=Head(1.0, cap)) for cap in (0.0, 5.0))

    def schedule(plan: PipelinePlan, vocabulary: Any, loss: Any = None) -> Any:
        return lambda: pipeline_schedule(plan, own, loss, x, vocabulary=vocabulary)

    short = copy.copy(model[0])
    short.weight = nn.Parameter(model[0].weight[:-1])
    runs = {
        "absent": schedule(right, None),
        "extra": schedule(plain, good),
        "loss": schedule(right, good, F.cross_entropy),
        "cap": schedule(right, capped),
        "naive": schedule(make_plan(ranks, "1f1b", "vocab-naive"), good),
        "target": lambda: pipeline_schedule(right, own, None, x, vocabulary=good).step(
            make_batch(ROWS * 5, 0)[0]
        ),
        "ids": lambda: pipeline_schedule(right, own, None, x, vocabulary=good).step(
            target=make_batch(ROWS * 5, 0)[1]
        ),
        "shapes": lambda: PipelineVocabulary(short, model[1]),
        "reduction": lambda: PipelineVocabulary(None, model[1], options=LossOptions(reduction="none")),
    }
    return {name: refused(run) for name, run in runs.items()}


def work(rank: int, folder: str, ranks: int) -> None:
    join(rank, folder, ranks)
    leave(rank, folder, {"worst": cases(ranks), "refusals": refusals(ranks)})


if __name__ == "__main__":
    mp.spawn(work, (sys.argv[2], int(sys.argv[1])), nprocs=int(sys.argv[1]))
