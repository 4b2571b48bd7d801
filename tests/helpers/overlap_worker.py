"""Two gloo ranks that run models with their transfers in a planned order, beside the captured one.

    python overlap_worker.py FOLDER

Rank 0 writes FOLDER/results.json. At last rank 1 leaves without a word, while rank 0 wants to plan.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ranks import join
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

import graphopt
from graphopt import GraphoptError, OverlapComm
from graphopt.cost_models.devices import GENERIC_CPU, Cluster
from graphopt.cost_models.link_costs import LinkCosts
from graphopt.ranks import check_same, largest

collectives: Any = torch.ops._c10d_functional
CLUSTER = Cluster(GENERIC_CPU, 2, 50e6, 20e-6, "a link that is worth hiding")
PASS = OverlapComm(links=LinkCosts(CLUSTER), split=1)


class Branches(nn.Module):
    """Two branches that sum, scatter and gather over the ranks, with dropout in between."""

    def __init__(self, group: str) -> None:
        super().__init__()
        self.group = group
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """x [rows, 32]; a number."""
        first, second = x, x.flip(0)
        for layer in self.layers[:2]:
            first = nn.functional.dropout(Summed.apply(layer(first), self.group), 0.5)
        for layer in self.layers[2:]:
            second = Regathered.apply(nn.functional.dropout(layer(second), 0.5), self.group)
        return (first * second).sum()


class Uneven(nn.Module):
    """A sum over the ranks beside work on a tensor of which each rank has another number of rows."""

    def __init__(self, group: str) -> None:
        super().__init__()
        self.group = group
        self.shared, self.own = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        """x [8, 32], rows [any, 32]; a number."""
        total = Summed.apply(self.shared(x), self.group)
        return total.tanh().sum() + self.own(rows).tanh().sum()


class Summed(torch.autograd.Function):
    """The sum over the ranks; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return collectives.wait_tensor(collectives.all_reduce(x, "sum", group))  # type: ignore

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        begun = collectives.all_reduce(gradients[0].contiguous(), "sum", ctx.group)
        return collectives.wait_tensor(begun), None


class Regathered(torch.autograd.Function):
    """The sum over the ranks, each of which adds up a part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        part = collectives.wait_tensor(collectives.reduce_scatter_tensor(x, "sum", 2, group))
        return collectives.wait_tensor(collectives.all_gather_into_tensor(part, 2, group))  # type: ignore

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return Regathered.apply(gradients[0].contiguous(), ctx.group), None


def llama(mesh: DeviceMesh) -> nn.Module:
    """A tiny Llama with tensor parallel layers."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    config.loss_type = "ForCausalLM"
    model = LlamaForCausalLM(config)
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    plan: dict[str, Any] = {f"model.layers.*.{name}": ColwiseParallel() for name in columns}
    plan |= {
        f"model.layers.*.{name}": RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")
    }
    return parallelize_module(model, mesh, plan)


def step(model: nn.Module, passes: list[Any], inputs: dict[str, Tensor]) -> tuple[list[Tensor], Any]:
    """Outputs and gradients of one step, and the plan."""
    optimized = graphopt.optimize(model, passes=passes, device="cpu-generic")
    model.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    output = optimized(**inputs)
    results = [output] if isinstance(output, Tensor) else [output.loss, output.logits]
    results[0].backward()
    gradients = [getattr(p.grad, "_local_tensor", p.grad) for p in model.parameters()]
    (record,) = optimized._graphopt.log.records
    plans = [s.plan for s in record.steps]
    return [r.detach().clone() for r in (*results, *gradients)], (*plans, str(optimized.report))


def runs_as_planned(model: nn.Module, inputs: dict[str, Tensor]) -> bool:
    """Whether the products and collectives that run are those of the plan, in its order."""
    optimized = graphopt.optimize(model, passes=[PASS], device="cpu-generic")
    optimized(**inputs)
    with torch.profiler.profile() as seen:
        optimized(**inputs).backward()
    (record,) = optimized._graphopt.log.records
    nodes = {node.name: node for node in record.after.operators()}
    targets = [nodes[name].target for name in record.steps[0].plan.order]
    planned = [t._schema.name for t in targets if isinstance(t, torch._ops.OpOverload)]
    noted = {name for name in planned if name in ("aten::mm", "aten::addmm") or "c10d" in name}
    events = sorted(seen.events(), key=lambda event: event.time_range.start)
    ran = [event.name for event in events if event.name in noted]
    return len(noted) == 6 and ran == [name for name in planned if name in noted]


