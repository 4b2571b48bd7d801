"""Every function of `graphopt.kernels` beside torch's own, and what both are compared with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt import kernels

# The largest error, of the largest number of a result: a few roundings of the dtype.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
TARGET = torch.tensor([1, 23, -100, 0, 15, 4])
X, Y = (6, 24), (24,)


@dataclass(frozen=True)
class Case:
    """A function, the same of torch operators, and the shapes that it takes."""

    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]


def _added_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    return F.rms_norm(x + residual, weight.shape, weight, 1e-3), x + residual


def _angles(x: Tensor) -> tuple[Tensor, Tensor]:
    angles = torch.arange(x.shape[-2], device=x.device)[:, None] * torch.linspace(0.1, 1.3, 12).to(
        x.device
    )
    return angles.cos().repeat(1, 2).to(x.dtype), angles.sin().repeat(1, 2).to(x.dtype)


def _turned(x: Tensor) -> Tensor:
    cos, sin = _angles(x)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def _target(x: Tensor) -> Tensor:
    return TARGET.to(x.device)


CASES = {
    "rms_norm": Case(
        lambda x, w: kernels.rms_norm(x, w, 1e-3), lambda x, w: F.rms_norm(x, w.shape, w, 1e-3), (X, Y)
    ),
    "rms_norm_residual": Case(lambda x, y, w: kernels.rms_norm(x, w, 1e-3, y), _added_norm, (X, X, Y)),
    "layer_norm": Case(kernels.layer_norm, lambda x, w, b: F.layer_norm(x, w.shape, w, b), (X, Y, Y)),
    "softmax": Case(kernels.softmax, lambda x: x.softmax(-1), (X,)),
    "cross_entropy": Case(
        lambda x: kernels.cross_entropy(x, _target(x)), lambda x: F.cross_entropy(x, _target(x)), (X,)
    ),
    "cross_entropy_sum": Case(
        lambda x: kernels.cross_entropy(x, _target(x), reduction="sum"),
        lambda x: F.cross_entropy(x, _target(x), reduction="sum"),
        (X,),
    ),
    "swiglu": Case(kernels.swiglu, lambda g, u: F.silu(g) * u, (X, X)),
    "bias_gelu_residual": Case(kernels.bias_gelu_residual, lambda x, b, r: F.gelu(x + b) + r, (X, Y, X)),
    "bias_gelu_residual_tanh": Case(
        lambda x, b, r: kernels.bias_gelu_residual(x, b, r, "tanh"),
        lambda x, b, r: F.gelu(x + b, approximate="tanh") + r,
        (X, Y, X),
    ),
    "rotary": Case(lambda x: kernels.rotary(x, *_angles(x)), _turned, ((2, 3, 5, 24),)),
}


def every(x: Any) -> list[Tensor]:
    """The results of a function, one or more."""
    return [x] if isinstance(x, Tensor) else [*x]


def with_gradients(function: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    """The results, and the gradients of a sum of these with fixed weights."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    found = every(function(*leaves))
    total = found[0].new_zeros(())
    for y in found:
        weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device).view(y.shape)
        total = total + (y * weight.to(y.dtype)).sum()
    return [*(y.detach() for y in found), *torch.autograd.grad(total, leaves)]


def assert_right(case: Case, inputs: list[Tensor], function: Callable[..., Any] | None = None) -> None:
    """What `case` computes of inputs and its gradients, against torch in float64."""
    dtype = inputs[0].dtype
    found = with_gradients(function or case.ours, inputs)
    exact = with_gradients(case.theirs, [x.double() for x in inputs])
    for y, right in zip(found, exact, strict=True):
        assert (y.dtype, y.shape, y.device) == (dtype, right.shape, right.device)
        limit = TOLERANCES[dtype] * max(float(right.abs().max()), 1e-3)
        torch.testing.assert_close(y.double(), right, rtol=0, atol=limit)


def drawn(case: Case, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Inputs of a case."""
    return [torch.randn(shape).to(device, dtype) for shape in case.shapes]
