"""Language models split over ranks: the layers' products by columns, then by rows, then summed.

Llama and Qwen2 by DTensor. GPT-2, whose products DTensor does not split, with functional collectives.
"""

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers.pytorch_utils import Conv1D

MODELS = ("llama", "qwen2", "gpt2")
VOCABULARY = 1024
HEADS = 4
collectives: Any = torch.ops._c10d_functional


def build(name: str, mesh: DeviceMesh, layers: int, width: int, length: int) -> nn.Module:
    """One of `MODELS` on `mesh`, without dropout, the same random weights on every rank.

    The MLP of Llama and Qwen2 is 2.75 times as wide as the model, as that of Llama-2; GPT-2's 4 times.
    """
    torch.manual_seed(0)
    return _gpt2(mesh, layers, width, length) if name == "gpt2" else _llama(name, mesh, layers, width)


def _llama(name: str, mesh: DeviceMesh, layers: int, width: int) -> nn.Module:
    family = "Llama" if name == "llama" else "Qwen2"
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.loss_type = "ForCausalLM"  # its default; unnamed, it logs a warning
    columns = [f"self_attn.{part}_proj" for part in "qkv"] + ["mlp.gate_proj", "mlp.up_proj"]
    plan: dict[str, Any] = {f"model.layers.*.{part}": ColwiseParallel() for part in columns}
    plan |= {
        f"model.layers.*.{part}": RowwiseParallel() for part in ("self_attn.o_proj", "mlp.down_proj")
    }
    return parallelize_module(model, mesh, plan)


def _gpt2(mesh: DeviceMesh, layers: int, width: int, length: int) -> nn.Module:
    """Each rank has its share of the heads and of the MLP."""
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=length,
        n_embd=width,
        n_layer=layers,
        n_head=HEADS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"
    group, ranks = mesh.get_group().group_name, mesh.size()
    own = width // ranks
    for block in model.transformer.h:
        block.attn.num_heads, block.attn.split_size = HEADS // ranks, own
        block.attn.c_attn, block.attn.c_proj = Conv1D(3 * own, width), Conv1D(width, own)
        block.mlp.c_fc, block.mlp.c_proj = Conv1D(4 * own, width), Conv1D(width, 4 * own)
        for first in (block.attn.c_attn, block.mlp.c_fc):
            first.register_forward_pre_hook(lambda _, inputs: (_Copied.apply(inputs[0], group),))
        for last in (block.attn.c_proj, block.mlp.c_proj):
            last.register_forward_hook(lambda _, __, output: _Summed.apply(output, group))
    return model


def _summed(x: Tensor, group: str) -> Tensor:
    begun = collectives.all_reduce(x.contiguous(), "sum", group)
    return collectives.wait_tensor(begun)  # type: ignore[no-any-return]


class _Summed(torch.autograd.Function):
    """The sum over the ranks of parts of a result; the gradient is that of each part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Copied(torch.autograd.Function):
    """What all ranks have; its gradient is the sum over them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _summed(gradients[0], ctx.group), None
