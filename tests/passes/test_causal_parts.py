"""One text with causal attention in parts: the same bits, refusals, a golden text, when it is chosen."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_blocks import MixtralBlock, Qwen2Block
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
from graphopt.passes.batch_probe import rounded_otherwise
from graphopt.passes.batch_rules import Batch
from graphopt.passes.batch_split import Rows, fitting, sequence_of
from graphopt.passes.overlap_plan import OverlapPlan
from graphopt.program import Program, Role
from graphopt.verify import verify

GOLDEN = Path(__file__).parent.parent / "golden" / "causal_parts.txt"
LINKS = LinkCosts(Cluster(GENERIC_CPU, 2, 1e9, 1e-6, "example"))
RANKS, WIDTH = 2, 32
collectives: Any = torch.ops._c10d_functional
attention = torch.nn.functional.scaled_dot_product_attention

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


@pytest.fixture(scope="module", autouse=True)
def ranks() -> Iterator[None]:
    with fake_mesh(RANKS):
        yield


def summed(x: Tensor) -> Tensor:
    return collectives.wait_tensor(collectives.all_reduce(x, "sum", "0"))  # type: ignore[no-any-return]


def heads(x: Tensor, **options: Any) -> Tensor:
    """Attention of x [1, tokens, width] to itself in heads of eight."""
    split = x.view(*x.shape[:-1], -1, 8).transpose(1, 2)
    return attention(split, split * 0.5, split.sin(), **options).transpose(1, 2).flatten(2)


def block(x: Tensor, w: Tensor) -> Tensor:
    x = x + summed(heads(x @ w, is_causal=True) @ w)
    return x + summed(torch.nn.functional.gelu(x @ w) @ w)


def two_blocks(x: Tensor, w: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(block(block(x, w), w), (w.shape[0],))


def captured(f: Any, tokens: int, *, dtype: torch.dtype = torch.float32) -> Program:
    tensors = [torch.ones(1, tokens, WIDTH, dtype=dtype), torch.ones(WIDTH, WIDTH, dtype=dtype)]
    return graphopt.trace(f, tensors, training=False)


def planned(program: Program, **options: Any) -> OverlapPlan:
    return OverlapComm(**{"links": LINKS, **options}).plan(program, Costs.of(program, GENERIC_CPU))


def results(program: Program, tokens: int, dtype: torch.dtype) -> list[Any]:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(1, tokens, WIDTH, generator=generator, dtype=dtype)
    weights = torch.randn(RANKS, WIDTH, WIDTH, generator=generator, dtype=dtype) / WIDTH**0.5
    return [out for (out,) in run_ranks([program] * RANKS, [[x, w] for w in weights])]


def test_the_golden_text(request: pytest.FixtureRequest) -> None:
    before = captured(block, 12)
    plan = planned(before, split=2)
    after = OverlapComm().apply(before, plan)
    verify(after, before=before)
    text = (
        "\n\n".join([program_text(before), "\n".join(plan.cut), program_text(after), plan.remark]) + "\n"
    )
    if request.config.getoption("--regenerate-golden"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


@settings(max_examples=4, deadline=None)
@given(st.integers(4, 90), st.integers(2, 4), st.sampled_from([torch.float32, torch.float64]))
def test_results_are_those_of_the_whole(tokens: int, parts: int, dtype: torch.dtype) -> None:
    """Up to rounding, for all lengths and numbers of parts."""
    before = captured(block, tokens, dtype=dtype)
    found, names = fitting(before, Rows.of(before, sequence_of(before, parts)), ())
    verify(found.program, before=before)
    assert sum("flash_attention" in name for name in names) == 1
    tolerance = 1e-12 if dtype is torch.float64 else 1e-5
    pairs = zip(results(found.program, tokens, dtype), results(before, tokens, dtype), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tokens", [64, 640])
def test_the_same_bits_of_the_kernel(tokens: int) -> None:
    """At these lengths every operator gives the same bits on a half, as made-up numbers say."""
    before = captured(two_blocks, tokens)
    rows = Rows.of(before, sequence_of(before, 2))
    found, names = fitting(before, rows, ())
    rules = {node: rule for node, rule in rows.rules.items() if node.name in names}
    assert rounded_otherwise(rules, found.parts, rows.batch) == []
    pairs = zip(
        results(found.program, tokens, torch.float32), results(before, tokens, torch.float32), strict=True
    )
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize("kind", [Qwen2Block, MixtralBlock])
def test_training_blocks(kind: Any) -> None:
    """Loss and gradients on halves of a text are those on the whole, bit for bit."""
    torch.manual_seed(0)
    models = [kind() for _ in range(RANKS)]
    for second, first in zip(models[1].parameters(), models[0].parameters(), strict=True):
        second.data = first.data.roll(1, 0) if second.dim() > 1 else first.data.clone()
    x = torch.randn(1, 64, WIDTH)
    before = graphopt.trace(models[0], {"x": x})
    plan = planned(before, split=2)
    assert (plan.along, plan.parts) == ("sequence", 2) and len(plan.cut) > 20
    after = OverlapComm().apply(before, plan)
    verify(after, before=before)

    tensors = []
    for model in models:
        known = {**dict(model.named_parameters()), "x": x}
        labels = [i.label for i in before.inputs if i.role is not Role.TANGENT]
        tensors.append([*(known[label].detach() for label in labels), torch.ones(())])
    with torch.no_grad():
        ours, theirs = (run_ranks([p] * RANKS, tensors) for p in (after, before))
    for mine, whole in zip(ours, theirs, strict=True):
        assert all(a is b if b is None else torch.equal(a, b) for a, b in zip(mine, whole, strict=True))
        assert sum(g is not None and bool(g.any()) for g in mine) == 1 + len(list(models[0].parameters()))


def test_the_first_part_does_not_wait_for_the_second() -> None:
    """No input of the first part's attention depends on a token of the second."""
    before = captured(two_blocks, 64)
    found, names = fitting(before, Rows.of(before, sequence_of(before, 2)), ())
    for name in names:
        stack = [found.parts[name][0]] if "flash_attention" in name else []
        while stack:
            node = stack.pop()
            assert not node.name.endswith("_part1")
            stack.extend(node.all_input_nodes)


