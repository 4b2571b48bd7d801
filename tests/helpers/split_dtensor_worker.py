"""Two gloo ranks whose model consists of DTensors, trained whole in one process and split.

    python split_dtensor_worker.py FOLDER

Rank 0 writes FOLDER/results.json.
"""

import copy
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from ranks import join, leave
from split_vocab_worker import refusal
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import graphopt
from graphopt.vocab_exchange import ALGORITHMS, STREAMS, Way
from graphopt.vocab_parallel import (
    vocab_parallel_cross_entropy,
    vocab_parallel_embedding,
    vocab_parallel_linear,
)
from graphopt.vocab_shard import Shard as Rows

N, D, V = 9, 6, 11  # torch.chunk gives the ranks 6 and 5 words, a balanced split 5 and 6


class Model(nn.Module):
    """Embedding, a layer, a projection, a loss."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.layer = nn.Linear(D, D)
        self.head = nn.Linear(D, V, bias=not tied)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        """The loss of the next word."""
        z = self.head(torch.tanh(self.layer(self.embed(input_ids))))
        loss = F.cross_entropy(z[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1))
        return SimpleNamespace(loss=loss, logits=z)


def distributed(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """A copy whose parameters are DTensors: those of the vocabulary sharded, the others replicated."""
    made = copy.deepcopy(model)
    for module in made.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            placement = Shard(0) if parameter.shape[0] == V else Replicate()
            setattr(module, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [placement])))
    if made.head.bias is None:
        made.head.weight = made.embed.weight
    return made


def whole(tensor: Any) -> Tensor:
    """The numbers of a tensor on this rank."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def distance(a: Any, b: Any) -> float:
    """The largest difference."""
    return float((whole(a) - whole(b)).abs().max())


def train(model: nn.Module, batches: Any) -> list[Tensor]:
    """Three steps; the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for ids in batches:
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def model_case(mesh: DeviceMesh, tied: bool) -> dict[str, Any]:
    """A model of DTensors, split, beside the same one of plain tensors in one process."""
    torch.manual_seed(0)
    plain = Model(tied).double()
    start = distributed(plain, mesh).state_dict()
    model = distributed(plain, mesh)
    passes = [graphopt.SplitVocab(algorithm="two-barrier")]
    split = graphopt.optimize(model, mesh=mesh, passes=passes, device="cpu-generic")
    names = split.split_vocab.names
    batches = torch.randint(V, (3, 2, 7))
    given = [distribute_tensor(ids, mesh, [Replicate()]) for ids in batches]
    losses = [train(plain, batches), train(split, given)]
    trained = split.state_dict()
    logits = split(input_ids=given[0], labels=given[0]).logits
    found = {
        "rows": [split.get_parameter(name).shape[0] for name in names],
        "loss": max(distance(a, b) for a, b in zip(*losses, strict=True)),
        "loss type": type(losses[1][0]).__name__,
        "trained": max(distance(p, trained[name]) for name, p in plain.state_dict().items()),
        "logits": distance(plain(input_ids=batches[0], labels=batches[0]).logits, logits + 0),
        "placements": [str(trained[name].placements) for name in names],
    }
    distributed(plain, mesh).load_state_dict(trained)
    Model(tied).double().load_state_dict({k: whole(v) for k, v in trained.items()})
    split.load_state_dict(start)
    found["loaded"] = max(distance(a, start[k]) for k, a in split.state_dict().items())
    split.load_state_dict({k: whole(v) if k in names else v for k, v in trained.items()})
    found["loaded plain"] = max(distance(a, trained[k]) for k, a in split.state_dict().items())
    return found


def function_case(mesh: DeviceMesh) -> dict[str, float]:
    """Losses, logits and rows of DTensors, and their gradients, beside those of one process."""
    torch.manual_seed(1)
    numbers = [torch.randn(s, dtype=torch.float64) for s in ((N, D), (V, D), (V,))]
    targets = torch.randint(V, (N,))
    plain = [a.clone().requires_grad_() for a in numbers]
    want = F.cross_entropy(F.linear(*plain), targets)
    want.backward()
    found = {}
    for algorithm in ALGORITHMS:
        for stream in STREAMS:
            x, weight, bias = (
                distribute_tensor(a, mesh, [p]).requires_grad_()
                for a, p in zip(numbers, (Replicate(), Shard(0), Shard(0)), strict=True)
            )
            labels = distribute_tensor(targets, mesh, [Replicate()])
            way = Way(algorithm, stream, 2)
            loss = vocab_parallel_cross_entropy(x, weight, labels, bias=bias, way=way)
            loss.backward()
            pairs = [
                (loss, want),
                *((a.grad, b.grad) for a, b in zip((x, weight, bias), plain, strict=True)),
            ]
            assert x.grad.placements == (Replicate(),) and weight.grad.placements == (Shard(0),)
            found[f"{algorithm}, {stream}"] = max(distance(a, b) for a, b in pairs)
    logits = vocab_parallel_linear(x, weight, bias=bias)
    found["logits"] = distance(logits, F.linear(*numbers))
    found["rows"] = distance(vocab_parallel_embedding(labels, weight), F.embedding(targets, numbers[1]))
    return found


def refusals(mesh: DeviceMesh) -> dict[str, str]:
    """What is not taken."""
    x, weight = torch.randn(N, D), torch.randn(V, D)
    sharded = distribute_tensor(weight, mesh, [Shard(0)])
    grid = init_device_mesh("cpu", (2, 1), mesh_dim_names=("both", "alone"))
    alone = graphopt.SplitVocab(dim="alone")
    model = distributed(Model(False), mesh)
    balanced = Rows.on_mesh(V, mesh)
    calls: dict[str, Callable[[], Any]] = {
        "mesh": lambda: graphopt.optimize(model, mesh=grid, passes=[alone], device="cpu-generic"),
        "other shard": lambda: vocab_parallel_linear(x, sharded, balanced),
        "x": lambda: vocab_parallel_linear(distribute_tensor(x, mesh, [Shard(0)]), sharded),
        "columns": lambda: vocab_parallel_linear(x, distribute_tensor(weight, mesh, [Shard(1)])),
        "plain": lambda: vocab_parallel_linear(x, weight),
        "empty": lambda: vocab_parallel_linear(x, distribute_tensor(weight[:1], mesh, [Shard(0)])),
    }
    return {name: refusal(call) for name, call in calls.items()}


def work(rank: int, folder: str) -> None:
    """One rank."""
    join(rank, folder)
    mesh = init_device_mesh("cpu", (2,))
    found = {
        "untied": model_case(mesh, False),
        "tied": model_case(mesh, True),
        "functions": function_case(mesh),
        "refusals": refusals(mesh),
    }
    leave(rank, folder, found)


if __name__ == "__main__":
    mp.start_processes(work, (sys.argv[1],), nprocs=2, start_method="fork")
