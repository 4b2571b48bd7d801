"""Numerics of a rewritten program: bits, rounding that is as good as before, and faults."""

import copy

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt import Fuse, Program, VerifyError
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import get_device
from graphopt.numerics import compare_numerics


def _cancels(x: Tensor) -> Tensor:
    """Row sums [n] of x [n, m] less its mean: nothing is left but rounding."""
    return (x - x.mean(-1, keepdim=True)).sum(-1)


def _norm(x: Tensor) -> Tensor:
    return nn.functional.rms_norm(x, x.shape[-1:]) * 0.37


def _pair(function: object, x: Tensor) -> tuple[Program, Program]:
    """A program, and what `Fuse` makes of it."""
    before = graphopt.trace(function, (x,), training=False)
    pass_ = Fuse()
    plan = pass_.plan(before, Costs.of(before, get_device("cpu-generic")))
    assert plan.regions
    return before, pass_.apply(before, plan)


def test_equal_bits_need_no_more() -> None:
    before, _ = _pair(_norm, torch.randn(32, 64))
    compare_numerics(before.copy(), before, tolerance=0.0)


def test_sums_that_cancel_may_round_in_another_order() -> None:
    before, after = _pair(_cancels, torch.randn(256, 1024))
    compare_numerics(after, before)


def test_a_narrow_dtype_may_be_rounded_less_often() -> None:
    before, after = _pair(_norm, torch.randn(64, 256).bfloat16())
    compare_numerics(after, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fault_is_found_in_every_dtype(dtype: torch.dtype) -> None:
    before, _ = _pair(_norm, torch.randn(64, 256, dtype=dtype))
    wrong = before.copy()
    (node,) = (n for n in wrong.graph.nodes if 0.37 in n.args)
    node.args = (node.args[0], 0.47)
    wrong.module.recompile()
    with pytest.raises(VerifyError, match="over 10 times what that is off by itself"):
        compare_numerics(wrong, before)


def test_random_numbers_are_held_against_the_same_draw_only() -> None:
    before = graphopt.trace(lambda x: torch.dropout(x, 0.5, True) * 0.37, (torch.ones(64),))
    wrong = before.copy()
    node = next(n for n in wrong.graph.nodes if 0.37 in n.args)
    node.args = (node.args[0], 0.38)
    wrong.module.recompile()
    with pytest.raises(VerifyError) as caught:
        compare_numerics(wrong, before)
    assert "times what" not in str(caught.value)


def test_optimize_verifies_generated_kernels() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 512), nn.SiLU(), nn.LayerNorm(512), nn.Linear(512, 64)).bfloat16()
    x = torch.randn(4096, 256).bfloat16()
    checked = graphopt.optimize(copy.deepcopy(net), verify="full", device="cpu-generic")
    with torch.no_grad():
        found, exact = checked(x), copy.deepcopy(net).double()(x.double())
        assert (found - exact).abs().max() <= 2 * (net(x) - exact).abs().max()
    assert checked._graphopt.log.records[0].steps[-1].plan.regions
