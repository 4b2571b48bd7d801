"""Verification: right steps pass, wrong ones are named with their pass and their node."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

import graphopt
from graphopt import Checkpoint, Fuse, Program
from graphopt.cost_models.costs import Costs
from graphopt.deviation import deviations, largest_difference
from graphopt.models import LoadedModel
from graphopt.passes.base import Pass
from graphopt.plan import Plan
from graphopt.program import insert_call
from graphopt.verification import Verification, verify_model

aten = torch.ops.aten


class Net(nn.Module):
    """Two layers, a norm, and a dropout whose numbers have to be the same."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)
        self.norm = nn.BatchNorm1d(16)
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = F.dropout(torch.tanh(self.norm(self.first(x))), self.dropout)
        out = self.second(hidden)
        return {"loss": out.sigmoid().mean(), "out": out}


def loaded(dropout: float = 0.0) -> LoadedModel:
    torch.manual_seed(0)
    return LoadedModel("net", Net(dropout), (torch.randn(32, 8),))


def verified(*passes: Pass, dropout: float = 0.0, training: bool = True) -> Verification:
    return verify_model(loaded(dropout), training=training, passes=passes, device="cpu-generic")


@dataclass(frozen=True)
class NoPlan(Plan):
    """Nothing to decide."""


@dataclass(frozen=True)
class Wrong(Pass):
    """Changes a program as it is told, which no structure check notices."""

    name: ClassVar[str] = "wrong"

    change: Callable[[Program], None]

    def plan(self, program: Program, costs: Costs) -> NoPlan:
        return NoPlan()

    def apply(self, program: Program, plan: NoPlan) -> Program:
        copy = program.copy()
        self.change(copy)
        return copy


def named(program: Program, name: str) -> fx.Node:
    return next(n for n in program.graph.nodes if n.name == name)


def other_operator(program: Program) -> None:
    named(program, "tanh").target = aten.sigmoid.default


def one_more(program: Program) -> None:
    """A product with 1.001 behind the hidden values, for all that reads them."""
    node = named(program, "tanh")
    with program.graph.inserting_after(node):
        new = insert_call(program.graph, node, aten.mul.Tensor, (node, 1.001), name="scaled")
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def wrong_gradient(program: Program) -> None:
    node = named(program, "tanh_backward")
    node.args = (node.args[0], node.args[0])


def nan(program: Program) -> None:
    named(program, "tanh").target = aten.log.default


def test_right_steps_are_right() -> None:
    found = verified(Checkpoint(memory="min"), Fuse())
    assert found.is_right and found.fault is None and found.message == ""
    kinds = {(d.kind, d.name) for d in found.deviations}
    assert {("loss", "loss"), ("gradient", "first.weight"), ("buffer", "norm.running_mean")} <= kinds
    assert {("output", "['out']"), ("output", "['loss']")} <= kinds
    assert [(kind, module) for kind, module, _ in found.groups()][-1] == ("buffer", "norm")
    assert all(0 < d.allowed < 1e-4 * max(d.scale, 1e-3) for d in found.deviations if d.scale)


def test_dropout_draws_the_same_numbers_in_float64() -> None:
    found = verified(Checkpoint(memory="min"), dropout=0.5)
    assert found.is_right
    assert all(d.eager_error < 1e-5 * max(d.scale, 1.0) for d in found.deviations)


class Single(Net):
    """Insists on its dtype, as kernels do that have no float64."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        if not torch.compiler.is_compiling() and x.dtype is torch.float64:
            raise RuntimeError("expected float32")
        return super().forward(x)


def test_eager_stands_for_a_float64_that_there_is_not() -> None:
    torch.manual_seed(0)
    ours = LoadedModel("net", Single(), (torch.randn(32, 8),))
    right = verify_model(ours, passes=[Checkpoint(memory="min")], device="cpu-generic")
    assert right.is_right and right.remark == "net does not run in float64: expected float32"
    assert all(d.error == d.eager_error == 0.0 for d in right.deviations)
    wrong = verify_model(ours, passes=[Wrong(other_operator)], device="cpu-generic")
    assert not wrong.is_right and wrong.fault is not None and "%tanh " in wrong.fault.node


def test_a_forward_alone_has_no_gradients() -> None:
    found = verified(training=False)
    assert found.is_right and {d.kind for d in found.deviations} == {"output", "buffer"}


@pytest.mark.parametrize(
    ("change", "node", "wrong"),
    [
        (other_operator, "tanh", "loss,"),
        (wrong_gradient, "tanh_backward", "gradient first.weight"),
        (nan, "tanh", "loss,"),
    ],
    ids=["operator", "gradient", "nan"],
)
def test_a_wrong_pass_is_named_with_its_node(
    change: Callable[[Program], None], node: str, wrong: str
) -> None:
    found = verified(Checkpoint(), Wrong(change), Checkpoint(memory="min"))
    assert not found.is_right and found.fault is not None
    assert found.fault.pass_.startswith("wrong(") and found.fault.node.startswith(f"%{node} ")
    assert wrong in found.message and "it goes wrong in wrong(" in found.message
    assert "test_verification.py:" in found.fault.origin
    data = found.as_data()
    assert data["right"] is False and data["fault"]["node"] == found.fault.node


def test_what_the_wrong_pass_made_is_named() -> None:
    found = verified(Wrong(one_more))
    assert found.fault is not None
    assert any(line.startswith("%scaled ") and "1.001" in line for line in found.fault.made_anew)
    assert "which reads what the pass made: %scaled" in found.message


def test_the_wrong_gradient_leaves_the_other_layer_alone() -> None:
    found = verified(Wrong(wrong_gradient))
    wrong = {d.name for d in found.deviations if not d.is_allowed}
    assert {"first.weight", "norm.weight"} <= wrong
    assert not {"second.weight", "second.bias", "loss"} & wrong


def test_what_no_pass_does_is_said_so() -> None:
    ours = loaded()
    rows, remark = deviations(
        ours, lambda x: {"loss": Net.forward(ours.model, x)["loss"] * 2}, training=True
    )  # type: ignore[arg-type]
    assert remark == ""
    missing = [d.name for d in rows if d.error == float("inf")]
    assert missing == ["['out']"] and not any(d.is_allowed for d in rows if d.kind == "loss")


def test_dropped_gradients_are_allowed_where_a_pass_says_so() -> None:
    scores = {"first.weight": 1.0, "first.bias": 1.0, "second.weight": 9.0, "second.bias": 9.0}
    scores |= {"norm.weight": 1.0, "norm.bias": 1.0}
    found = verified(graphopt.SparseUpdate(0.8, scores=scores))
    names = {d.name for d in found.deviations if d.kind == "gradient"}
    assert found.is_right and names < set(scores)


@given(st.lists(st.floats(allow_nan=True, width=32), min_size=1, max_size=6), st.data())
def test_the_largest_difference(values: list[float], data: st.DataObject) -> None:
    other = data.draw(
        st.lists(st.floats(allow_nan=True, width=32), min_size=len(values), max_size=len(values))
    )
    a, b = torch.tensor(values, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)
    expected = 0.0
    for x, y in zip(a.tolist(), b.tolist(), strict=True):
        if x == y or (x != x and y != y):
            continue
        gap = abs(x - y)
        expected = max(expected, gap if gap == gap else float("inf"))
    assert largest_difference(a, b) == expected or expected > 1e300
    assert largest_difference(a, a) == 0.0
