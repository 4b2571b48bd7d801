"""Fused kernels: the numbers of eager within rounding, less traffic, no higher peak; refusals by name."""

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from eager_steps import records
from fused_programs import CPU, as_program, assert_no_worse, edited, fused, ran, traced
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from random_chains import Chain, drawn_inputs
from texts import program_text
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import graphopt
from graphopt import Checkpoint, Fuse, PlanError
from graphopt.codegen import backends, launching
from graphopt.codegen.numba_cpu import NumbaKernel
from graphopt.codegen.region import Region
from graphopt.cost_models.costs import Costs
from graphopt.fused_ops import fused_at, is_fused
from graphopt.measurement import measure
from graphopt.passes.fuse import FusePlan
from graphopt.passes.fuse_apply import fused_program
from graphopt.passes.fuse_regions import regions_of
from graphopt.program import Program
from graphopt.split import saved_nodes
from graphopt.verify import verify

INFINITY = float("inf")


def with_gradients(chain: Chain, inputs: list[Tensor]) -> Program:
    """A chain and the gradients of all its inputs as one graph."""

    def step(*given: Tensor) -> tuple[Tensor, ...]:
        given = tuple(x.requires_grad_() for x in given)
        results = chain(*given)
        weights = (torch.linspace(-1, 1, r.numel(), dtype=r.dtype).view(r.shape) for r in results)
        total = sum((r * w).sum() for r, w in zip(results, weights, strict=True))
        return *results, *torch.autograd.grad(total, given, allow_unused=True, materialize_grads=True)

    return as_program(make_fx(step, tracing_mode="fake")(*inputs))


def check(data: st.DataObject, steps: int) -> None:
    """A drawn chain, its gradients included, beside eager and float64."""
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    special = data.draw(st.sampled_from([[], [], [float("nan"), INFINITY, -INFINITY]]))
    chain, inputs = Chain(data, steps), drawn_inputs(data, dtype, special)
    program, doubled = with_gradients(chain, inputs), [x.double() for x in inputs]
    kernels, _ = regions_of(program)
    assert kernels
    after = fused_program(program, [[n.name for n in nodes] for nodes, _ in kernels])
    verify(after, before=program)
    exact = ran(with_gradients(chain, doubled), doubled)
    assert_no_worse(ran(after, inputs), ran(program, inputs), exact)


