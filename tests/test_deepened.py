"""A program with layers added is the program that is captured of the deeper model."""

import pytest
import torch
from torch import nn

from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import GENERIC_CPU
from graphopt.deepened import deepened, tensors_only
from graphopt.errors import GraphoptError
from graphopt.origin import origin_of
from graphopt.passes.checkpoint_choice import everything, step_of
from graphopt.program import Program
from graphopt.tracing import trace
from graphopt.verify import verify


class Block(nn.Module):
    """A norm, two products and a residual, with a table that all blocks share."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        wide = nn.functional.dropout(torch.tanh(self.up(self.norm(x) * table)), 0.1)
        return x + self.down(wide)


class Net(nn.Module):
    """Blocks between a product and a loss; with `odd`, each block is wider than the one before."""

    def __init__(self, depth: int, odd: bool = False) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(8))
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)
        self.blocks = nn.ModuleList(Block(8) for _ in range(depth))
        for number, block in enumerate(self.blocks if odd else ()):
            assert isinstance(block, Block)
            wide = 8 + number
            block.up, block.down = nn.Linear(8, wide), nn.Linear(wide, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x, self.table)
        return self.last(x).square().mean()


def step(depth: int, odd: bool = False, training: bool = True) -> Program:
    return trace(Net(depth, odd), torch.zeros(16, 4), training=training)


def rows(program: Program) -> list[object]:
    """What a program does, with inputs named by their labels."""
    names = {i.name: i.label for i in program.inputs}
    number = {n: names.get(n.name, i) for i, n in enumerate(program.operators(), len(names))}
    number |= {n: names[n.name] for n in program.graph.nodes if n.op == "placeholder"}
    found: list[object] = [
        (str(n.target), [number[a] for a in n.all_input_nodes], n.meta["val"], origin_of(n).module)
        for n in program.operators()
    ]
    ends = [number.get(o) if isinstance(o, torch.fx.Node) else None for o in program.outputs]
    return [str(row) for row in found] + [ends, [(i.role, i.label) for i in program.inputs]]


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("depth", [5, 8])
def test_it_is_the_captured_program(depth: int, training: bool) -> None:
    """The last block adds nothing to the gradient of the table, so that of four three are alike."""
    made = deepened(step(4, training=training), step(5, training=training), depth - 4)
    captured = tensors_only(step(depth, training=training))
    assert rows(made) == rows(captured)
    verify(made)
    flows = [Costs.of(p, GENERIC_CPU).dataflow(p) for p in (made, captured)]
    peaks = [step_of(flow, everything(flow)).peak_bytes for flow in flows]
    assert peaks[0] == peaks[1] > 0
    assert flows[0].static_bytes == flows[1].static_bytes


def test_layers_that_are_not_alike() -> None:
    with pytest.raises(GraphoptError, match="the layers of this model are not alike"):
        deepened(step(3, odd=True), step(4, odd=True), 2)


def test_two_layers_are_too_few() -> None:
    with pytest.raises(GraphoptError, match="2 repeat where 3 are needed"):
        deepened(step(2), step(3), 2)
