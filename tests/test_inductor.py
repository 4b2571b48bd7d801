"""Planned graphs that Inductor runs: the same gradients, and a peak that the prediction covers."""

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt import measure, optimize
from graphopt.cost_models.calls import call_of
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import get_device
from graphopt.errors import PlanError
from graphopt.inductor import keep_places
from graphopt.tracing import trace

aten = torch.ops.aten


class Tied(nn.Module):
    """Embedding and projection share a weight; its two gradients are added late in the backward."""

    def __init__(self, words: int = 512, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = self.embedding(tokens)
        for layer in self.layers:
            h = h + F.gelu(layer(h))
        logits = h @ self.embedding.weight.t()
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


class Packed(nn.Module):
    """Gated blocks with one projection for both halves: their gradients meet in a concatenation."""

    def __init__(self, words: int = 512, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.up = nn.ModuleList(nn.Linear(width, 8 * width, bias=False) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(4 * width, width, bias=False) for _ in range(depth))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = self.embedding(tokens)
        for up, down in zip(self.up, self.down, strict=True):
            gate, value = up(h).chunk(2, dim=-1)
            h = h + down(F.silu(gate) * value)
        return h.square().mean()


def sum_of_products(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A product that is added to something that comes later, and one that is added at once."""
    late = x @ y
    between = torch.tanh(x) * y
    now = between @ y
    return now + between, late + between


def sums_of_products(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Three sums: of what dies there but is read later, read at once, and of what partly stays."""
    early = x.mm(y) + y.mm(x)
    soon = (y.mm(y) + x.mm(x)).sin()
    stays = soon.mm(x)
    partly = stays + soon.mm(y)
    return soon, stays.mm(y), partly.sin(), early.sin()


def test_a_sum_that_is_read_late_becomes_a_tensor_where_more_than_itself_dies() -> None:
    module = trace(sums_of_products, tuple(torch.randn(2, 6, 6))).module
    keep_places(module)
    sums = module.graph.find_nodes(op="call_function", target=aten.add.Tensor)
    assert ["inductor_realize_to_strides" in n.meta for n in sums] == [True, False, False]


def test_a_product_that_is_added_later_is_out_of_sight_of_addmm() -> None:
    x, y = torch.randn(2, 6, 6)
    module = trace(sum_of_products, (x, y)).module
    keep_places(module)
    module.graph.lint()
    now, late = module.graph.find_nodes(op="call_function", target=aten.add.Tensor)
    assert now.args[0].target is aten.mm.default
    same = late.args[0]
    assert same.target is same.args[0].target is aten.view.default
    assert same.args[0].args[0].target is aten.mm.default
    assert same.meta["val"].shape == (6, 6) and same.args[0].meta["val"].shape == (36,)
    for mine, theirs in zip(module(x, y), sum_of_products(x, y), strict=True):
        assert torch.equal(mine, theirs)


def test_convolutions_are_probed_in_the_layout_that_inductor_gives_them() -> None:
    program = trace(nn.Conv2d(3, 4, 3), torch.zeros(2, 3, 8, 8))
    for node in program.operators():
        if node.target is aten.convolution.default:
            image, weight = call_of(node, channels_last=True).args[:2]
            assert image.strides == (192, 1, 24, 3) and weight.strides == (27, 9, 3, 1)
            assert call_of(node).args[0].strides == (192, 64, 8, 1)
        elif node.target is aten.convolution_backward.default:
            gradient, image = call_of(node, channels_last=True).args[:2]
            assert gradient.strides == (144, 1, 24, 4) and image.strides == (192, 1, 24, 3)
        elif call_of(node) is not None:
            assert call_of(node, channels_last=True) == call_of(node)


def test_costs_for_inductor_write_over_nothing() -> None:
    program = trace(Tied(), torch.zeros(4, 32, dtype=torch.int64))
    device = get_device("h100")
    eager = Costs.of(program, device).dataflow(program)
    fused = Costs.measured(program, device, fused=True).dataflow(program)
    assert any(o.reusable for o in eager.operators)
    assert not any(o.reusable for o in fused.operators)


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs g++")


@needs_compiler
@pytest.mark.parametrize(("kind", "memory"), [(Tied, "min"), (Tied, 0.85), (Tied, None), (Packed, "min")])
def test_the_peak_is_as_the_report_predicts(kind: type[nn.Module], memory: str | float | None) -> None:
    torch.manual_seed(0)
    model = kind()
    tokens = torch.randint(0, 512, (8, 64))
    optimized = optimize(copy.deepcopy(model), memory=memory, compiler="inductor")
    model(tokens).backward()
    optimized(tokens).backward()
    for p, q in zip(model.parameters(), optimized.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
    optimized.zero_grad()
    record = optimized._graphopt.log.records[-1]
    assert optimized.report.predicted_peak_bytes == record.compiled_peak_bytes
    if record.limit_bytes is not None:
        assert record.compiled_peak_bytes <= record.limit_bytes
    predicted = record.compiled_peak_bytes - record.static_bytes
    measured = measure(lambda: optimized(tokens).backward()).peak_bytes
    assert measured == pytest.approx(predicted, rel=0.005)


@needs_compiler
def test_a_plan_that_inductor_cannot_keep_to_is_made_again_with_less_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plans: list[int] = []
    monkeypatch.setattr(
        "graphopt.inductor_memory._scratch", lambda *_: plans.append(1) or 40_000 * (len(plans) < 400)
    )
    model = Tied(words=64, width=16, depth=2)
    tokens = torch.randint(0, 64, (8, 64))
    optimized = optimize(model, memory=0.8, compiler="inductor")
    optimized(tokens).backward()
    (record,) = optimized._graphopt.log.records
    assert record.compiled_peak_bytes <= record.limit_bytes


@needs_compiler
def test_a_budget_that_inductor_never_meets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.inductor_memory._scratch", lambda *_: 10**6)
    optimized = optimize(Tied(words=64, width=16, depth=2), memory=0.8, compiler="inductor")
    with pytest.raises(PlanError, match="no plan that Inductor compiles keeps the step within"):
        optimized(torch.randint(0, 64, (8, 64)))
    assert optimized._graphopt.log.records == []


@needs_compiler
@pytest.mark.parametrize("extra", [0, 30_000])
def test_the_smallest_reachable_peak_is_what_inductor_makes_of_it(
    monkeypatch: pytest.MonkeyPatch, extra: int
) -> None:
    monkeypatch.setattr("graphopt.inductor_memory._scratch", lambda *_: extra)
    model, tokens = Tied(words=64, width=16, depth=2), torch.randint(0, 64, (8, 64))
    with pytest.raises(PlanError) as refused:
        optimize(model, memory=0.3, compiler="inductor")(tokens)
    reachable = refused.value.reachable_bytes
    assert reachable is not None and f"({reachable} bytes)" in str(refused.value)
    optimized = optimize(model, memory=reachable, compiler="inductor")
    optimized(tokens).backward()
    (record,) = optimized._graphopt.log.records
    assert record.compiled_peak_bytes == reachable == record.limit_bytes
