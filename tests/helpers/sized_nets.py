"""Small networks whose steps are captured at several sizes: blocks of attention by hand and an MLP."""

import torch
from torch import Tensor, nn

from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import get_device
from graphopt.cost_models.symbolic import Sample
from graphopt.program import Program
from graphopt.tracing import trace

CPU = get_device("cpu-generic")
WIDTH, WORDS = 8, 20


class Block(nn.Module):
    """Attention whose scores are in memory, then an MLP; both added to their input."""

    def __init__(self, inner: int = 3 * WIDTH) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.up, self.down = nn.Linear(WIDTH, inner), nn.Linear(inner, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = x + torch.softmax(q @ k.transpose(1, 2), dim=-1) @ v
        return x + self.down(nn.functional.gelu(self.up(x)))


class Net(nn.Module):
    """Word numbers (batch, seq) to the loss of predicting them; `inners` are the widths of the MLPs."""

    def __init__(self, layers: int, inners: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        widths = inners or (3 * WIDTH,) * layers
        self.blocks = nn.ModuleList(Block(w) for w in widths)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        x = self.table(words)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), words.flatten())


def words(batch: int, seq: int) -> Tensor:
    """Word numbers (batch, seq)."""
    return torch.arange(batch * seq).reshape(batch, seq) % WORDS


def step(net: nn.Module, batch: int, seq: int) -> Program:
    """The captured training step."""
    return trace(net, words(batch, seq))


def sample(net: nn.Module, batch: int, seq: int) -> Sample:
    """The captured training step with its costs."""
    program = step(net, batch, seq)
    return Sample.of(program, Costs.of(program, CPU))