@settings(max_examples=8, phases=[Phase.explicit, Phase.generate])
@given(st.data())
def test_rules(data: st.DataObject) -> None:
    """What regions say, run by torch operators."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends.MAKERS, "cpu", backends.torch_kernel)
        check(data, 6)


@settings(max_examples=1, phases=[Phase.explicit, Phase.generate])  # each compiles kernels
@given(st.data())
def test_compiled_kernels(data: st.DataObject) -> None:
    check(data, 3)


@pytest.mark.slow
@settings(max_examples=40)
@given(st.data())
def test_many_compiled_kernels(data: st.DataObject) -> None:
    check(data, 8)


# --- models ------------------------------------------------------------------------------------


class Block(nn.Module):
    """A norm, a gated MLP and a residual, twice; and a loss over classes."""

    def __init__(self, width: int = 32, classes: int = 24) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(2))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            gate, wide = up(norm(x)).chunk(2, -1)
            x = x + down(F.silu(gate) * wide)
        return F.cross_entropy(self.head(x).flatten(0, 1), target.flatten())


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 24, 32), torch.randint(0, 24, (4, 24))


def step(model: nn.Module, *inputs: Tensor) -> tuple[Tensor, list[Any]]:
    model.zero_grad()
    loss = model(*inputs)
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


slow = pytest.mark.slow
SLOW = [pytest.param((), marks=slow), pytest.param((Checkpoint(memory="min"),), marks=slow)]


@pytest.mark.parametrize("passes", [(Checkpoint(),), *SLOW], ids=str)
def test_training(passes: tuple[Any, ...]) -> None:
    """Gradients of eager; the measured peak is not above that without the kernels."""
    model, inputs = Block(), batch()
    exact = copy.deepcopy(model).double()
    loss, gradients = step(model, *inputs)
    gradients = [g.clone() for g in gradients]
    wide_loss, wide = step(exact, inputs[0].double(), inputs[1])
    peaks = []
    for own in (passes, (*passes, Fuse())):
        ours = graphopt.optimize(copy.deepcopy(model), passes=own, device=CPU)
        step(ours, *inputs)
        found_loss, found = step(ours, *inputs)
        assert_no_worse([found_loss, *found], [loss, *gradients], [wide_loss, *wide])
        ours.zero_grad(set_to_none=True)
        peaks.append(measure(lambda ours=ours: step(ours, *inputs)).peak_bytes)
        del found
    assert peaks[1] <= peaks[0]
    plan = records(ours)[-1].steps[-1].plan
    least = 1 if passes == (Checkpoint(memory="min"),) else 4  # at the least peak, most would raise it
    assert len(plan.regions) >= least and plan.peak_bytes <= plan.baseline_bytes
    assert "kernels" in str(ours.report)
    with torch.no_grad():
        torch.testing.assert_close(ours(*inputs), loss)


def test_what_is_kept_stays_kept() -> None:
    """The backward takes from the forward what it took before, but for inputs, which are there anyway."""
    program = graphopt.trace(Block(), batch())
    _, after = fused(program)
    before, kept = ({n.name for n in saved_nodes(p) if n.op != "placeholder"} for p in (program, after))
    assert kept and kept <= before


@pytest.mark.slow
def test_through_inductor() -> None:
    model, inputs = Block(), batch()
    loss, gradients = step(model, *inputs)
    gradients = [g.clone() for g in gradients]
    ours = graphopt.optimize(copy.deepcopy(model), passes=[Fuse()], compiler="inductor", device=CPU)
    found_loss, found = step(ours, *inputs)
    torch.testing.assert_close([found_loss, *found], [loss, *gradients])
    assert records(ours)[-1].steps[-1].plan.regions


def test_a_broken_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch operators in its place, and one warning for each kernel."""

    def broken(**_: object) -> None:
        raise OSError("no code can be made here")

    monkeypatch.setattr("numba.njit", broken)
    monkeypatch.setitem(backends.MAKERS, "cpu", lambda region: kernel_of(region))
    launching.say.cache_clear()
    kernels: dict[Region, NumbaKernel] = {}

    def kernel_of(region: Region) -> NumbaKernel:
        return kernels.setdefault(region, NumbaKernel(region, None))

    def function(x: Tensor) -> Tensor:
        return torch.tanh(x * 3.25 + 1).softmax(-1)

    x = torch.randn(5, 7)
    ours = graphopt.optimize(function, passes=[Fuse()])
    with pytest.warns(UserWarning, match="runs by torch operators") as remarks:
        first, second = ours(x), ours(x)
    assert len(remarks) == len(kernels) == 1
    torch.testing.assert_close(first, function(x))
    assert torch.equal(first, second)


# --- plans -------------------------------------------------------------------------------------


