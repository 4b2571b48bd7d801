"""Slices of gradients that wait are copied: the same results, and the rest of the gradient goes."""

import pytest
import torch
from eager_steps import records
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt
from graphopt.measurement import measure
from graphopt.program import Program
from graphopt.verify import verify

aten = torch.ops.aten


class Skip(nn.Module):
    """Rows (batch, width) through layers, joined again with what went in behind `depth` of them."""

    def __init__(self, width: int, depth: int, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim
        self.before = nn.Linear(width, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.after = nn.Linear(2 * width if dim else width, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = y = self.before(x).tanh()
        for layer in self.layers:
            y = layer(y).sin()
        return self.after(torch.cat((kept, y), dim=self.dim)).sum()


def copies(model: nn.Module, x: Tensor) -> int:
    """The copies of slices in the backward of the captured program."""
    ours = graphopt.optimize(model, passes=())
    ours(x).backward()
    program: Program = records(ours)[-1].before
    verify(program)
    return sum(n.target is aten.clone.default for n in program.operators())


@pytest.mark.parametrize("dim", [0, 1])
def test_a_slice_that_waits_is_copied(dim: int) -> None:
    assert copies(Skip(8, 5, dim), torch.randn(4, 8)) == 1


def test_a_slice_that_is_read_soon_is_not() -> None:
    assert copies(Skip(8, 0), torch.randn(4, 8)) == 0


def least_peak(model: nn.Module, x: Tensor) -> int:
    """Bytes of a step at its least, as measured, which is what was predicted."""
    torch._dynamo.reset()
    ours = graphopt.optimize(model, memory="min")
    ours(x).backward()
    model.zero_grad()
    found = measure(lambda: ours(x).backward()).peak_bytes
    record = records(ours)[-1]
    loss_bytes = 8  # and its gradient
    predicted = record.steps[-1].plan.peak_bytes - record.static_bytes
    assert abs(predicted - found) <= loss_bytes
    return found


def test_the_gradient_of_the_concatenation_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Skip(256, 12), torch.randn(2048, 256)
    ours = least_peak(model, x)
    monkeypatch.setattr("graphopt.cleanup.compact_waiting_slices", lambda program: None)
    assert ours < least_peak(model, x) - 0.7 * x.nbytes  # and then the peak is elsewhere


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.integers(0, 1), st.integers(0, 2**31))
@settings(max_examples=8, deadline=None)
def test_gradients_are_eagers(width: int, rows: int, depth: int, dim: int, seed: int) -> None:
    torch.manual_seed(seed)
    model, x = Skip(width, depth, dim).double(), torch.randn(rows, width, dtype=torch.float64)
    x.requires_grad_()
    wanted = (x, *model.parameters())
    expected = torch.autograd.grad(model(x), wanted)
    found = torch.autograd.grad(graphopt.optimize(model, passes=())(x), wanted)
    for ours, eager in zip(found, expected, strict=True):
        assert torch.equal(ours, eager)
