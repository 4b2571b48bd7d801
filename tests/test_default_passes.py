"""What runs where nobody names passes: checkpoints, and in inference kernels that are worth compiling."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt import Checkpoint, Fuse, optimize
from graphopt.passes.defaults import KERNEL_BYTES

WIDTH = 256


class Gated(nn.Module):
    """A norm and a gated perceptron; `rows` x 256 floats."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.gate = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 512), nn.Linear(WIDTH, 512)
        self.down = nn.Linear(512, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[rows, 256] to [rows, 256]."""
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def _kernels(optimized: Any) -> int:
    (record,) = optimized._graphopt.log.records
    return sum(len(getattr(step.plan, "regions", ())) for step in record.steps)


@pytest.fixture(scope="module")
def case() -> tuple[nn.Module, Tensor]:
    """A model, and an input with which kernels save mebibytes."""
    torch.manual_seed(0)
    return Gated(), torch.randn(2048, WIDTH)


def test_inference_runs_generated_kernels(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    fast = optimize(copy.deepcopy(model), device="cpu-generic")
    with torch.no_grad():
        found, exact = fast(x), copy.deepcopy(model).double()(x.double())
        own_error = (model(x) - exact).abs().max()
    assert _kernels(fast) >= 1
    assert (found - exact).abs().max() <= 2 * own_error
    assert fast.report.passes == (Checkpoint(), Fuse(min_bytes=KERNEL_BYTES))
    assert fast.report.predicted_peak_bytes <= fast.report.baseline_peak_bytes


def test_training_keeps_its_bits(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    trained = optimize(copy.deepcopy(model), device="cpu-generic")
    assert torch.equal(trained(x), model(x))
    assert _kernels(trained) == 0
    assert trained.report.passes == (Checkpoint(),)


def test_small_inference_is_left_to_torch(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    small = optimize(copy.deepcopy(model), device="cpu-generic")
    with torch.no_grad():
        assert torch.equal(small(x[:16]), model(x[:16]))
    assert _kernels(small) == 0


def test_named_passes_are_all_that_runs(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    plain = optimize(copy.deepcopy(model), passes=[Checkpoint()], device="cpu-generic")
    with torch.no_grad():
        assert torch.equal(plain(x), model(x))
    assert _kernels(plain) == 0


def test_as_a_backend_of_torch_compile(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="graphopt", options={"device": "cpu-generic"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)


def test_inductor_gets_the_planned_forward(
    case: tuple[nn.Module, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = case
    calls = []
    run = graphopt.fused_ops.FusedCall.__call__
    monkeypatch.setattr(
        graphopt.fused_ops.FusedCall, "__call__", lambda self, *a: calls.append(self) or run(self, *a)
    )
    given = {"compiler": "inductor", "device": "cpu-generic"}
    fused = optimize(copy.deepcopy(model), passes=[Fuse()], **given)
    plain = optimize(copy.deepcopy(model), **given)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-6)
        assert len(calls) == _kernels(fused) > 0
        calls.clear()
        torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-6)
    assert not calls and plain.report.passes == (Checkpoint(),)