def test_it_is_chosen_where_it_pays() -> None:
    program = captured(two_blocks, 512)
    plan = planned(program)
    assert (plan.along, plan.parts, plan.batch) == ("sequence", 2, 512)
    assert plan.seconds < 0.98 * plan.seconds_before and "of 512 tokens" in plan.remark
    assert plan.bound_seconds <= plan.seconds and "of 2 parts of the sequence" in str(plan)
    assert OverlapPlan.from_json(plan.to_json()) == plan
    slow = planned(program, links=LinkCosts(Cluster(GENERIC_CPU, 2, 1e12, 1e-2, "example")))
    assert slow.parts == 1 and slow.remark.startswith("the batch stays whole: predicted are ")


@pytest.mark.parametrize(
    ("f", "said"),
    [
        (lambda x, w: summed(heads(x @ w) @ w), "flash_attention.* is not causal"),
        (
            lambda x, w: summed(heads(x @ w, attn_mask=(x[0] @ x[0].t()) * 0) @ w),
            "flash_attention.* has a mask, which is not known to hide what comes later",
        ),
        (
            lambda x, w: summed(attention(x[None], x[None], x[None], is_causal=True)[0].transpose(1, 2)),
            None,
        ),
        (
            lambda x, w: summed(attention(*[x.transpose(1, 2).contiguous()[None]] * 3, is_causal=True)),
            "flash_attention.* has the sequence in another place than its length",
        ),
        (lambda x, w: summed(x.flip(1) @ w), "flip .* is not known to treat samples apart"),
    ],
)
def test_what_cannot_be_cut(f: Any, said: str | None) -> None:
    program = captured(f, 32 if said and "another place" in said else 48)
    if said is None:
        assert planned(program, split=2).along == "sequence"
        return
    with pytest.raises(PlanError, match=f"split=2: .*along the sequence: .*{said}"):
        planned(program, split=2)


def test_texts_that_are_too_short() -> None:
    with pytest.raises(PlanError, match="along the sequence: its text of 12 has less than 13 tokens"):
        planned(captured(block, 12), split=13)
    batch = graphopt.trace(lambda x: summed(x[0]), [torch.ones(4, 4)], training=False)
    with pytest.raises(PlanError, match="along the sequence: it has no input of one text"):
        planned(batch, split=2)


def test_a_plan_that_cannot_be_applied() -> None:
    program = captured(lambda x, w: summed(heads(x @ w) @ w), 16)
    causal = planned(captured(block, 16), split=2)
    with pytest.raises(PlanError, match="is not causal"):
        OverlapComm().apply(program, causal)
    assert Batch(causal.batch, causal.parts, causal.along) == Batch(16, 2, "sequence")
