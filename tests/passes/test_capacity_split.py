"""Experts on chunks of their capacity: how many, refusals, a golden text."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_ranks import fake_mesh
from hypothesis import given, settings
from hypothesis import strategies as st
from lockstep import run_ranks
from texts import program_text
from torch import Tensor

import graphopt
from graphopt import OverlapComm, PlanError
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import GENERIC_CPU, Cluster
from graphopt.cost_models.link_costs import LinkCosts
from graphopt.passes.capacity_choice import MOST_CHUNKS, degree
from graphopt.passes.capacity_split import CapacityChunks, Cut
from graphopt.passes.overlap_plan import OverlapPlan
from graphopt.program import Program
from graphopt.split import saved_nodes
from graphopt.verify import verify

GOLDEN = Path(__file__).parent.parent / "golden" / "capacity_split.txt"
collectives: Any = torch.ops._c10d_functional
RANKS = 2

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


def sent(x: Tensor) -> Tensor:
    sizes = [x.shape[0] // RANKS] * RANKS
    return collectives.wait_tensor(collectives.all_to_all_single(x, sizes, sizes, "0"))  # type: ignore


def experts(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """x [experts, capacity, width]; each rank has the weights [experts / ranks, ...] of its experts."""
    count, capacity, width = x.shape
    mine = sent(x * 2).view(RANKS, count // RANKS, capacity, width).transpose(0, 1)
    hidden = torch.nn.functional.gelu(torch.bmm(mine.reshape(count // RANKS, -1, width), first))
    back = torch.bmm(hidden, second).view(count // RANKS, RANKS, capacity, width).transpose(0, 1)
    return sent(back.reshape(count, capacity, width)).sum(0)


def captured(capacity: int, width: int = 8, f: Any = experts) -> Program:
    sizes = (4, capacity, width), (2, width, 2 * width), (2, 2 * width, width)
    return graphopt.trace(f, [torch.ones(size) for size in sizes], training=False)


@pytest.fixture(scope="module", autouse=True)
def ranks() -> Iterator[None]:
    with fake_mesh(RANKS):
        yield


def planned(program: Program, latency_s: float, bytes_per_s: float = 1e9, **options: Any) -> OverlapPlan:
    links = LinkCosts(Cluster(GENERIC_CPU, RANKS, bytes_per_s, latency_s, "x"))
    return OverlapComm(links=links, **options).plan(program, Costs.of(program, GENERIC_CPU))


def test_the_golden_text(request: pytest.FixtureRequest) -> None:
    before = captured(5)
    plan = planned(before, 1e-6, capacity_split=2)
    after = OverlapComm().apply(before, plan)
    verify(after, before=before)
    text = "\n\n".join([program_text(before), plan.remark, program_text(after)]) + "\n"
    if request.config.getoption("--regenerate-golden"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_chunks_follow_from_the_costs() -> None:
    """The cheaper a transfer starts, the more chunks; one that is slow to start leaves it whole."""
    program = captured(512, 64)
    found = [planned(program, latency) for latency in (1e-8, 2e-4, 1.0)]
    counts = [plan.chunks for plan in found]
    assert counts[0] > counts[1] >= counts[2] == 1
    for plan in found[:2]:
        assert plan.chunks == 1 or plan.seconds < 0.98 * plan.seconds_before
    assert len(found[0].transfers) == 2 * counts[0]
    assert planned(program, 1e-8, capacity_split=1).chunks == 1
    assert OverlapPlan.from_json(found[0].to_json()) == found[0]


def test_two_chunks_are_as_the_formula_has_them() -> None:
    """With transfers and experts in a chain, the cut step is near max(C, N) + min(C, N) / d."""
    program = captured(512, 64)
    whole, halves = planned(program, 1e-9, capacity_split=1), planned(program, 1e-9, capacity_split=2)
    assert whole.gap < 1.01 and halves.seconds < 0.9 * whole.seconds
    assert halves.bound_seconds <= halves.seconds <= 1.3 * halves.bound_seconds


@given(st.floats(1e-6, 1.0), st.floats(1e-6, 1.0), st.floats(1e-8, 1.0))
def test_no_other_degree_is_much_better(compute_s: float, transfer_s: float, overhead_s: float) -> None:
    least, most = sorted((compute_s, transfer_s))

    def seconds(chunks: int) -> float:
        return most + least / chunks + overhead_s * (chunks - 1)

    found = degree(compute_s, transfer_s, overhead_s)
    assert 1 <= found <= MOST_CHUNKS
    assert seconds(found) <= 1.1 * min(map(seconds, range(1, MOST_CHUNKS + 1)))


@given(st.integers(1, 3), st.integers(2, 7), st.integers(2, 4))
def test_chunks_are_all_of_it(outer: int, capacity: int, chunks: int) -> None:
    cut = Cut(1, outer, capacity)
    whole = torch.arange(2 * outer * capacity * 3).view(2, outer * capacity, 3)
    parts = [cut.select(whole, i, chunks).unflatten(1, (outer, -1)) for i in range(chunks)]
    assert torch.equal(torch.cat(parts, 2).flatten(1, 2), whole)


@settings(max_examples=6)
@given(st.integers(2, 9), st.integers(2, 4), st.booleans())
def test_the_results_are_those_of_the_whole(capacity: int, chunks: int, twice: bool) -> None:
    def f(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        once = experts(x, first, second)
        return experts(x * once, first, second) if twice else once

    def weights() -> list[Tensor]:
        return [torch.randn(2, 8, 16), torch.randn(2, 16, 8)]

    chunks = min(chunks, capacity)
    before = captured(capacity, f=f)
    after = CapacityChunks(before, chunks)
    verify(after.program, before=before)
    tensors = [[torch.randn(4, capacity, 8), *weights()] for _ in range(RANKS)]
    expected = run_ranks([before] * RANKS, tensors)
    found = run_ranks([after.program] * RANKS, tensors)
    pairs = [
        (a, b)
        for ours, theirs in zip(found, expected, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    ]
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in pairs)
    assert all(len(parts) == chunks for parts in after.parts.values())


class Sent(torch.autograd.Function):
    """A piece to each rank; the gradients of the pieces go back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return sent(x.contiguous())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return sent(gradients[0].contiguous())


