"""Chains of views are one look at memory: the same bits, strides and storages as view by view."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from graphopt import optimize
from graphopt.lower import boxed
from graphopt.short_calls import View, shorten_calls

aten = torch.ops.aten


def graph_of(function: object, *inputs: torch.Tensor) -> fx.GraphModule:
    return make_fx(function, tracing_mode="fake")(*inputs)  # type: ignore[operator]


def targets(module: fx.GraphModule) -> list[object]:
    return [n.target for n in module.graph.nodes if n.op == "call_function"]


STEPS = {
    "turned": lambda x, r: x.transpose(r.randrange(x.dim()), r.randrange(x.dim())),
    "permuted": lambda x, r: x.permute(r.sample(range(x.dim()), x.dim())),
    "sliced": lambda x, r: x.narrow(d := r.randrange(x.dim()), x.shape[d] // 2, x.shape[d] // 2 or 1),
    "chosen": lambda x, r: x.select(0, x.shape[0] - 1) if x.dim() > 1 else x,
    "longer": lambda x, r: x.unsqueeze(r.randrange(x.dim() + 1)),
    "repeated": lambda x, r: x.unsqueeze(0).expand(2, *x.shape),
    "parted": lambda x, r: x.split(2, r.randrange(x.dim()))[0],
    "flat": lambda x, r: x.reshape(-1),
    "detached": lambda x, r: x.detach(),
}


@given(names=st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=6), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_chain_shows_what_its_views_show(names: list[str], seed: int) -> None:
    def views(x: torch.Tensor) -> list[torch.Tensor]:
        rng = random.Random(seed)
        found = [x.exp()]
        for name in names:
            found.append(STEPS[name](found[-1], rng))
        return [x + 1 for x in found[1:]] + found[-1:]

    x = torch.randn(4, 6, 2)
    module = graph_of(views, x)
    got = boxed(module)([x])
    for a, b in zip(got, views(x), strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride() and a.storage_offset() == b.storage_offset()


def test_chains_are_one_call_and_equal_views_are_shared() -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x.view(6, 4) @ w.t()
        return y.t().t().view(2, 3, 5).exp(), x.view(6, 4).sin(), x.view(2, 12).view(6, 4).cos()

    module = graph_of(function, torch.randn(2, 3, 4), torch.randn(5, 4))
    shorten_calls(module)
    module.recompile()
    found = targets(module)
    assert sum(isinstance(t, View) for t in found) == 3  # the rows of x, w turned, and batches of y
    assert torch.mm in found and len(found) == 7


def test_a_view_that_is_returned_stays_one() -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x.exp()
        return y, y.view(12), y.view(12), y.detach()

    x = torch.randn(3, 4)
    results = boxed(graph_of(function, x))([x])
    assert len({id(y) for y in results}) == 4
    assert len({y.untyped_storage().data_ptr() for y in results}) == 1


def test_a_tensor_that_lies_otherwise_is_viewed_step_by_step() -> None:
    module = graph_of(lambda x: x.t()[1:].exp(), torch.randn(3, 4))
    shorten_calls(module)
    module.recompile()
    turned = torch.randn(4, 3).t()
    assert torch.equal(module(turned), turned.t()[1:].exp())
    part = torch.randn(5, 4)[2:]  # of the same strides, elsewhere in its memory
    assert torch.equal(module(part), part.t()[1:].exp())


@pytest.mark.parametrize(
    "views",
    [
        lambda x: torch.view_as_real(x).sum(-1),
        lambda x: x.conj().imag.cos(),
        lambda x: x.real.view(torch.int32) + 1,
        lambda x: x.real.t().reshape(-1).sin(),  # a copy
    ],
)
def test_what_is_no_look_at_the_same_numbers_is_left_alone(views: object) -> None:
    x = torch.randn(3, 4, dtype=torch.complex64)
    want = views(x)  # type: ignore[operator]
    assert torch.equal(boxed(graph_of(views, x))([x]), want)


def test_a_saved_view_notices_that_its_tensor_was_changed() -> None:
    model = torch.nn.Linear(8, 8)
    optimized = optimize(model, device="cpu-generic")
    loss = optimized(torch.randn(4, 8, requires_grad=True)).square().sum()
    with torch.no_grad():
        model.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
