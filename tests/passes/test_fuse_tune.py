"""`Fuse(tune=True)`: each distinct kernel is measured once, and the plan says what that gave."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fused_programs import CPU, fused
from torch import Tensor

import graphopt
from graphopt import Fuse, PlanError, fused_ops
from graphopt.codegen import numba_bench
from graphopt.codegen.numba_choice import NumbaChoice
from graphopt.codegen.numba_cpu import NumbaKernel
from graphopt.codegen.region import Region
from graphopt.fused_ops import is_fused
from graphopt.passes import fuse_tune
from graphopt.passes.fuse import FusePlan

WIDE = 600
W = torch.rand(WIDE) + 0.5


def norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * W


def norms(x: Tensor, m: Tensor) -> Tensor:
    """Two equal norms, before matrix products, and a short kernel."""
    b = norm(norm(x) @ m)
    return torch.tanh(b @ b.mT) * 2.5 + 1


def inputs() -> tuple[Tensor, Tensor]:
    return torch.rand(8, WIDE), torch.rand(WIDE, WIDE)


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[Region, NumbaKernel]:
    """Kernels with a folder of their own, the same for the pass and for what it makes."""
    found: dict[Region, NumbaKernel] = {}

    def kernel_of(region: Region, device: torch.device) -> NumbaKernel:
        return found.setdefault(region, NumbaKernel(region, tmp_path))

    for module in (fused_ops, fuse_tune):
        monkeypatch.setattr(module, "kernel_on", kernel_of)
    return found


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[NumbaChoice]:
    """Made-up times, the smaller the block the shorter; and what they were asked for."""
    asked: list[NumbaChoice] = []

    def seconds(bench: Any, choice: NumbaChoice, count: int) -> float:
        asked.append(choice)
        return choice.block / 1e6

    monkeypatch.setattr(numba_bench.NumbaBench, "seconds", seconds)
    return asked


def test_kernels_are_tuned_once(kernels: dict[Region, NumbaKernel], measured: list[NumbaChoice]) -> None:
    given = inputs()
    program = graphopt.trace(norms, given, training=False)
    plan, _ = fused(program, tune=True)
    wide, short = plan.tuned
    assert (wide.count, wide.choice, short.count, short.choice) == (2, "block=512", 1, "default")
    assert wide.output in program.module.code and wide.seconds_after / wide.seconds_before == 512 / 2048
    assert "tuned, they take 3.07 ms instead of 6.14" in str(plan)
    assert f"{wide.output} and 1 equal to it: block=512, 512.0 us instead of 2048.0" in plan.table()
    assert FusePlan.from_json(plan.to_json()) == plan
    asked = len(measured)
    again, _ = fused(program, tune=True)
    assert again == plan and len(measured) == asked  # found in the folder
    ours = graphopt.optimize(norms, passes=[Fuse(tune=True)], device=CPU)
    with torch.no_grad():
        torch.testing.assert_close(ours(*given), norms(*given))
    assert len(measured) == asked
    assert {512} <= {form.block for k in kernels.values() for form in k._compiled}


def test_without_a_gain(kernels: dict[Region, NumbaKernel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba_bench.NumbaBench, "seconds", lambda *_: 1e-3)
    program = graphopt.trace(norms, inputs(), training=False)
    plan, _ = fused(program, tune=True)
    assert {t.choice for t in plan.tuned} == {"default"}
    assert str(plan).endswith("no other launches were measured to be faster")


def test_what_cannot_be_measured(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    program = graphopt.trace(norms, inputs(), training=False)
    with monkeypatch.context() as patch:
        patch.setattr(fuse_tune, "limit_bytes", lambda device: 100)
        plan, _ = fused(program, tune=True)
        assert "too large to be made up here" in plan.tuned[0].choice and plan.tuned[0].seconds_after == 0
    _, after = fused(program)
    node = next(n for n in after.operators() if is_fused(n))
    node.meta["val"] = [x.to("meta") for x in node.meta["val"]]
    with pytest.raises(PlanError, match="tune=True measures kernels on meta, which is not here"):
        fuse_tune.tuned_kernels(after)
    with pytest.raises(PlanError, match="tune=2 is neither"):
        Fuse(tune=2)  # type: ignore[arg-type]
