"""Two gloo ranks that train a data parallel model, eager and optimized.

    python data_parallel_worker.py MODE FOLDER

MODE says where the model is optimized: "inside" the data parallel wrapper, "buckets" (inside, and
gradients travel in buckets), or "outside" of it. Rank 0 writes FOLDER/results.json.
"""

import copy
import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ranks import join, leave
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import graphopt


class Net(nn.Module):
    """Six layers of `width` features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        """x [rows, width]; the same shape."""
        for layer in self.layers:
            x = nn.functional.gelu(layer(x))
        return x


def train(net: nn.Module, rank: int, width: int) -> list[Tensor]:
    """The gradients of the third step."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    for step in range(3):
        torch.manual_seed(10 * step + rank)
        loss = net(torch.randn(4 * width, width)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [p.grad for p in net.parameters() if p.grad is not None]


def optimized(net: nn.Module, mode: str) -> tuple[nn.Module, Any]:
    """The data parallel model, and what `optimize` gave back."""
    if mode == "outside":
        ours = graphopt.optimize(DistributedDataParallel(net), memory="min", device="cpu-generic")
        return ours, ours
    ours = graphopt.optimize(net, memory="min", device="cpu-generic")
    return DistributedDataParallel(ours, bucket_cap_mb=1), ours


def work(rank: int, mode: str, folder: str) -> None:
    """One rank."""
    join(rank, folder)
    torch.manual_seed(0)
    width = 320 if mode == "buckets" else 64  # 2.5 MB of parameters, in buckets of 1 MB
    plain = Net(width)
    model, ours = optimized(copy.deepcopy(plain), mode)
    eager = train(DistributedDataParallel(plain, bucket_cap_mb=1), rank, width)
    gradients = train(model, rank, width)
    everywhere = [torch.empty_like(gradients[0]) for _ in range(2)]
    dist.all_gather(everywhere, gradients[0])
    records = ours._graphopt.log.records
    again = [n.name for r in records for n in r.after.graph.nodes if n.name.endswith("_again")]
    found = {
        "same": [torch.equal(a, b) for a, b in zip(eager, gradients, strict=True)],
        "shared": torch.equal(*everywhere),
        "products again": sum(name.startswith("addmm") for name in again),
        "graphs": len(records),
    }
    leave(rank, folder, found)


if __name__ == "__main__":
    mp.spawn(work, (sys.argv[1], sys.argv[2]), nprocs=2)