def compared(
    model: nn.Module, chosen: OverlapComm, inputs: dict[str, Tensor], plain: list[Tensor]
) -> dict[str, Any]:
    """A model's step in the planned order beside what the captured one gave."""
    ours, (plan, report) = step(model, [chosen], inputs)
    exposed = [sum(row[i] for row in plan.transfers) for i in (5, 6)]
    every: list[Any] = [None, None]
    dist.all_gather_object(every, plan.to_json())
    return {
        "equal": [torch.equal(a, b) for a, b in zip(plain, ours, strict=True)],
        "nonzero": [bool(a.any()) for a in plain],
        "seconds": [plan.seconds_before, plan.seconds, plan.bound_seconds],
        "exposed": exposed,
        "kinds": sorted({row[1] for row in plan.transfers}),
        "sources": sorted({row[4] for row in plan.transfers}),
        "transfers": len(plan.transfers),
        "same plan": every[0] == every[1],
        "report": report,
        "plan": str(plan),
    }


def refusal(call: Callable[[], Any]) -> list[str]:
    """What both ranks say."""
    try:
        call()
        said = "nothing"
    except GraphoptError as error:
        said = f"{type(error).__name__}: {error}"
    every: list[Any] = [None, None]
    dist.all_gather_object(every, said)
    return every


def refusals(rank: int, group: str) -> dict[str, list[str]]:
    """What is said where the ranks do not do the same."""
    x = {"x": torch.randn(8, 32)}

    def other_model() -> None:
        last = nn.ReLU() if rank else nn.Tanh()
        step(nn.Sequential(Branches(group), last), [PASS], {"input": x["x"]})

    return {
        "graph": refusal(other_model),
        "options": refusal(
            lambda: step(Branches(group), [OverlapComm(links=PASS.links, seed=rank, split=1)], x)
        ),
        "order": refusal(lambda: check_same([group], ["a", "b", str(rank)], "the planned orders")),
        "length": refusal(lambda: check_same([group], ["a"] * (1 + rank), "the graphs")),
    }


def work(rank: int, folder: str) -> None:
    """One rank."""
    join(rank, folder)
    mesh = init_device_mesh("cpu", (2,))
    group = mesh.get_group().group_name
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (2, 16))
    inputs = {"x": torch.randn(8, 32)}
    branches = Branches(group)
    slower = LinkCosts(Cluster(GENERIC_CPU, 2, 50e6 / (1 + rank), 20e-6, "slower on rank 1"))
    plain, _ = step(branches, [], inputs)
    uneven, rows = Uneven(group), {**inputs, "rows": torch.randn(4 + 9 * rank, 32)}
    tight = OverlapComm(links=PASS.links, memory=1.0, split=1)
    model, text = llama(mesh), {"input_ids": ids, "labels": ids}
    found: dict[str, Any] = {
        "llama": compared(model, PASS, text, step(model, [], text)[0]),
        "branches": compared(branches, PASS, inputs, plain),
        "measured": compared(branches, OverlapComm(split=1), inputs, plain),
        "slower": compared(branches, OverlapComm(links=slower, split=1), inputs, plain),
        "uneven": compared(uneven, tight, rows, step(uneven, [], rows)[0]),
        "refused": refusals(rank, group),
        "as planned": runs_as_planned(branches, inputs),
        "largest": largest([group], [float(rank), 3.0 - rank], "the numbers"),
    }
    if rank == 1:
        os._exit(0)
    try:
        check_same([group], ["a"], "the graphs")
    except GraphoptError as error:
        found["alone"] = str(error)
    Path(folder, "results.json").write_text(json.dumps(found))
    os._exit(0)


if __name__ == "__main__":
    mp.spawn(work, (sys.argv[1],), nprocs=2)
