"""Without the gradients that never arrive a program does less work, and the rest is as with zeros."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from programs import arguments, ramp, run_joint
from torch import nn

from graphopt import Program, trace
from graphopt.program import Role, tensors_of
from graphopt.tangents import unlikely_tangents, without_gradients
from graphopt.verify import verify

aten = torch.ops.aten


class Head(nn.Module):
    """A loss, and beside it what `more` makes of the hidden state."""

    def __init__(self, more: Callable[[nn.Module, torch.Tensor], object]) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 6), nn.Linear(6, 6)
        self.more = more

    def forward(self, x: torch.Tensor) -> object:
        h = self.inner(x).tanh()
        return F.gelu(self.outer(h)).square().mean(), self.more(self, h)


# What a model returns beside its loss; each leads back by other operators.
BESIDE: dict[str, Callable[[nn.Module, torch.Tensor], object]] = {
    "hidden": lambda self, h: h,
    "views": lambda self, h: (h.view(-1).view(2, -1).t(), h[1:], h[:, ::2], h[0], h.split(2, -1)),
    "joined": lambda self, h: (
        torch.cat([h, h.exp(), self.outer(h)], -1),
        torch.stack([h, h.sigmoid()]),
        F.pad(h, (1, 2)),
    ),
    "products": lambda self, h: (
        h @ h.t(),
        torch.bmm(h[None], h.t()[None]),
        h - 2 * self.outer(h) + h / 3,
    ),
    "pointwise": lambda self, h: [h**2, h.abs(), {"a": h.relu(), "b": F.silu(h)}],
    # From here on with operators that no table calls linear; zeros are filled in.
    "logits": lambda self, h: self.outer(h).log_softmax(-1),
    "norms": lambda self, h: (F.layer_norm(h, (6,)), F.max_pool1d(h[None], 2)),
    "chosen": lambda self, h: (
        torch.where(h > 0, h, 2 * h),
        h.topk(2),
        h.gather(1, torch.tensor([[0, 1], [2, 3], [4, 5]])),
    ),
    "sums": lambda self, h: (h.sum(0), h.cumsum(1), h.logsumexp(1)),
    "attention": lambda self, h: F.scaled_dot_product_attention(h[None], h[None], h[None]),
}
LINEAR = ("hidden", "views", "joined", "products", "pointwise")


def traced(name: str) -> tuple[Program, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model, x = Head(BESIDE[name]), torch.randn(3, 4)
    program = trace(model, x)
    return program, arguments(program, model, {"x": x})


def with_zeros(program: Program, tangents: frozenset[str], given: dict) -> list:
    """What the whole graph gives where the gradients of `tangents` are zeros."""
    values = []
    for n in program.graph.nodes:
        if n.op == "placeholder":
            like = tensors_of(n)[0]
            assert like is not None
            if program.roles[n.name] is Role.TANGENT:
                values.append(0 * ramp(like) if n.name in tangents else ramp(like))
            else:
                values.append(given[n.name])
    with torch.no_grad():
        return list(torch.fx.Interpreter(program.module).run(*values))


@pytest.mark.parametrize("name", BESIDE)
def test_the_rest_is_what_zero_gradients_would_give(name: str) -> None:
    program, given = traced(name)
    unlikely = unlikely_tangents(program)
    assert unlikely
    small = without_gradients(program, unlikely)
    verify(small, before=program)
    if name in LINEAR:
        assert len(list(small.operators())) < len(list(program.operators()))
    with torch.no_grad():
        values = run_joint(small, given)
    for got, want in zip(values, with_zeros(program, unlikely, given), strict=True):
        assert (got is None) is (want is None)
        if want is not None:
            assert torch.equal(got, want)


@pytest.mark.parametrize("name", LINEAR)
def test_nothing_is_left_that_reads_them(name: str) -> None:
    program, _ = traced(name)
    unlikely = unlikely_tangents(program)
    small = without_gradients(program, unlikely)
    left = [n for n in small.graph.nodes if n.name in unlikely]
    assert len(left) == len(unlikely) and not any(n.users for n in left)
    alone, _ = traced("hidden")
    alone = without_gradients(alone, unlikely_tangents(alone))

    def backward(p: Program) -> list[str]:
        late = [n for n in p.operators() if n.meta.get("partitioner_tag") == "is_backward"]
        return sorted(str(n.target) for n in late)

    assert backward(small) == backward(alone)


def test_only_outputs_beside_a_scalar_are_unlikely() -> None:
    class Two(nn.Module):
        def __init__(self, first: str) -> None:
            super().__init__()
            self.inner, self.first = nn.Linear(4, 4), first

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            h = self.inner(x)
            return (h.sum() if self.first == "scalar" else h.exp()), h

    assert unlikely_tangents(trace(Two("tensor"), torch.ones(3, 4))) == frozenset()
    program = trace(Two("scalar"), torch.ones(3, 4))
    (name,) = unlikely_tangents(program)
    (node,) = (n for n in program.graph.nodes if n.name == name)
    assert node.meta["val"].shape == (3, 4)


def test_without_tangents_named_the_program_stays() -> None:
    program, _ = traced("hidden")
    assert str(without_gradients(program, frozenset()).graph) == str(program.graph)


def test_the_program_it_came_from_is_left_alone() -> None:
    program, _ = traced("logits")
    before = str(program.graph)
    without_gradients(program, unlikely_tangents(program))
    assert str(program.graph) == before


class Scaled(torch.autograd.Function):
    """A backward that is written with `alpha=`: the sum of two gradients, one of them doubled."""

    @staticmethod
    def forward(context: object, x: torch.Tensor, y: torch.Tensor) -> tuple:
        return x.clone(), y.clone()

    @staticmethod
    def backward(context: object, first: torch.Tensor, second: torch.Tensor) -> tuple:
        both = torch.add(first, second, alpha=2)
        return both, both


def test_a_sum_with_a_factor_keeps_the_factor() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> tuple:
            first, second = Scaled.apply(x * self.weight, x + self.weight)
            return second.square().sum(), first

    model, x = Net(), torch.randn(4)
    program = trace(model, x)
    given = arguments(program, model, {"x": x})
    unlikely = unlikely_tangents(program)
    got = run_joint(without_gradients(program, unlikely), given)
    for mine, whole in zip(got, with_zeros(program, unlikely, given), strict=True):
        assert mine is whole is None or torch.equal(mine, whole)
