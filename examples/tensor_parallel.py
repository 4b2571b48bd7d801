"""A Llama with tensor parallel layers, its transfers in an order that hides them.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py

Every process holds its share of the layers' weights and sees the same batches. The same step runs in the
captured order and in the planned one; losses and gradients are compared bit for bit.
"""

import argparse
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

import graphopt


def parse_arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description="Runs a tensor parallel Llama, captured and planned.")
    parser.add_argument("--layers", type=int, default=2, help="decoder layers (default 2)")
    parser.add_argument("--width", type=int, default=256, help="hidden size (default 256)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence (default 128)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps (default 5)")
    return parser.parse_args()


def make_model(mesh: DeviceMesh, layers: int, width: int) -> torch.nn.Module:
    """A Llama whose projections are split over `mesh`, with the same random weights on every rank."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    model.loss_type = "ForCausalLM"  # its default; unnamed, it logs a warning
    split_columns = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
    )
    plan = {f"model.layers.*.{name}": ColwiseParallel() for name in split_columns}
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        plan[f"model.layers.*.{name}"] = RowwiseParallel()
    return parallelize_module(model, mesh, plan)


def run(model: torch.nn.Module, ids: torch.Tensor, steps: int) -> tuple[float, list[torch.Tensor]]:
    """Seconds of a step (the least of `steps`), and its loss and gradients."""
    found = []
    for _ in range(steps + 1):  # the first one captures and plans
        model.zero_grad(set_to_none=True)
        begin = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append(time.perf_counter() - begin)
    gradients = [getattr(p.grad, "_local_tensor", p.grad) for p in model.parameters()]
    return min(found[1:]), [loss.detach(), *gradients]


def main() -> None:
    """Both orders, and what the plan says."""
    options = parse_arguments()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = make_model(mesh, options.layers, options.width)
    ids = torch.randint(0, 1024, (2, options.length))
    captured = graphopt.optimize(model, passes=[])
    planned = graphopt.optimize(model, passes=[graphopt.OverlapComm()])
    before, expected = run(captured, ids, options.steps)
    after, results = run(planned, ids, options.steps)
    same = all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    if dist.get_rank() == 0:
        print(planned.report)
        print(f"same bits: {same}; a step takes {after * 1e3:.1f} ms instead of {before * 1e3:.1f} ms")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
