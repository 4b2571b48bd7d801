"""Gradients of convolutions made one after the other: eager's, in less memory."""

import pytest
import torch
from eager_steps import records
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt
from graphopt import Checkpoint
from graphopt.measurement import measure

aten = torch.ops.aten


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A convolution of one to three dimensions in float64, and an input in one of two layouts."""
    dimensions = draw(st.integers(1, 3))

    def each(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(least, most)) for _ in range(dimensions))

    groups, kernel, dilation = draw(st.integers(1, 2)), each(1, 3), each(1, 2)
    channels = [groups * draw(st.integers(1, 4)) for _ in range(2)]
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    layer = kind(*channels, kernel, each(1, 3), each(0, 2), dilation, groups, bias=draw(st.booleans()))
    sizes = [d * (k - 1) + 1 + draw(st.integers(0, 4)) for d, k in zip(dilation, kernel, strict=True)]
    x = torch.randn(draw(st.integers(1, 3)), channels[0], *sizes, dtype=torch.float64)
    if dimensions == 2 and draw(st.booleans()):
        x = x.to(memory_format=torch.channels_last)
    return layer.double(), x


@given(convolutions(), st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_they_are_eagers(case: tuple[nn.Module, Tensor], seed: int) -> None:
    torch.manual_seed(seed)
    layer, x = case
    x.requires_grad_()
    ours = graphopt.optimize(layer, passes=())
    wanted = [x, *layer.parameters()]
    y = layer(x)
    upstream = torch.randn_like(y)
    expected = torch.autograd.grad(y, wanted, upstream)
    found = torch.autograd.grad(ours(x), wanted, upstream)
    for ours_is, eager_is in zip(found, expected, strict=True):
        torch.testing.assert_close(ours_is, eager_is, rtol=1e-12, atol=1e-12)
        assert ours_is.stride() == eager_is.stride()


class TwoMaps(nn.Module):
    """Images (batch, 3, height, width) through two convolutions to a number."""

    def __init__(self, before: int, after: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, before, 3, padding=1)
        self.second = nn.Conv2d(before, after, kernel, stride, kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh()).tanh().mean()


SHAPES = {
    "more channels out": (16, 64, 1, 1),
    "fewer channels out": (64, 16, 1, 1),
    "a stride": (32, 32, 3, 2),
    "no stride": (32, 32, 3, 1),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_input_goes_before_its_gradient_comes(shape: str) -> None:
    """No operator of the backward reads the input for its own gradient, and the peak shows it."""
    before, after, kernel, stride = SHAPES[shape]
    torch.manual_seed(0)
    model = TwoMaps(before, after, kernel, stride)
    x = torch.randn(2, 3, 32, 32)
    ours = graphopt.optimize(model, passes=[Checkpoint(memory="min")])
    ours(x).backward()
    record = records(ours)[-1]
    made = [n for n in record.before.operators() if n.target is aten.convolution_backward.default]
    both = [n for n in made if n.args[-1][0] and n.args[-1][1]]
    assert made and not both
    model.zero_grad()
    predicted = record.steps[-1].plan.peak_bytes - record.static_bytes
    peak = measure(lambda: ours(x).backward()).peak_bytes
    assert peak - predicted in (0, 4, 8)  # the loss and its gradient are the caller's


def test_what_is_left_together() -> None:
    """A transposed convolution, and shapes that are symbols."""
    layer, x = nn.ConvTranspose2d(2, 3, 3), torch.randn(1, 2, 5, 5, requires_grad=True)
    program = graphopt.trace(layer, {"input": x})
    (node,) = [n for n in program.operators() if n.target is aten.convolution_backward.default]
    assert node.args[-1] == [True, True, True]
