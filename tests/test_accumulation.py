"""Gradients go into `.grad` while the backward runs, unless somebody would see the difference."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import Residual
from torch import nn
from torch.func import functional_call

from graphopt import measure, optimize

X = torch.linspace(-1, 1, 48 * 32).reshape(48, 32)


class Wide(nn.Module):
    """Layers whose gradients are far larger than their activations."""

    def __init__(self, width: int = 512, depth: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()


def pair() -> tuple[nn.Module, Any]:
    """A model and its optimized copy, both with gradients from one step."""
    torch.manual_seed(0)
    model = Residual()
    optimized = optimize(copy.deepcopy(model), memory="min", device="cpu-generic")
    for net in (model, optimized):
        net(X).sum().backward()
    return model, optimized


def assert_same_gradients(model: nn.Module, optimized: nn.Module) -> None:
    for p, q in zip(model.parameters(), optimized.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def on_both(do: Callable[[nn.Module], Any]) -> tuple[Any, Any, nn.Module, Any]:
    model, optimized = pair()
    return do(model), do(optimized), model, optimized


def test_a_step_that_accumulates_holds_no_gradient_twice() -> None:
    x = torch.randn(4, 512)
    model = Wide()
    optimized = optimize(copy.deepcopy(model), device="cpu-generic")
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    optimized(x).backward()
    held = measure(lambda: optimized(x).backward()).peak_bytes
    assert held < 0.25 * total  # one layer of six, and the activations
    model(x).backward()
    model(x).backward()
    assert_same_gradients(model, optimized)


def test_a_hook_sees_the_gradient_and_may_change_it() -> None:
    def do(net: nn.Module) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        first, second, *_ = net.parameters()
        first.register_hook(lambda g: 2 * g)
        second.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
        net(X).sin().sum().backward()
        return seen

    want, got, model, optimized = on_both(do)
    assert len(want) == len(got) == 1 and torch.equal(want[0], got[0])
    assert_same_gradients(model, optimized)


def test_autograd_grad_returns_gradients_and_adds_none() -> None:
    def do(net: nn.Module) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(net(X).sin().sum(), list(net.parameters()))

    want, got, model, optimized = on_both(do)
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a, b)
    assert_same_gradients(model, optimized)


def test_a_backward_for_some_parameters_adds_theirs_alone() -> None:
    def do(net: nn.Module) -> None:
        net(X).sin().sum().backward(inputs=list(net.parameters())[:2])

    _, _, model, optimized = on_both(do)
    assert_same_gradients(model, optimized)


def test_parameters_that_changed_between_the_forwards_get_their_own() -> None:
    model, optimized = pair()
    others = {n: p.detach().clone().requires_grad_() for n, p in optimized.named_parameters()}
    for p in others.values():
        p.grad = torch.ones_like(p)
    want = copy.deepcopy(others)
    first = optimized(X).sin().sum()
    functional_call(optimized, others, (X,)).sin().sum().backward()
    first.backward()
    model(X).sin().sum().backward()
    assert_same_gradients(model, optimized)
    for p in want.values():
        p.grad = torch.ones_like(p)
    functional_call(model, want, (X,)).sin().sum().backward()
    for name, p in want.items():
        assert torch.equal(p.grad, others[name].grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_another_dtype_are_left_to_autograd(dtype: torch.dtype) -> None:
    model, optimized = pair()
    for net in (model, optimized):
        for p in net.parameters():
            p.grad_dtype = None
            p.grad = torch.ones_like(p, dtype=dtype)
        net(X).sin().sum().backward()
    assert_same_gradients(model, optimized)
    assert all(p.grad.dtype is dtype for p in optimized.parameters())
