"""Programs with fused kernels: made, run, and judged."""

from typing import Any

import torch
from torch import Tensor, fx

import graphopt
from graphopt import Fuse
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import get_device
from graphopt.passes.fuse import FusedRegion, FusePlan
from graphopt.program import Input, Program, Role, record_leaves
from graphopt.verify import verify

CPU = get_device("cpu-generic")


def traced(function: Any, *inputs: Tensor) -> Program:
    """Forward and backward, in all inputs."""
    return graphopt.trace(function, tuple(x.detach().requires_grad_() for x in inputs))


def fused(program: Program, **options: Any) -> tuple[FusePlan, Program]:
    """The plan, and the program that it makes, verified."""
    pass_ = Fuse(**options)
    plan = pass_.plan(program, Costs.of(program, CPU))
    after = pass_.apply(program, plan)
    verify(after, before=program)
    return plan, after


def as_program(module: fx.GraphModule) -> Program:
    """A graph of operators as the forward of a step, whatever it computes."""
    module.graph.eliminate_dead_code()
    record_leaves(module.graph)
    results = module.graph.output_node().args[0]
    results = (results,) if isinstance(results, fx.Node) else tuple(results)  # type: ignore[arg-type]
    module.graph.output_node().args = (results,)
    names = [n.name for n in module.graph.nodes if n.op == "placeholder"]
    return Program(module, len(results), tuple(Input(name, Role.INPUT, name) for name in names))


def ran(program: Program, inputs: list[Tensor]) -> list[Tensor]:
    """What a forward program computes."""
    with torch.no_grad():
        return list(fx.Interpreter(program.module).run(*inputs, enable_io_processing=False))


def assert_no_worse(found: list[Tensor], eager: list[Tensor], exact: list[Tensor]) -> None:
    """Errors at most twice those of eager, or some units of the last place of the largest number."""
    assert len(found) == len(eager) == len(exact)
    size = max(float(x[x.isfinite()].abs().max()) for x in exact if x.isfinite().any())
    for f, e, x in zip(found, eager, exact, strict=True):
        assert (f.shape, f.dtype, f.stride()) == (e.shape, e.dtype, e.stride())
        finite = e.isfinite() & x.isfinite()
        assert torch.equal(f.isnan(), e.isnan())
        assert torch.equal(f[~finite].nan_to_num(), e[~finite].nan_to_num())
        if finite.any():
            errors = [float((v.double() - x)[finite].abs().max()) for v in (f, e)]
            assert errors[0] <= 2 * errors[1] + 8 * torch.finfo(e.dtype).eps * size


def edited(*regions: tuple[str, ...]) -> FusePlan:
    rows = tuple(FusedRegion(nodes, (), (), 0, 0, 0.0, 0.0) for nodes in regions)
    return FusePlan(rows, (), 0, 0)
