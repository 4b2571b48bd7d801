"""Tiny models, each with one thing that is hard to recompute right."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, ROWS = 32, 48


def _linear(inputs: int = WIDTH, outputs: int = WIDTH) -> nn.Linear:
    return nn.Linear(inputs, outputs)


class Perceptron(nn.Module):
    """A plain chain."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_linear() for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = F.gelu(layer(x))
        return x


class Residual(Perceptron):
    """A chain of residual blocks with layer norms."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__(depth)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + torch.tanh(layer(norm(x)))
        return x


class SkipNet(nn.Module):
    """A U-Net: what goes down meets what comes up."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(_linear() for _ in range(3))
        self.up = nn.ModuleList(_linear(2 * WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = []
        for layer in self.down:
            x = torch.sigmoid(layer(x))
            seen.append(x)
        for layer in self.up:
            x = F.silu(layer(torch.cat([x, seen.pop()], -1)))
        return x


class SharedBlock(nn.Module):
    """One block used twice, and tied to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(_linear(), nn.GELU(), _linear())
        self.head = _linear()
        self.head.weight = self.block[0].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.head(self.block(torch.tanh(self.block(x)))))


class CrossAttention(nn.Module):
    """An encoder whose output every layer of a decoder reads."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.encode = nn.ModuleList(_linear() for _ in range(2))
        self.query = nn.ModuleList(_linear() for _ in range(2))
        self.both = nn.ModuleList(_linear(WIDTH, 2 * WIDTH) for _ in range(2))
        self.dropout = dropout

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for layer in self.encode:
            x = F.relu(layer(x))
        for query, both in zip(self.query, self.both, strict=True):
            key, value = both(x).chunk(2, -1)
            heads = [t.view(*t.shape[:2], 4, 8).transpose(1, 2) for t in (query(y), key, value)]
            read = F.scaled_dot_product_attention(*heads, dropout_p=self.dropout)
            y = y + torch.tanh(read.transpose(1, 2).reshape(y.shape))
        return y


class Dense(nn.Module):
    """Every layer reads all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_linear(WIDTH * (i + 1)) for i in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = [x]
        for layer in self.layers:
            seen.append(torch.tanh(layer(torch.cat(seen, -1))))
        return seen[-1]


class Views(nn.Module):
    """Splits, expands, transposes, slices, and a view of a view."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _linear(WIDTH, 3 * WIDTH)
        self.outer = _linear()
        self.scale = nn.Parameter(torch.rand(1, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b, c = self.inner(x).tanh().split(WIDTH, -1)
        a = a.t().contiguous().t() * self.scale.expand_as(a)
        b = b.reshape(-1, 2, WIDTH // 2).transpose(1, 2).reshape(b.shape).exp()
        c = torch.stack([c[:, ::2], c[:, 1::2]]).unbind(0)
        return self.outer(a * b + torch.cat(c, -1)[None].squeeze(0)).sigmoid()


class InPlace(nn.Module):
    """In-place operators in user code, on intermediates and on views of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_linear() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.layers[0](x)
        a.relu_()
        b = self.layers[1](a * 2)
        b[:, :4].mul_(3).add_(1)
        b.sigmoid_()
        c = torch.zeros_like(b)
        c[1:] = self.layers[2](b)[:-1]
        return c.tanh_() * b


class MultiOutput(nn.Module):
    """Operators with several results, of which some are used."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_linear() for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.layers[0](x)).tanh()
        variance, mean = torch.var_mean(x, -1, keepdim=True)
        x = self.layers[1]((x - mean) * torch.rsqrt(variance + 1e-3)).exp()
        top, where = x.topk(8, -1)
        low, _ = x.min(-1, keepdim=True)
        return self.layers[2](x * low + top.repeat(1, 4) * where.repeat(1, 4)).softmax(-1)


class Dropouts(nn.Module):
    """Random operators of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_linear() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.dropout(torch.tanh(self.layers[0](x)), 0.3)
        x = torch.tanh(self.layers[1](x)) * torch.rand_like(x)
        x = x + torch.bernoulli(torch.full_like(x, 0.5)) * x.exp()
        return F.dropout(torch.sigmoid(self.layers[2](x)), 0.1)


class Convolutions(nn.Module):
    """Two convolutions with batch norms in training."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(self.second(self.first(image)), 2).mean((2, 3))


def _rows() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(ROWS, WIDTH)}


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, torch.Tensor]]]] = {
    "perceptron": lambda: (Perceptron(), _rows()),
    "residual": lambda: (Residual(), _rows()),
    "u-net": lambda: (SkipNet(), _rows()),
    "shared block": lambda: (SharedBlock(), _rows()),
    "cross attention": lambda: (
        CrossAttention(),
        {"x": torch.randn(2, 5, WIDTH), "y": torch.randn(2, 3, WIDTH)},
    ),
    "dense": lambda: (Dense(), _rows()),
    "views": lambda: (Views(), _rows()),
    "in place": lambda: (InPlace(), _rows()),
    "multi-output": lambda: (MultiOutput(), _rows()),
    "dropouts": lambda: (Dropouts(), _rows()),
    "convolutions": lambda: (Convolutions(), {"image": torch.randn(3, 2, 8, 8)}),
}
