"""The fused layers: equal to eager ones, with gradients, and well-behaved as operators of a graph."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

from graphopt import kernels
from graphopt.codegen import backends
from graphopt.codegen.numba_cpu import compile_region

ops = torch.ops.graphopt


@pytest.fixture(autouse=True)
def _no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.MAKERS, "cpu", lambda region: compile_region(region, None))


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


TARGET = torch.tensor([3, 0, -100, 15])
HALF = torch.tensor(0.5, dtype=torch.float64)
X, Y = (4, 16), (16,)


@pytest.mark.parametrize(
    ("name", "shapes", "more"),
    [
        ("rms_norm", [X, X, Y], [1e-6]),
        ("layer_norm", [X, Y, Y], [1e-5]),
        ("softmax", [X], []),
        ("cross_entropy", [X], [TARGET, HALF, -100, True]),
        ("swiglu", [X, X], []),
        ("bias_gelu_residual", [X, Y, X], ["tanh"]),
        ("bias_gelu_residual", [X, Y, X], ["none"]),
        ("rotary", [(2, 3, 4, 16)], [torch.randn(2, 1, 4, 8), torch.randn(2, 1, 4, 8)]),
    ],
)
def test_operators(name: str, shapes: list[tuple[int, ...]], more: list[Any]) -> None:
    opcheck(getattr(ops, f"kernel_{name}").default, (*leaves(*shapes), *more))


def test_operators_without_optional_inputs() -> None:
    opcheck(ops.kernel_rms_norm.default, (*leaves(X), None, None, 1e-6))
    opcheck(ops.kernel_cross_entropy.default, (torch.randn(X), TARGET, HALF, -100, False))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_to_eager(dtype: torch.dtype) -> None:
    x, y, w, b = leaves((2, 3, 16), (2, 3, 16), Y, Y, dtype=dtype)
    angles = torch.randn(3, 8).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    logits, target = leaves((6, 16), dtype=dtype)[0], torch.tensor([1, 2, -100, 0, 15, 4])

    def norm(x: Tensor, y: Tensor) -> Tensor:
        return F.rms_norm(x + y, Y, w, 1e-3) * (x + y)  # of both outputs

    def ours(x: Tensor, y: Tensor) -> Tensor:
        out, total = kernels.rms_norm(x, w, 1e-3, y)
        return out * total

    pairs = [
        (lambda: ours(x, y), lambda: norm(x, y)),
        (lambda: kernels.rms_norm(x), lambda: F.rms_norm(x, Y, eps=1e-6)),
        (lambda: kernels.layer_norm(x, w, b), lambda: F.layer_norm(x, Y, w, b)),
        (lambda: kernels.softmax(x), lambda: x.softmax(-1)),
        (lambda: kernels.swiglu(x, y), lambda: F.silu(x) * y),
        (lambda: kernels.bias_gelu_residual(x, b, y), lambda: F.gelu(x + b) + y),
        (
            lambda: kernels.bias_gelu_residual(x, b, y, "tanh"),
            lambda: F.gelu(x + b, approximate="tanh") + y,
        ),
        (lambda: kernels.rotary(x, cos, sin), lambda: turned(x, cos, sin)),
        (lambda: kernels.cross_entropy(logits, target), lambda: F.cross_entropy(logits, target)),
        (
            lambda: kernels.cross_entropy(logits, target, 0, "sum") * 2,
            lambda: F.cross_entropy(logits, target.clamp(0), ignore_index=0, reduction="sum") * 2,
        ),
    ]
    target_of_last = target.clone()
    target[2] = -100
    for number, (a, b_) in enumerate(pairs):
        if number == len(pairs) - 1:
            target.copy_(target_of_last.clamp(0))
        tolerance = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}
        every = [t for t in (x, y, w, b, logits)]
        mine, theirs = a(), b_()
        weight = torch.randn_like(mine)
        torch.testing.assert_close(mine, theirs, **tolerance)
        found, expected = (
            torch.autograd.grad((v * weight).sum(), every, allow_unused=True) for v in (mine, theirs)
        )
        torch.testing.assert_close(found, expected, **tolerance)


def test_loss_and_gradient() -> None:
    logits = leaves((5, 40))[0]
    target = torch.tensor([0, 39, -100, 7, 7])
    loss = F.cross_entropy(logits, target)
    (expected,) = torch.autograd.grad(loss, logits)
    found, gradient = kernels.cross_entropy_with_gradient(logits, target)
    torch.testing.assert_close((found, gradient), (loss.detach(), expected))
    assert not gradient[2].any()
    with pytest.raises(IndexError, match="Target 40 is out of bounds"):
        kernels.cross_entropy(logits, target.clamp(0) + 1)


def test_nothing_to_count() -> None:
    logits = leaves((2, 3))[0]
    loss = kernels.cross_entropy(logits, torch.full((2,), -100))
    assert loss.isnan()  # as in eager mode: zero over zero


def test_compiled_whole() -> None:
    x, y, w = leaves((4, 16), (4, 16), Y)

    def f(x: Tensor, y: Tensor) -> Tensor:
        out, total = kernels.rms_norm(x, w, residual=y)
        return kernels.swiglu(out, total).sum()

    whole = torch.compile(f, fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(g(x, y), (x, y, w)) for g in (whole, f))
    torch.testing.assert_close(found, expected)


def test_other_devices_take_the_reference() -> None:
    x = torch.empty(4, 16, device="meta")
    assert ops.kernel_swiglu(x, x).shape == (4, 16)
    with torch._subclasses.FakeTensorMode():
        fake = torch.empty(4, 16, dtype=torch.bfloat16)
        assert kernels.rms_norm(fake, residual=fake)[1].dtype == torch.bfloat16
