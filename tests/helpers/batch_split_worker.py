"""Two gloo ranks that run tensor parallel models on parts of the batch, beside the whole of it.

    python batch_split_worker.py FOLDER

Rank 0 writes FOLDER/results.json.
"""

import sys
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from overlap_worker import PASS, Summed, collectives, llama, refusal, step
from ranks import join, leave
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import graphopt
from graphopt import OverlapComm
from graphopt.cost_models.devices import GENERIC_CPU, Cluster
from graphopt.cost_models.link_costs import LinkCosts

FREE = LinkCosts(Cluster(GENERIC_CPU, 2, 1e12, 1e-3, "a link that is slow to start"))


class Copied(torch.autograd.Function):
    """The same on all ranks; the gradient is the sum over them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        begun = collectives.all_reduce(gradients[0].contiguous(), "sum", ctx.group)
        return collectives.wait_tensor(begun), None


class Layer(nn.Module):
    """A layer whose second product is summed over the ranks."""

    def __init__(self, group: str) -> None:
        super().__init__()
        self.group, self.first, self.second = group, nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        """x [rows, 32]; a number."""
        hidden = torch.nn.functional.gelu(self.first(x))
        return (x + Summed.apply(self.second(hidden), self.group)).tanh().sum()


class Totals(nn.Module):
    """Sums over the ranks of what has the same size everywhere, beside an input that may not."""

    def __init__(self, group: str) -> None:
        super().__init__()
        self.group, self.linear = group, nn.Linear(4, 4)

    def forward(self, rows: Tensor, weights: Tensor, x: Tensor) -> Tensor:
        """rows and weights [any, 4], x [8, 4]; a number."""
        return Summed.apply(self.linear(x), self.group).sum() + (rows * weights).sum()


class Sent(torch.autograd.Function):
    """A half of the tensor to each rank; so are its gradients, back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group, half = group, [len(x) // 2] * 2
        begun = collectives.all_to_all_single(x.contiguous(), half, half, group)
        return collectives.wait_tensor(begun)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return Sent.apply(gradients[0], ctx.group), None


class Experts(nn.Module):
    """Two experts of this rank for the tokens [4 experts, capacity, 8] of all ranks."""

    def __init__(self, group: str) -> None:
        super().__init__()
        self.group = group
        self.first, self.second = (nn.Parameter(torch.randn(2, *s)) for s in ((8, 16), (16, 8)))

    def forward(self, x: Tensor) -> Tensor:
        """The same shape, each token by its expert."""
        mine = Sent.apply(x, self.group).view(2, 2, -1, 8).transpose(0, 1)
        hidden = nn.functional.silu(torch.bmm(mine.reshape(2, -1, 8), self.first))
        back = torch.bmm(hidden, self.second).view(2, 2, -1, 8).transpose(0, 1)
        return Sent.apply(back.reshape(x.shape), self.group) + x


class Trained(nn.Module):
    """Experts behind a layer whose gradient the tokens carry, and a number of what they give."""

    def __init__(self, group: str) -> None:
        super().__init__()
        self.experts, self.before = Experts(group), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        """x [4 experts, capacity, 8]."""
        return self.experts(self.before(x)).sin().sum()


def chunked(rank: int, group: str) -> list[Any]:
    """For numbers of chunks: how many it was, how many transfers, and whether the bits are the same."""
    torch.manual_seed(rank)
    model, x, found = Experts(group), torch.randn(4, 24, 8), []
    for chosen in (2, 3, None):
        pass_ = OverlapComm(links=PASS.links, capacity_split=chosen, exact=False)
        optimized = graphopt.optimize(model, passes=[pass_], device="cpu-generic")
        with torch.no_grad():
            equal, close = torch.equal(model(x), optimized(x)), torch.allclose(model(x), optimized(x))
        plan = optimized._graphopt.log.records[0].steps[0].plan
        found.append([plan.chunks, len(plan.transfers), equal, close])
    exact = OverlapComm(links=PASS.links, capacity_split=2)
    found.append(refusal(lambda: graphopt.optimize(model, passes=[exact])(x[:, :1])))
    trained = Trained(group)
    loose = replace(exact, exact=False)
    found.append(compared(trained, loose, {"x": x}, step(trained, [], {"x": x})[0]))
    return found


def gpt2(group: str) -> nn.Module:
    """A tiny GPT-2, each rank with two of its four heads and half of its MLP."""
    config = GPT2Config(
        vocab_size=64,
        n_positions=32,
        n_embd=32,
        n_layer=1,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    config.loss_type = "ForCausalLM"
    model = GPT2LMHeadModel(config)
    for block in model.transformer.h:
        block.attn.num_heads, block.attn.split_size = 2, 16
        block.attn.c_attn, block.attn.c_proj = Conv1D(48, 32), Conv1D(32, 16)
        block.mlp.c_fc, block.mlp.c_proj = Conv1D(64, 32), Conv1D(32, 64)
        for first in (block.attn.c_attn, block.mlp.c_fc):
            first.register_forward_pre_hook(lambda _, inputs: (Copied.apply(inputs[0], group),))
        for last in (block.attn.c_proj, block.mlp.c_proj):
            last.register_forward_hook(lambda _, __, output: Summed.apply(output, group))
    return model


def compared(
    model: nn.Module, chosen: OverlapComm, inputs: dict[str, Tensor], plain: list[Tensor]
) -> dict[str, Any]:
    """A step on parts of the batch beside what one on the whole of it gave."""
    ours, (plan, report) = step(model, [chosen], inputs)
    every: list[Any] = [None, None]
    dist.all_gather_object(every, plan.to_json())
    return {
        "equal": [torch.equal(a, b) for a, b in zip(plain, ours, strict=True)],
        "close": [torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, ours, strict=True)],
        "nonzero": [bool(a.any()) for a in plain],
        "seconds": [plan.seconds_before, plan.seconds, plan.bound_seconds],
        "transfers": len(plan.transfers),
        "parts": plan.parts,
        "remark": plan.remark,
        "same plan": every[0] == every[1],
        "reported": plan.remark in report,
    }


def inference(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Logits on parts of the batch, or of a text, beside those on the whole of it."""
    with torch.no_grad():
        plain = model(**inputs).logits
        optimized = graphopt.optimize(model, passes=[OverlapComm(links=PASS.links, split=2)])
        ours = optimized(**inputs).logits
    (record,) = optimized._graphopt.log.records
    plan = record.steps[0].plan
    return {"equal": torch.equal(plain, ours), "transfers": len(plan.transfers), "along": plan.along}


def shares(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Logits and hidden states with norms on shares of the tokens beside those of all ranks alike."""
    chosen = OverlapComm(links=PASS.links, sequence_parallel=True)
    optimized = graphopt.optimize(model, passes=[chosen], device="cpu-generic")
    with torch.no_grad():
        plain = model(**inputs, output_hidden_states=True)
        ours = optimized(**inputs, output_hidden_states=True)
    plan = optimized._graphopt.log.records[0].steps[0].plan
    pairs = zip((*plain.hidden_states, plain.logits), (*ours.hidden_states, ours.logits), strict=True)
    every: list[Any] = [None, None]
    dist.all_gather_object(every, plan.to_json())
    return {
        "equal": [torch.equal(a, b) for a, b in pairs],
        "shared": len(plan.shared),
        "kinds": [row[1] for row in plan.transfers],
        "same plan": every[0] == every[1],
        "remark": plan.remark,
    }


def work(rank: int, folder: str) -> None:
    """One rank."""
    join(rank, folder)
    mesh = init_device_mesh("cpu", (2,))
    group = mesh.get_group().group_name
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (5, 16))
    text = {"input_ids": ids, "labels": ids}
    halves, fourths = (OverlapComm(links=PASS.links, split=n) for n in (2, 4))
    llamas, gpts, layer = llama(mesh), gpt2(group), Layer(group)
    rows = {"x": torch.randn(8, 32)}
    plain, short = step(gpts, [], text)[0], step(layer, [], rows)[0]
    found: dict[str, Any] = {
        "llama": compared(llamas, halves, text, step(llamas, [], text)[0]),
        "gpt2": compared(gpts, halves, text, plain),
        "thirds": compared(layer, replace(halves, split=3), rows, short),
        "refused": compared(layer, OverlapComm(links=FREE), rows, short),
        "rounding": compared(layer, fourths, rows, short),
        "rounded": compared(layer, replace(fourths, exact=False), rows, short),
        "inference": inference(gpts, {"input_ids": ids}),
        "text": inference(llamas, {"input_ids": ids[:1]}),
        "llama shares": shares(llamas, {"input_ids": ids[:1]}),
        "gpt2 shares": shares(gpts, {"input_ids": ids[:4]}),
    }
    found["experts"] = chunked(rank, group)
    found["too many"] = refusal(lambda: step(layer, [replace(halves, split=9)], rows))
    own = torch.randn(8 - 2 * rank, 4)
    uneven = {"rows": own, "weights": own + 1, "x": torch.randn(8, 4)}
    found["uneven"] = refusal(lambda: step(Totals(group), [halves], uneven))
    leave(rank, folder, found)


if __name__ == "__main__":
    mp.spawn(work, (sys.argv[1],), nprocs=2)