class Trained(torch.nn.Module):
    """Experts that are learnt, as is a product before them; pieces transposed, so that layouts differ."""

    def __init__(self) -> None:
        super().__init__()
        self.before = torch.nn.Parameter(torch.randn(8, 8))
        self.first, self.second = (torch.nn.Parameter(torch.randn(2, *s)) for s in ((8, 16), (16, 8)))

    def forward(self, x: Tensor) -> Tensor:
        mine = Sent.apply(x @ self.before).view(RANKS, 2, -1, 8).transpose(0, 1)
        hidden = torch.nn.functional.silu(torch.bmm(mine.reshape(2, -1, 8), self.first))
        back = torch.bmm(hidden, self.second).view(2, RANKS, -1, 8).transpose(0, 1)
        return Sent.apply(back.reshape(x.shape)).sin()


@settings(max_examples=3, deadline=None)
@given(st.integers(4, 9), st.integers(2, 3))
def test_training_gives_the_same_gradients(capacity: int, chunks: int) -> None:
    torch.manual_seed(capacity)
    model, x = Trained().double(), torch.randn(4, capacity, 8).double()
    before = graphopt.trace(model, [x])
    after = CapacityChunks(before, chunks)
    verify(after.program, before=before)
    kinds = [str(n.target) for n in after.program.operators() if "all_to_all" in str(n.target)]
    assert len(kinds) == 4 * chunks
    values = dict(model.named_parameters()) | {"x": x}
    tangent = torch.randn(4, capacity, 8).double()
    own = [{k: v.detach() + rank for k, v in values.items()} for rank in range(RANKS)]
    tensors = [[given.get(i.label, tangent) for i in before.inputs] for given in own]
    expected = run_ranks([before] * RANKS, tensors)
    found = run_ranks([after.program] * RANKS, tensors)
    for ours, theirs in zip(found, expected, strict=True):
        assert sum(a is not None for a in ours) == 4
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) is (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_what_only_the_backward_reads_is_joined_there() -> None:
    """Chunks of activations are saved; the whole for gradients of weights is made in the backward."""
    program = CapacityChunks(graphopt.trace(Trained(), [torch.randn(4, 6, 8)]), 2).program
    saved = {n.name for n in saved_nodes(program)}
    assert any("_chunk0" in name for name in saved) and not any("_joined" in name for name in saved)


def flat(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return sent(x.view(-1, x.shape[-1])).relu() @ first[0]


def over_tokens(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    mine = sent(x)
    return sent(mine.softmax(1) @ first[0] @ second[0])


@pytest.mark.parametrize(
    ("f", "capacity", "said"),
    [
        (experts, 2, r"no all-to-all of \[experts, capacity, ...\] has something to compute behind it"),
        (flat, 8, "no all-to-all of"),
        (over_tokens, 8, "no all-to-all of"),
    ],
)
def test_what_stays_whole(f: Any, capacity: int, said: str) -> None:
    program = captured(capacity, f=f)
    with pytest.raises(PlanError, match=f"capacity_split=3: {said}"):
        planned(program, 1e-9, capacity_split=3)


def test_options_that_are_refused() -> None:
    with pytest.raises(PlanError, match="capacity_split=0 is no number of chunks"):
        OverlapComm(capacity_split=0)
    with pytest.raises(PlanError, match="give one of the three"):
        OverlapComm(capacity_split=2, split=2)
