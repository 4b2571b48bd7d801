"""Operators on parts of the batch, beside the same operators on the whole of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from programs import arguments, run_joint, traced
from tiny_models import MODELS
from torch import Tensor

import graphopt
from graphopt.errors import PlanError
from graphopt.passes.batch_rewrite import BatchParts, CannotCut
from graphopt.passes.batch_rules import Batch
from graphopt.passes.batch_split import Rows, batch_of
from graphopt.program import Program
from graphopt.verify import verify

aten = torch.ops.aten


def rows_of(f: Callable[..., Any], *inputs: Tensor, parts: int = 2) -> tuple[Program, Rows]:
    program = graphopt.trace(f, list(inputs), training=False)
    return program, Rows.of(program, batch_of(program, parts))


def parts_of(program: Program, rows: Rows) -> BatchParts:
    """All cut that can be."""
    whole: set[str] = set()
    while True:
        try:
            return BatchParts(program, rows.without(whole), rows.batch)
        except CannotCut as reason:
            whole.add(reason.name)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_models_on_parts(name: str) -> None:
    before, model, inputs = traced(name)
    try:
        rows = Rows.of(before, batch_of(before, 2))
    except PlanError as reason:
        assert "batch" in str(reason) or "not fixed" in str(reason)
        return
    made = parts_of(before, rows)
    verify(made.program, before=before)
    given_tensors = arguments(before, model, inputs)
    pairs = zip(run_joint(made.program, given_tensors), run_joint(before, given_tensors), strict=True)
    for ours, expected in pairs:
        assert (ours is None) is (expected is None)
        if expected is not None:
            torch.testing.assert_close(ours, expected)


def many(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """x, y [rows, 6, 4], w [4, 4]; most rules, with the batch in first and in other places."""
    a = torch.cat([x @ w, y], -1).softmax(-1).transpose(0, 1)
    b = (a.reshape(6, -1, 2, 4) + w[0]).sum(2).permute(1, 0, 2).expand(-1, 6, 4)
    c, d = torch.nn.functional.layer_norm(b + x.mean(1, keepdim=True), (4,)).split(2, -1)
    e = torch.bmm(c, d.transpose(1, 2)) + torch.addmm(w[0, 0], x.flatten(0, 1), w[:, :1]).view(-1, 6, 1)
    f = torch.nn.functional.pad(e.select(1, 0), (1, 1)).unsqueeze(0).squeeze(0)
    return f.t().log_softmax(0).amax(0) + torch.mm(w[:1], x[:, 0].t())[0]


@settings(max_examples=8, deadline=None)
@given(st.integers(2, 9), st.integers(2, 4))
def test_every_dimension(samples: int, parts: int) -> None:
    assume(samples >= parts and samples not in (4, 6))  # those are widths, too
    torch.manual_seed(samples)
    inputs = torch.randn(samples, 6, 4), torch.randn(samples, 6, 4), torch.randn(4, 4)
    program, rows = rows_of(many, *inputs, parts=parts)
    assert not rows.reasons
    made = parts_of(program, rows)
    verify(made.program, before=program)
    assert len(made.parts) > 25 and all(len(p) == parts for p in made.parts.values())
    values = dict(zip("xyw", inputs, strict=True))
    (ours,) = torch.fx.Interpreter(made.program.module).run(*(values[i.label] for i in program.inputs))
    torch.testing.assert_close(ours, many(*inputs))


def test_cuts() -> None:
    assert Batch(5, 3).cuts(10) == [0, 2, 6, 10]


@pytest.mark.parametrize(
    ("f", "said"),
    [
        (lambda x, y: x.t() @ y, "sums over the batch"),
        (lambda x, y: x.softmax(0), "works along the batch"),
        (lambda x, y: x.sum(0), "sums over the batch"),
        (lambda x, y: torch.cat([x, y]), "joins along the batch"),
        (lambda x, y: x + y.t(), "combines batches that lie along different dimensions"),
        (lambda x, y: x.cumsum(0), "is not known to treat samples apart"),
        (lambda x, y: torch.rand_like(x), "writes to an operand or is random"),
        (lambda x, y: x.t().reshape(-1), "merges the batch with a dimension before it"),
        (lambda x, y: x.unfold(0, 2, 1), "is not known to treat samples apart"),
        (lambda x, y: x[2:], "works along the batch"),
        (lambda x, y: torch.nn.functional.pad(x, (0, 0, 1, 0)), "works along the batch"),
        (lambda x, y: torch.nn.functional.layer_norm(x, (8, 8)), "works along the batch"),
        (lambda x, y: x @ y, "sums over the batch"),
    ],
)
def test_what_stays_whole(f: Callable[..., Any], said: str) -> None:
    _, rows = rows_of(f, torch.randn(8, 8), torch.randn(8, 8))
    assert list(rows.reasons.values())[-1] == said


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ([torch.ones(())], "it has no input with a batch of more than one sample"),
        ([torch.ones(1, 4)], "it has no input with a batch of more than one sample"),
        ([torch.ones(2, 4)], "its batch of 2 has less than 3 samples"),
    ],
)
def test_batches_that_are_too_small(inputs: list[Tensor], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        rows_of(lambda x: x + 1, *inputs, parts=3)
