"""Two gloo ranks that run tensor parallel models on parts of one text, or on shares of its tokens.

    python sequence_split_worker.py FOLDER

Rank 0 writes FOLDER/results.json.
"""

import sys
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from batch_split_worker import FREE, compared, gpt2
from overlap_worker import PASS, llama, refusal, step
from ranks import join, leave
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import MixtralConfig, MixtralForCausalLM, Qwen2Config, Qwen2ForCausalLM

import graphopt
from graphopt import OverlapComm

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "use_cache": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def qwen2(mesh: DeviceMesh) -> nn.Module:
    """A tiny Qwen2, whose projections have biases, with tensor parallel layers."""
    columns = [f"self_attn.{part}_proj" for part in "qkv"] + ["mlp.gate_proj", "mlp.up_proj"]
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    return split(model, mesh, columns, ["self_attn.o_proj", "mlp.down_proj"])


def mixtral(mesh: DeviceMesh) -> nn.Module:
    """A tiny Mixtral with tensor parallel attention, and all experts on every rank."""
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))
    return split(model, mesh, [f"self_attn.{part}_proj" for part in "qkv"], ["self_attn.o_proj"])


def split(model: nn.Module, mesh: DeviceMesh, columns: list[str], rows: list[str]) -> nn.Module:
    """`model` with its products `columns`, and behind them `rows`, split over the ranks."""
    plan: dict[str, Any] = {f"model.layers.*.{part}": ColwiseParallel() for part in columns}
    plan |= {f"model.layers.*.{part}": RowwiseParallel() for part in rows}
    return parallelize_module(model, mesh, plan)


def inference(model: nn.Module, inputs: dict[str, Tensor], chosen: OverlapComm) -> dict[str, Any]:
    """Logits on parts of a text beside those on the whole of it."""
    optimized = graphopt.optimize(model, passes=[chosen], device="cpu-generic")
    with torch.no_grad():
        plain, ours = model(**inputs).logits, optimized(**inputs).logits
    plan = optimized._graphopt.log.records[0].steps[0].plan
    every: list[Any] = [None, None]
    dist.all_gather_object(every, plan.to_json())
    return {
        "equal": torch.equal(plain, ours),
        "error": (plain - ours).abs().max().item() / plain.abs().max().item(),
        "same plan": every[0] == every[1],
        "along": plan.along,
        "parts": plan.parts,
        "cut": len(plan.cut),
        "transfers": len(plan.transfers),
        "seconds": [plan.seconds_before, plan.seconds, plan.bound_seconds],
        "remark": plan.remark,
    }


def every(mesh: DeviceMesh) -> dict[str, Any]:
    """Other models, lengths, numbers of parts, training, and twice the precision."""
    models = {"llama": llama(mesh), "qwen2": qwen2(mesh), "mixtral": mixtral(mesh)}
    models["gpt2"] = gpt2(mesh.get_group().group_name)
    ids, long = torch.randint(0, 64, (1, 32)), {"input_ids": torch.randint(0, 64, (1, 640))}
    text, halves = {"input_ids": ids}, replace(PASS, split=2)
    found: dict[str, Any] = {name: inference(model, text, halves) for name, model in models.items()}
    found["long"] = inference(models["llama"], long, halves)
    found["chosen"] = inference(models["llama"], long, replace(PASS, split=None))
    found["refused"] = inference(models["llama"], text, OverlapComm(links=FREE))
    for name, model in models.items():
        both = {**text, "labels": ids}
        model.config.loss_type = "ForCausalLM"
        plain = step(model, [], both)[0]
        found[f"{name} training"] = compared(model, halves, both, plain)
        for exact in (True, False) if name in ("llama", "gpt2") else ():
            shares = replace(PASS, sequence_parallel=True, exact=exact)
            found[f"{name} {'' if exact else 'partial '}shares"] = compared(model, shares, both, plain)
    masked = text | {"attention_mask": torch.ones(1, 32, dtype=torch.long)}
    found["masked"] = refusal(lambda: inference(models["llama"], masked, halves))
    torch.set_default_dtype(torch.float64)
    loose = replace(halves, exact=False)
    found["double"] = inference(llama(mesh), text, loose)
    found["double thirds"] = inference(llama(mesh), text, replace(loose, split=3))
    return found


def work(rank: int, folder: str) -> None:
    """One rank."""
    join(rank, folder)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    leave(rank, folder, every(mesh))


if __name__ == "__main__":
    mp.spawn(work, (sys.argv[1],), nprocs=2)
