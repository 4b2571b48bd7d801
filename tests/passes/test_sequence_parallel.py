"""Norms on shares of the tokens without other ranks: where that pays, refusals, a golden text."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from fake_ranks import fake_mesh
from hypothesis import given, settings
from hypothesis import strategies as st
from lockstep import run_ranks
from texts import program_text
from torch import Tensor

import graphopt
from graphopt import OverlapComm, PlanError, ops
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import GENERIC_CPU, Cluster
from graphopt.cost_models.link_costs import LinkCosts
from graphopt.passes import sequence_parallel
from graphopt.passes.overlap_plan import OverlapPlan
from graphopt.passes.sequence_parallel import CannotShard, TokenShares, shares_of
from graphopt.program import Program
from graphopt.verify import verify

GOLDEN = Path(__file__).parent.parent / "golden" / "sequence_parallel.txt"
collectives: Any = torch.ops._c10d_functional

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


def summed(x: Tensor) -> Tensor:
    return collectives.wait_tensor(collectives.all_reduce(x, "sum", "0"))  # type: ignore[no-any-return]


def normed(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def block(x: Tensor, w: Tensor) -> Tensor:
    """x [1, tokens, width]; two projections whose products are summed, with norms behind them."""
    first = x + summed(x @ w)
    second = first + summed(torch.nn.functional.gelu(normed(first) @ w))
    return torch.nn.functional.layer_norm(second, second.shape[-1:]) @ w


def captured(f: Any, tokens: int, width: int = 16) -> Program:
    tensors = [torch.ones(1, tokens, width), torch.ones(width, width)]
    return graphopt.trace(f, tensors, training=False)


@pytest.fixture(scope="module", autouse=True)
def ranks() -> Iterator[None]:
    with fake_mesh(4):
        yield


def planned(program: Program, latency_s: float, bytes_per_s: float = 1e11, **options: Any) -> OverlapPlan:
    chosen = OverlapComm(links=LinkCosts(Cluster(GENERIC_CPU, 4, bytes_per_s, latency_s, "x")), **options)
    return chosen.plan(program, Costs.of(program, GENERIC_CPU))


def test_the_golden_text(request: pytest.FixtureRequest) -> None:
    before = captured(block, 8)
    plan = planned(before, 1e-6, sequence_parallel=True, split=1)
    after = OverlapComm().apply(before, plan)
    verify(after, before=before)
    text = "\n\n".join([program_text(before), "\n".join(plan.shared), program_text(after)]) + "\n"
    if request.config.getoption("--regenerate-golden"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_it_is_done_where_it_pays() -> None:
    """On a fast link the norms of a share cost less; a slow start of transfers costs more."""
    program = captured(block, 512)
    fast, slow = planned(program, 1e-9), planned(program, 1e-4)
    assert fast.shared == ("all_reduce", "all_reduce_1") and fast.seconds < 0.98 * fast.seconds_before
    assert [row[1] for row in fast.transfers].count("all_gather") == 2
    assert slow.shared == () and "with norms on shares of the tokens predicted are" in slow.remark
    assert planned(program, 1e-9, sequence_parallel=False).shared == ()
    assert OverlapPlan.from_json(fast.to_json()) == fast


def test_only_shares_are_computed() -> None:
    """Everything between a sum and the next product has a fourth of the tokens."""
    program = captured(block, 512)
    shares = shares_of(program)
    found = TokenShares(program, [wait.all_input_nodes[0].name for wait in shares.sums])
    names = {node.name for node in shares.rules}
    norms = [n.name for n in program.operators() if "rsqrt" in n.name or "layer_norm" in n.name]
    assert norms and names.issuperset(norms)
    for node in shares.rules:
        whole, mine = node.meta["val"], found.parts[node.name].meta["val"]
        if isinstance(whole, torch.Tensor):
            assert math.prod(mine.shape) * 4 == math.prod(whole.shape)


@settings(max_examples=6)
@given(st.integers(2, 4), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_the_results_are_those_of_sums(ranks: int, samples: int, rows: int, whole: bool) -> None:
    """On any number of ranks, for one sample of many tokens or many samples, also where sums are read."""

    def f(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        hidden = x + summed(x @ w)
        last = block(hidden, w)
        return (last, hidden) if whole else (last,)

    shape = (1, rows * ranks, 8) if samples == 1 else (samples * ranks, rows, 8)
    given_x, weights = torch.randn(shape), torch.randn(ranks, 8, 8)
    with mock.patch.object(sequence_parallel, "size_of", lambda _: ranks):
        before = graphopt.trace(f, [given_x, weights[0]], training=False)
        names = [wait.all_input_nodes[0].name for wait in shares_of(before).sums]
        after = []
        for rank in range(ranks):
            with mock.patch.object(sequence_parallel, "rank_of", lambda _, rank=rank: rank):
                after.append(TokenShares(before, names).program)
    tensors = [[given_x, weight] for weight in weights]
    expected, found = run_ranks([before] * ranks, tensors), run_ranks(after, tensors)
    assert len(names) == 3
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class Summed(torch.autograd.Function):
    """The sum over the ranks of what each has a part of; the gradient is that of each part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return summed(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class Copied(torch.autograd.Function):
    """What all ranks have; its gradient is the sum over them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return summed(gradients[0].contiguous())


class Trained(torch.nn.Module):
    """A block with norms that are one operator, or of several; weights of both are learnt."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused, self.scale = fused, torch.nn.Parameter(torch.randn(8))
        self.weight, self.norm = torch.nn.Parameter(torch.randn(8, 8)), torch.nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + Summed.apply(torch.nn.functional.gelu(self.norm_of(x) @ self.weight))
        return (self.norm_of(x) @ self.weight).sin()

    def norm_of(self, x: Tensor) -> Tensor:
        return Copied.apply(self.norm(x) if self.fused else normed(x) * self.scale)


def trained_on(
    ranks: int, model: Trained, x: Tensor, partial: bool
) -> tuple[Program, list[Program], int]:
    """The training step, that of each rank with norms on shares, and how many sums they are behind."""
    with mock.patch.object(sequence_parallel, "size_of", lambda _: ranks):
        before = graphopt.trace(model, [x])
        names = [w.all_input_nodes[0].name for w in shares_of(before, partial=partial).sums]
        after = []
        for rank in range(ranks):
            with mock.patch.object(sequence_parallel, "rank_of", lambda _, rank=rank: rank):
                after.append(TokenShares(before, names, partial=partial).program)
    for program in after:
        verify(program, before=before)
    return before, after, len(names)


@settings(max_examples=4, deadline=None)
@given(st.integers(2, 3), st.integers(1, 3), st.booleans(), st.booleans())
def test_training_gives_the_same_gradients(ranks: int, rows: int, fused: bool, partial: bool) -> None:
    """The same bits; with `partial` sums, gradients of norms up to rounding, all else the same bits."""
    torch.manual_seed(rows)
    model, x = Trained(fused), torch.randn(1, rows * ranks, 8)
    before, after, count = trained_on(ranks, model, x, partial)
    values = dict(model.named_parameters()) | {"x": x}
    own = [{**values, "weight": torch.randn(8, 8)} for _ in range(ranks)]
    tangent = torch.randn(1, rows * ranks, 8)
    tensors = [[given.get(i.label, tangent).detach() for i in before.inputs] for given in own]
    expected, found = run_ranks([before] * ranks, tensors), run_ranks(after, tensors)
    assert count == (2 if fused and not partial else 5)
    exact = 0
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) is (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
                exact += torch.equal(a, b)
    norms = (2 if fused else 1) * ranks if partial else 0
    assert exact >= sum(a is not None for ours in found for a in ours) - norms


@pytest.mark.parametrize("fused", [False, True])
def test_partial_sums_send_less(fused: bool) -> None:
    """Gradients of norms' weights are a row of each rank; otherwise all tokens are gathered for them."""
    sent = []
    for partial in (False, True):
        _, (after, *_), _ = trained_on(4, Trained(fused), torch.randn(1, 64, 8), partial)
        calls = [n for n in after.operators() if ops.transfer_of(n) is not None]
        rows = [n for n in calls if n.meta["val"].numel() == 8]
        assert len(rows) == (0 if not partial else 6 if fused else 3)
        sent.append(sum(n.all_input_nodes[0].meta["val"].numel() for n in calls))
    assert sent[1] < sent[0]


def differing(x: Tensor, w: Tensor) -> Tensor:
    """What each rank has a part of, beside the sum of it."""
    own = x @ w
    return (own.tanh() * summed(own.tanh())) @ w


@pytest.mark.parametrize(
    ("f", "tokens", "said"),
    [
        (lambda x, w: summed(x @ w) @ w, 8, "nothing behind its sums treats tokens apart"),
        (differing, 8, "nothing behind its sums treats tokens apart"),
        (block, 6, "it has no sums over one group of ranks that divide by their number"),
        (lambda x, w: torch.relu(x @ w), 8, None),
    ],
)
def test_what_stays_whole(f: Any, tokens: int, said: str | None) -> None:
    program = captured(f, tokens)
    assert planned(program, 1e-9).shared == ()
    if said is None:
        assert planned(program, 1e-9, sequence_parallel=True).shared == ()
        return
    with pytest.raises(PlanError, match=f"sequence_parallel=True: {said}"):
        planned(program, 1e-9, sequence_parallel=True)


def test_what_cannot_be_planned() -> None:
    program = captured(block, 8)
    with pytest.raises(PlanError, match="it takes no split"):
        OverlapComm(sequence_parallel=True, split=2)
    plan = replace(planned(program, 1e-6, sequence_parallel=True), shared=("mm",))
    with pytest.raises(CannotShard, match="it has no sums over one group"):
        OverlapComm().apply(program, plan)
    with pytest.raises(CannotShard, match="gone is no sum that tokens can be left in parts of"):
        OverlapComm().apply(program, replace(plan, shared=("all_reduce", "gone")))
