"""What `OverlapComm` cuts along the batch: plans, refusals, and a program on parts as text."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_ranks import fake_mesh
from texts import program_text
from torch import Tensor

import graphopt
from graphopt import OverlapComm, PlanError
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import GENERIC_CPU, Cluster
from graphopt.cost_models.link_costs import LinkCosts
from graphopt.passes.batch_choice import CannotSplit
from graphopt.passes.overlap_plan import OverlapPlan
from graphopt.program import Program
from graphopt.verify import verify

GOLDEN = Path(__file__).parent.parent / "golden" / "batch_split.txt"
LINKS = LinkCosts(Cluster(GENERIC_CPU, 2, 1e9, 1e-6, "example"))
collectives: Any = torch.ops._c10d_functional

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


def summed(x: Tensor) -> Tensor:
    return collectives.wait_tensor(collectives.all_reduce(x, "sum", "0"))  # type: ignore[no-any-return]


def chain(x: Tensor, w: Tensor) -> Tensor:
    for _ in range(2):
        x = x + summed(x @ w)
    return x.sum(0)


def captured(f: Any, *inputs: Tensor) -> Program:
    return graphopt.trace(f, list(inputs), training=False)


@pytest.fixture(scope="module")
def program() -> Iterator[Program]:
    """A chain in which everything waits for everything."""
    with fake_mesh(2):
        yield captured(chain, torch.ones(512, 256), torch.ones(256, 256))


def planned(program: Program, **options: Any) -> OverlapPlan:
    return OverlapComm(**{"links": LINKS, **options}).plan(program, Costs.of(program, GENERIC_CPU))


def test_the_golden_text(program: Program, request: pytest.FixtureRequest) -> None:
    plan = planned(program)
    after = OverlapComm().apply(program, plan)
    verify(after, before=program)
    parts = [program_text(program), "\n".join(plan.cut), program_text(after), str(plan), plan.remark]
    text = "\n\n".join(parts) + "\n"
    if request.config.getoption("--regenerate-golden"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_parts_hide_what_an_order_cannot(program: Program) -> None:
    whole, halves, quarters = (planned(program, split=n) for n in (1, 2, 4))
    assert whole.seconds == whole.seconds_before == halves.seconds_before
    assert halves.bound_seconds <= halves.seconds < 0.8 * whole.seconds
    assert (whole.parts, halves.parts, quarters.parts) == (1, 2, 4)
    assert [len(p.transfers) for p in (whole, halves, quarters)] == [2, 4, 8]
    assert planned(program) == halves == OverlapPlan.from_json(halves.to_json())


def test_a_predicted_loss_is_refused(program: Program) -> None:
    slow_to_start = LinkCosts(Cluster(GENERIC_CPU, 2, 1e12, 1e-2, "example"))
    plan = planned(program, links=slow_to_start)
    assert plan.parts == 1 and not plan.cut and len(plan.transfers) == 2
    assert plan.remark.startswith("the batch stays whole: predicted are ")
    assert plan.table().endswith(plan.remark)
    forced = planned(program, links=slow_to_start, split=2)
    assert forced.parts == 2 and forced.seconds > plan.seconds


def test_the_memory_holds(program: Program) -> None:
    tight, costs = planned(program, memory=1.0), Costs.of(program, GENERIC_CPU)
    assert tight.parts == 2 and tight.peak_bytes <= tight.peak_bytes_before
    with pytest.raises(CannotSplit, match=r"in parts, no order of the operators found fits 1\.00 kB"):
        OverlapComm()._split(program, costs, {"0": LINKS}, replace(tight, memory_bytes=1000))


@pytest.mark.parametrize(
    ("f", "said"),
    [
        (
            lambda x, w: summed(x.flip(0) @ w),
            "flip .*aten.flip.default.* is not known to treat samples apart",
        ),
        (lambda x, w: summed(x.t() @ x), "mm .*aten.mm.default.* sums over the batch"),
        (lambda x, w: x @ w + summed(w).sum(0), "no transfer depends on the batch"),
    ],
)
def test_what_cannot_be_split(program: Program, f: Any, said: str) -> None:
    other = captured(f, torch.ones(8, 16), torch.ones(16, 16))
    plan = planned(other)
    assert plan.parts == 1 and "the batch stays whole: " in plan.remark
    with pytest.raises(PlanError, match=f"split=2: {said}"):
        planned(other, split=2)


def test_a_batch_that_is_too_small(program: Program) -> None:
    with pytest.raises(PlanError, match="split=513: its batch of 512 has less than 513 samples"):
        planned(program, split=513)


@pytest.mark.parametrize("split", [0, -1, 1.5, "2"])
def test_numbers_of_parts(split: Any) -> None:
    with pytest.raises(PlanError, match="is no number of parts of at least 1"):
        OverlapComm(split=split)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda names: (*names, "sum_1"),
            "the plan cuts sum_1 along the batch, which sums over the batch",
        ),
        (lambda names: (*names, "gone"), "the plan cuts gone along the batch, which has no batch"),
        (
            lambda names: tuple(n for n in names if n != "all_reduce"),
            "the plan cuts wait_tensor .* not all_reduce",
        ),
    ],
)
def test_plans_that_cannot_be_applied(program: Program, change: Any, said: str) -> None:
    plan = planned(program)
    with pytest.raises(PlanError, match=said):
        OverlapComm().apply(program, replace(plan, cut=change(plan.cut)))
