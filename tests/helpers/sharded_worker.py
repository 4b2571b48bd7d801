"""Two gloo ranks that train models whose parameters are in shards, within less and less memory.

    python sharded_worker.py [deep] FOLDER

Rank 0 writes FOLDER/results.json. "deep" is one Llama of more layers instead.
"""

import copy
import random
import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from overlap_worker import refusal
from ranks import join, leave
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

import graphopt
from graphopt import OverlapComm
from graphopt.cost_models.devices import GENERIC_CPU, Cluster
from graphopt.cost_models.link_costs import LinkCosts
from graphopt.passes.gathered_parameters import gathered_again, gathers_of
from graphopt.program import Program, Role

LINKS = LinkCosts(Cluster(GENERIC_CPU, 2, 2e9, 1e-7, "a link that is worth hiding"))


class Shared(nn.Module):
    """Tied weights, a bias of odd size, a frozen weight, and one that divides in its second dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.odd = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.randn(8), requires_grad=False)
        self.spare = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        """x [rows, 8]; a number."""
        hidden = self.second(torch.tanh(self.first(x)) * self.scale)
        return (self.odd(hidden) ** 2).mean() + (self.spare**2).sum()


def llama(layers: int = 1, width: int = 32) -> nn.Module:
    """A tiny Llama."""
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    config.loss_type = "ForCausalLM"
    return LlamaForCausalLM(config)


def references(model: nn.Module, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    """The gradients of the mean loss of all batches, in float64 and in one process."""
    model = copy.deepcopy(model).double()
    for batch in batches:
        given = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
        output = model(**given)
        ((output if isinstance(output, Tensor) else output.loss) / len(batches)).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def agree(model: nn.Module, expected: list[Tensor]) -> bool:
    """Whether the gradients of all shards are those of the whole model."""
    found = [p.grad for p in model.parameters() if p.grad is not None]
    whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in found]
    pairs = zip(whole, expected, strict=True)
    return all(torch.allclose(a.double(), b, atol=1e-5, rtol=1e-4) for a, b in pairs)


def step(model: nn.Module, passes: list[Any], inputs: dict[str, Tensor]) -> tuple[list[Tensor], Any]:
    """The loss and the gradients of a step, and the optimised model."""
    optimized = graphopt.optimize(model, passes=passes, device="cpu-generic")
    model.zero_grad(set_to_none=True)
    output = optimized(**inputs)
    loss = output if isinstance(output, Tensor) else output.loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [loss.detach(), *(g.to_local().clone() for g in gradients)], optimized


def compared(model: nn.Module, chosen: OverlapComm, inputs: dict[str, Tensor], plain: Any) -> Any:
    """A planned step beside what the captured one gave."""
    ours, optimized = step(model, [chosen], inputs)
    (record,) = optimized._graphopt.log.records
    plan, every = record.steps[0].plan, [None, None]
    dist.all_gather_object(every, plan.to_json())
    return {
        "equal": [torch.equal(a, b) for a, b in zip(plain, ours, strict=True)],
        "nonzero": [bool(a.any()) for a in plain],
        "again": len(plan.again),
        "peaks": [plan.peak_bytes_before, plan.peak_bytes],
        "same plan": every[0] == every[1],
        "reported": "gathered again; up to" in str(optimized.report),
    }


def subsets(program: Program) -> list[bool]:
    """Whether `program` gives the same bits when any of its parameters are gathered again."""
    generator = torch.Generator().manual_seed(3)
    inputs = [node for node in program.graph.nodes if node.op == "placeholder"]
    values = [_value(program, node, generator) for node in inputs]
    expected = torch.fx.Interpreter(program.module).run(*values)
    names = [g.start.name for g in gathers_of(program) if g.is_saved]
    found = []
    for seed in range(3):
        chosen = random.Random(seed).sample(names, (len(names) + seed) // 2)
        again = gathered_again(program, chosen)
        late = [g.start.name for g in gathers_of(again) if g.start.name.endswith("_again")]
        results = torch.fx.Interpreter(again.module).run(*values)
        tensors = [(a, b) for a, b in zip(results, expected, strict=True) if isinstance(a, Tensor)]
        found.append(len(late) == len(chosen) and all(torch.equal(a, b) for a, b in tensors))
    return found


def _value(program: Program, node: Any, generator: torch.Generator) -> Any:
    val = node.meta["val"]
    if not isinstance(val, Tensor):
        return val
    if not val.is_floating_point():
        return torch.randint(0, 8, val.shape, generator=generator)
    size = 1.0 if program.roles[node.name] is Role.PARAMETER else 0.1
    return size * torch.randn(val.shape, generator=generator)


def refusals(mesh: DeviceMesh) -> dict[str, list[str]]:
    """What cannot be sharded, or captured."""
    torchs = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fully_shard(torchs[0], mesh=mesh)
    ours = graphopt.shard_parameters(nn.Linear(4, 4), mesh)
    plane = init_device_mesh("cpu", (1, 2))
    small = OverlapComm(links=LINKS, split=1, memory=50)
    return {
        "fully_shard": refusal(lambda: graphopt.optimize(torchs, passes=[])),
        "fully_shard, sharded": refusal(lambda: graphopt.shard_parameters(torchs, mesh)),
        "twice": refusal(lambda: graphopt.shard_parameters(ours, mesh)),
        "plane": refusal(lambda: graphopt.shard_parameters(nn.Linear(4, 4), plane)),
        "recurrent": refusal(lambda: graphopt.shard_parameters(nn.LSTM(4, 4), mesh)),
        "too little": refusal(
            lambda: step(nn.Sequential(ours, Sum()), [small], {"input": torch.ones(2, 4)})
        ),
    }


class Sum(nn.Module):
    """A number, so that there is a loss."""

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape."""
        return x.sum()


