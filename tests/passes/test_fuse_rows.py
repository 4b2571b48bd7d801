"""Rows of other grids: short dimensions summed, and results in another order of rows."""

import pytest
import torch
from fused_programs import as_program, assert_no_worse, edited, fused, ran
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from graphopt import Fuse, PlanError

INFINITY = float("inf")


def shared_heads(x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of heads that share keys and values, summed, turned, and laid out by tokens."""
    total = torch.ops.aten.sum.dim_IntList(x, [2], True).squeeze(2)
    first, second = total[..., :4], total[..., 4:]
    turned = total * table + torch.cat([-second, first], -1) * (1 - table)
    return turned.transpose(1, 2).contiguous(), torch.tanh(turned)


@pytest.mark.parametrize("shape", [(2, 3, 2, 5, 8), (2, 4, 4, 4, 8), (1, 3, 2, 5, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_shared_heads(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """One kernel; sizes that are equal do not confuse rows with heads."""
    x, table = torch.randn(shape, dtype=dtype), torch.rand(shape[3], shape[4], dtype=dtype)
    x[0, 0, 0, 0, :3] = torch.tensor([INFINITY, -INFINITY, float("nan")])
    program = as_program(make_fx(shared_heads, tracing_mode="fake")(x, table))
    plan, after = fused(program)
    (region,) = plan.regions
    assert {"sum_1", "clone", "tanh"} <= {*region.nodes}
    exact = list(shared_heads(x.double(), table.double()))
    assert_no_worse(ran(after, [x, table]), ran(program, [x, table]), exact)


def test_a_value_stored_in_another_order_is_not_read_again() -> None:
    def function(x: Tensor) -> Tensor:
        turned = torch.tanh(x * 2).transpose(0, 1).contiguous()
        return torch.sigmoid(turned) * 3

    x = torch.randn(4, 4, 8)
    program = as_program(make_fx(function, tracing_mode="fake")(x))
    plan, after = fused(program)
    assert [r.nodes[-1] for r in plan.regions] == ["clone", "mul_1"]
    assert "another order" in str(plan.missed)
    torch.testing.assert_close(ran(after, [x])[0], function(x))
    with pytest.raises(PlanError, match="the rows of clone are in another order"):
        Fuse().apply(program, edited(("mul", "tanh", "clone", "sigmoid", "mul_1")))
