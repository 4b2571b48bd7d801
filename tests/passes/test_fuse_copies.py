"""Values made again in the kernels that read them: the same numbers, and less traffic."""

from collections import Counter

import pytest
import torch
from fused_programs import edited, fused, ran
from torch import Tensor

import graphopt
from graphopt import Fuse, PlanError
from graphopt.fused_ops import is_fused
from graphopt.passes.fuse import FusePlan
from graphopt.passes.fuse_copies import with_copies
from graphopt.passes.fuse_regions import regions_of
from graphopt.program import Program

INPUTS = (torch.ones(64, 32), torch.ones(32), torch.ones(32, 32))


def gated_norm(x: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """The normalised rows go into a product, and with the rows and their scale into what gates it."""
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    normed = x * scale
    return ((normed * w) @ u) * normed + x * 2 + scale


def costly(x: Tensor, w: Tensor, u: Tensor) -> Tensor:
    bent = torch.erf(torch.tanh(x))
    return ((bent + w) @ u) * bent + x


def alone(x: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """What the second kernel would need to make `normed` again, it does not read."""
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    return ((normed * w) @ u) * normed


def traced(function: object) -> Program:
    return graphopt.trace(function, INPUTS, training=False)  # type: ignore[arg-type]


def moved(plan: FusePlan) -> int:
    return sum(r.bytes_after for r in plan.regions)


def inputs() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(x.shape) for x in INPUTS]


def test_a_value_is_made_again_from_what_is_read_anyway() -> None:
    program = traced(gated_norm)
    plan, after = fused(program)
    twice = [n for n, count in Counter(n for r in plan.regions for n in r.nodes).items() if count > 1]
    assert len(twice) == 1 and len(plan.regions) == 2
    assert not any(twice[0] in (*r.inputs, *r.outputs) for r in plan.regions)
    plain = sum(bytes_of(kernel) for _, kernel in regions_of(program)[0])
    copied = sum(bytes_of(kernel) for _, kernel in with_copies(program, regions_of(program)[0]))
    assert plain - copied == 2 * 64 * 32 * 4  # neither written nor read
    assert moved(plan) == copied
    given = inputs()
    want = gated_norm(*(x.double() for x in given))
    torch.testing.assert_close(ran(after, given)[0].double(), want, rtol=1e-5, atol=1e-5)


def bytes_of(kernel: object) -> int:
    tensors = [n.meta["val"] for n in (*kernel.inputs, *kernel.outputs)]  # type: ignore[attr-defined]
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("function", [costly, alone])
def test_what_takes_long_or_needs_more_is_read(function: object) -> None:
    program = traced(function)
    kernels, _ = regions_of(program)
    assert [nodes for nodes, _ in with_copies(program, kernels)] == [nodes for nodes, _ in kernels]


def test_a_plan_with_copies_in_text() -> None:
    program = traced(gated_norm)
    plan, after = fused(program)
    again = Fuse().apply(program, FusePlan.from_json(plan.to_json()))
    assert str(again.graph) == str(after.graph)
    found, want = ran(again, inputs()), ran(after, inputs())
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_a_region_that_nobody_reads_is_no_kernel() -> None:
    """All of the first region is made again in the second."""
    program = graphopt.trace(lambda x: torch.relu(torch.sin(x) + 1), (INPUTS[0],), training=False)
    with pytest.raises(PlanError, match="nobody reads what add makes"):
        Fuse().apply(program, edited(("add",), ("add", "relu")))
    after = Fuse().apply(program, edited(("add", "relu")))
    assert sum(map(is_fused, after.operators())) == 1