def norm_of_sum(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + y
    return total, total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


SUM_INPUTS = (torch.ones(64, 32), torch.ones(64, 32), torch.ones(32))


def test_bytes_and_instructions() -> None:
    """By hand: two tensors and a vector are read, two are written; before, every operator's own."""
    program = graphopt.trace(norm_of_sum, SUM_INPUTS, training=False)
    costs = Costs.of(program, CPU)
    plan, after = fused(program)
    (region,) = plan.regions
    full, row = 64 * 32 * 4, 64 * 4
    assert region.bytes_after == 4 * full + 32 * 4
    add, square, mean, small, scaled = 3 * full, 2 * full, full + row, 2 * row, 2 * full + row
    assert region.bytes_before == add + square + mean + 2 * small + scaled + 2 * full + 32 * 4
    assert region.inputs == tuple(i.name for i in program.inputs)
    assert region.seconds_before == sum(costs.nodes[name].seconds for name in region.nodes)
    (node,) = (n for n in after.operators() if is_fused(n))
    assert region.seconds_after == Costs.of(after, CPU).nodes[node.name].seconds
    assert fused_at(node).instructions > 64 * 32 * 5  # two sums, three products


def test_a_program_is_pickled_with_its_kernels() -> None:
    _, after = fused(graphopt.trace(norm_of_sum, SUM_INPUTS, training=False))
    again = pickle.loads(pickle.dumps(after.module.code)), pickle.loads(pickle.dumps(after.module))
    inputs = [torch.randn(64, 32), torch.randn(64, 32), torch.randn(32)]
    for found, expected in zip(again[1](*inputs), norm_of_sum(*inputs), strict=True):
        torch.testing.assert_close(found, expected)


def test_an_edited_plan() -> None:
    """Fewer regions, or smaller ones, may be asked for; what is left computes the same."""
    program = graphopt.trace(norm_of_sum, SUM_INPUTS, training=False)
    plan, _ = fused(program)
    (region,) = plan.regions
    smaller = replace(plan, regions=(replace(region, nodes=region.nodes[2:]),))
    edited = FusePlan.from_json(smaller.to_json())
    inputs = [torch.randn(64, 32), torch.randn(64, 32), torch.randn(32)]
    for chosen in (edited, replace(plan, regions=())):
        found = ran(Fuse().apply(program, chosen), inputs)
        torch.testing.assert_close(found, list(norm_of_sum(*inputs)))


def around_a_product(x: Tensor, weight: Tensor) -> Tensor:
    first = torch.tanh(x)
    return torch.relu(first @ weight) + first


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ([("tanh", "missing")], "'missing' is no node"),
        ([("tanh", "tanh")], "'tanh' is twice in a region"),
        ([("tanh", "mm")], "no kernel: operator: aten.mm.default has no formula"),
        ([("tanh", "add")], "of tanh and add would make a cycle"),
        ([("relu", "threshold_backward")], "is of forward and backward"),
    ],
)
def test_regions_that_cannot_be(regions: list[tuple[str, ...]], message: str) -> None:
    program = traced(around_a_product, torch.ones(8, 8), torch.ones(8, 8))
    with pytest.raises(PlanError, match=message):
        Fuse().apply(program, edited(*regions))


def test_no_region_moves_over_a_write() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        first = torch.tanh(x)
        torch.ops.aten.copy_.default(y, first)
        return torch.relu(first) * 2

    x, y = torch.randn(4, 8), torch.randn(4, 8)
    module = make_fx(function, tracing_mode="fake")(x, y)
    program = as_program(module)
    plan, _ = fused(program)
    assert [r.nodes for r in plan.regions] == [("relu", "mul")]
    with pytest.raises(PlanError, match="would move over an operator that writes"):
        Fuse().apply(program, edited(("tanh", "relu")))


def test_symbolic_sizes_are_left_alone() -> None:
    module = make_fx(lambda x: torch.tanh(x).exp() + 1, tracing_mode="symbolic")(torch.randn(6, 10))
    plan, after = fused(as_program(module))
    assert not plan.regions and not any(is_fused(n) for n in after.operators())
    assert {(m.rule, m.condition) for m in plan.missed} == {("shape", "its sizes are symbols")}


def test_remarks() -> None:
    """Each names the node, the rule, and the condition that did not hold."""

    def function(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = around_a_product(x, weight)
        return torch.sin(total), total.amax(0)

    plan, _ = fused(traced(function, torch.ones(8, 8), torch.ones(8, 8)))
    found = {m.node: m for m in plan.missed}
    assert found["sin"].rule == "operator" and "aten.sin.default has no formula" in found["sin"].condition
    assert found["amax"].rule == "reduction" and "over dimensions [0]" in found["amax"].condition
    assert found["relu"].rule == "order" and "mm" in found["relu"].condition
    (little,) = fused(traced(around_a_product, torch.ones(8, 8), torch.ones(8, 8)), min_bytes=10**6)[
        0
    ].missed[-1:]
    assert little.rule == "gain" and "would save" in little.condition
    assert json.loads(plan.to_json())["missed"][0].keys() == {"node", "rule", "condition"}


def test_options() -> None:
    with pytest.raises(PlanError, match="min_bytes=-1"):
        Fuse(min_bytes=-1)
    with pytest.raises(PlanError, match="not a FusedRegion"):
        FusePlan(({"nodes": ["x"]},), (), 0, 0)  # type: ignore[arg-type]


GOLDEN = Path(__file__).parent.parent / "golden" / "fuse.txt"


def test_the_golden_text(request: pytest.FixtureRequest) -> None:
    program = traced(norm_of_sum, *SUM_INPUTS)
    plan, after = fused(program)
    text = "\n\n".join([program_text(program), str(plan), plan.to_json(), program_text(after)]) + "\n"
    if request.config.getoption("--regenerate-golden"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert GOLDEN.read_text(encoding="utf-8") == text
