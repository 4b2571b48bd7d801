"""Tiny transformers whose blocks have one thing that is hard to cut along the tokens."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Form:
    """What a block is made of. `drop` is where a dropout stands: "inside" the wide part, or "behind"."""

    width: int = 8
    wide: int = 32
    norm: str = "rms"  # "rms", "layer", "fused" or "none"
    gated: bool = True
    bias: bool = False
    residual: bool = True
    attends: bool = True
    activation: str = "silu"
    drop: str = ""


class Norm(nn.Module):
    """A root mean square norm as models write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


NORMS = {"rms": Norm, "layer": nn.LayerNorm, "fused": nn.RMSNorm, "none": lambda width: nn.Identity()}


class Block(nn.Module):
    """An attention of one head, and a gated or plain MLP."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        width, wide, bias = form.width, form.wide, form.bias
        self.form = form
        self.norm = NORMS[form.norm](width)
        self.up = nn.Linear(width, wide, bias)
        self.gate = nn.Linear(width, wide, bias) if form.gated else None
        self.down = nn.Linear(wide, width, bias)
        self.mix = nn.Linear(width, width, bias) if form.attends else None

    def forward(self, x: Tensor) -> Tensor:
        if self.mix is not None:
            q = self.mix(x)[:, None]
            x = x + F.scaled_dot_product_attention(q, x[:, None], x[:, None], is_causal=True)[:, 0]
        y = self.norm(x)
        act = getattr(F, self.form.activation)
        z = act(self.gate(y)) * self.up(y) if self.gate is not None else act(self.up(y))
        z = F.dropout(z, 0.5) if self.form.drop == "inside" else z
        z = self.down(z)
        z = F.dropout(z, 0.5) if self.form.drop == "behind" else z
        return x + z if self.form.residual else z


class Blocks(nn.Module):
    """`depth` blocks, the weights of their MLPs `tied` or their own, and a loss."""

    def __init__(self, form: Form, depth: int = 2, tied: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(form) for _ in range(depth))
        if tied:
            for block in self.blocks:
                block.up, block.down = self.blocks[0].up, self.blocks[0].down

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return (x * x.detach().sin()).sum()
