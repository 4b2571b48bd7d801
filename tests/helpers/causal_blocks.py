"""Blocks of published kinds whose attention, and where they have one their MLP, is split over two ranks.

Each rank makes its own share of the heads and of the MLP; sums over the ranks end either.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

collectives: Any = torch.ops._c10d_functional
GROUP = "0"


class _Summed(torch.autograd.Function):
    """The sum over the ranks; its gradient is the same on all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return collectives.wait_tensor(collectives.all_reduce(x, "sum", GROUP))  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class _Entering(torch.autograd.Function):
    """The same on all ranks; its gradient is the sum over them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        begun = collectives.all_reduce(gradients[0].contiguous(), "sum", GROUP)
        return collectives.wait_tensor(begun)  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Grouped queries with rotary places: four heads of eight, two of keys and values; biases or none."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(width, 32, bias), nn.Linear(32, width, bias=False)
        self.k, self.v = nn.Linear(width, 16, bias), nn.Linear(width, 16, bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [1, tokens, width]; the same."""
        q, k, v = (p(x).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (self.q, self.k, self.v))
        angles = torch.arange(x.shape[1])[:, None] / 100 ** (torch.arange(4) / 4)
        cos, sin = (f(torch.cat([angles, angles], -1)) for f in (torch.cos, torch.sin))
        q, k = (t * cos + torch.cat([-t[..., 4:], t[..., :4]], -1) * sin for t in (q, k))
        k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for t in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Qwen2Block(nn.Module):
    """Attention with biases and a gated MLP, both split; a number."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.attention = Attention(width, bias=True)
        self.gate, self.up = nn.Linear(width, 48, bias=False), nn.Linear(width, 48, bias=False)
        self.down = nn.Linear(48, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [1, tokens, width]."""
        x = x + _Summed.apply(self.attention(_Entering.apply(self.norms[0](x))))
        y = _Entering.apply(self.norms[1](x))
        return (x + _Summed.apply(self.down(F.silu(self.gate(y)) * self.up(y)))).square().mean()


class MixtralBlock(nn.Module):
    """A split attention, and whole experts: each token goes to two of four, by the router; a number."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.attention, self.router = Attention(width, bias=False), nn.Linear(width, 4, bias=False)
        self.wide = nn.Parameter(torch.randn(4, width, 24) / width**0.5)
        self.narrow = nn.Parameter(torch.randn(4, 24, width) / 5)

    def forward(self, x: Tensor) -> Tensor:
        """x [1, tokens, width]."""
        x = x + _Summed.apply(self.attention(_Entering.apply(self.norms[0](x))))
        y = self.norms[1](x)[0]
        chosen, places = self.router(y).softmax(-1).topk(2)
        shares = torch.zeros(len(y), 4).scatter(1, places, chosen / chosen.sum(-1, keepdim=True))
        made = torch.bmm(F.silu(torch.bmm(y.expand(4, -1, -1), self.wide)), self.narrow)
        return (x[0] + (made * shares.t()[..., None]).sum(0)).square().mean()
