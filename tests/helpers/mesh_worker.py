"""Two gloo ranks that train a Llama split by hand as its plan says, each measuring its peak.

The head stays whole: gloo's threads hold what is gathered for longer than the step does, which reduced
sums do not show.

    python mesh_worker.py FOLDER

Rank 0 writes FOLDER/results.json: for each rank the bytes of a step's peak, with what was live before it.
"""

import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ranks import join, leave
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import graphopt
from graphopt import zoo

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
BATCH, SEQ = 2, 64


def work(rank: int, folder: str) -> None:
    """One rank."""
    join(rank, folder)
    mesh = init_device_mesh("cpu", (2,))
    model = zoo.build("llama", overrides=SIZES)
    columns = [f"self_attn.{part}_proj" for part in "qkv"] + ["mlp.gate_proj", "mlp.up_proj"]
    plan: dict[str, Any] = {f"model.layers.*.{name}": ColwiseParallel() for name in columns}
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        plan[f"model.layers.*.{name}"] = RowwiseParallel()
    plan["model.embed_tokens"] = RowwiseParallel(input_layouts=Replicate())
    parallelize_module(model, mesh, plan)
    batch = zoo.example_batch("llama", model, BATCH, SEQ)
    optimized = graphopt.optimize(model, passes=[], device="cpu-generic")

    def step() -> None:
        optimized(**batch).loss.backward()

    step()
    model.zero_grad(set_to_none=True)
    peak = graphopt.measure(step).peak_bytes
    held = [getattr(p, "_local_tensor", p) for p in (*model.parameters(), *model.buffers())]
    static = sum(t.nbytes for t in (*held, *batch.values()) if isinstance(t, torch.Tensor))
    every: list[Any] = [None, None]
    dist.all_gather_object(every, peak + static)
    leave(rank, folder, every)


if __name__ == "__main__":
    mp.spawn(work, (sys.argv[1],), nprocs=2)