def deep(rank: int, folder: str) -> None:
    """One rank of a Llama of eight layers, free and with room for two gathered layers."""
    join(rank, folder)
    torch.manual_seed(rank)
    model = graphopt.shard_parameters(llama(8, 64), init_device_mesh("cpu", (2,)))
    ids = torch.randint(0, 64, (1, 16))
    inputs = {"input_ids": ids, "labels": ids}
    plain, _ = step(model, [], inputs)
    links = LinkCosts(Cluster(GENERIC_CPU, 2, 1e9, 1e-6, "example"))
    found: dict[str, Any] = {}
    others, memory = 0, None
    for name in ("free", "tight"):
        ours, made = step(model, [OverlapComm(links=links, split=1, memory=memory)], inputs)
        plan = made._graphopt.log.records[0].steps[0].plan
        layer = sum(row[2] for row in plan.gathers if row[3] != "again" and ".layers.0." in row[1])
        others = others or plan.peak_bytes - plan.gathered_bytes
        memory = others + 2 * layer
        found[name] = {
            "equal": all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True)),
            "seconds": plan.seconds,
            "gap": plan.gap,
            "gathered": plan.gathered_bytes,
            "room": plan.peak_bytes - others,
            "again": len(plan.again),
        }
    leave(rank, folder, found)


def work(rank: int, folder: str) -> None:
    """One rank."""
    join(rank, folder)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    shared = Shared()
    ids, rows = torch.randint(0, 64, (4, 8)), torch.randn(8, 8)
    text = [{"input_ids": i, "labels": i} for i in ids.split(2)]
    found: dict[str, Any] = {}
    for name, model, batches, memory in (
        ("llama", llama(), text, 0.9),
        ("shared", shared, [{"x": r} for r in rows.split(4)], 0.95),
    ):
        expected, names = references(model, batches), list(model.state_dict())
        sharded, inputs = graphopt.shard_parameters(model, mesh), batches[rank]
        plain, captured = step(sharded, [], inputs)
        tight = OverlapComm(links=LINKS, split=1, memory=memory)
        found[name] = {
            "right": agree(sharded, expected),
            "names": names == list(sharded.state_dict()),
            "subsets": subsets(captured._graphopt.log.records[0].before),
            "tight": compared(sharded, tight, inputs, plain),
        }
    free = OverlapComm(links=LINKS, split=1)
    found["shared"]["free"] = compared(shared, free, inputs, plain)
    with torch.no_grad():
        ours = graphopt.optimize(shared, passes=[OverlapComm(links=LINKS)])
        found["inference"] = torch.equal(ours(rows), shared(rows))
    found["refused"] = refusals(mesh)
    leave(rank, folder, found)


if __name__ == "__main__":
    mp.spawn(deep if "deep" in sys.argv[1:-1] else work, (sys.argv[-1],), nprocs=2)
