"""OverlapComm without other ranks: plans, orders, refusals, reasons, a golden text."""

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_ranks import fake_mesh
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import arguments, run_joint, traced
from texts import program_text
from torch import Tensor

import graphopt
from graphopt import OverlapComm, PlanError
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import GENERIC_CPU, Cluster
from graphopt.cost_models.link_costs import LinkCosts
from graphopt.cost_models.overlap_run import run_order
from graphopt.cost_models.program_tasks import NodeSeconds, task_graphs
from graphopt.cost_models.task_graph import Task, TaskGraph
from graphopt.passes.exposure import exposures
from graphopt.passes.overlap_order import reordered
from graphopt.passes.overlap_plan import OverlapPlan
from graphopt.program import Program
from graphopt.verify import verify

GOLDEN = Path(__file__).parent.parent / "golden" / "overlap_comm.txt"
LINKS = LinkCosts(Cluster(GENERIC_CPU, 2, 1e9, 5e-5, "example"), contention=0.2)
collectives: Any = torch.ops._c10d_functional

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


@pytest.fixture(scope="module")
def program() -> Iterator[Program]:
    """Two independent chains, each with a sum over the ranks, one behind the other."""

    def f(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        first = collectives.wait_tensor(collectives.all_reduce(x @ w, "sum", "0")) @ w
        second = collectives.wait_tensor(collectives.all_reduce(y @ w, "sum", "0")) @ w
        return torch.relu(first) + second

    with fake_mesh(2):
        yield graphopt.trace(f, [torch.ones(64, 64) for _ in range(3)], training=False)


def planned(program: Program, **options: Any) -> OverlapPlan:
    costs = Costs.of(program, GENERIC_CPU)
    return OverlapComm(**{"links": LINKS, "split": 1, **options}).plan(program, costs)


def test_the_golden_text(program: Program, request: pytest.FixtureRequest) -> None:
    plan = planned(program)
    after = OverlapComm().apply(program, plan)
    verify(after, before=program)
    rounded = {
        k: round(v, 9) if isinstance(v, float) else v for k, v in json.loads(plan.to_json()).items()
    }
    parts = [program_text(program), json.dumps(rounded, indent=1), program_text(after), plan.table()]
    text = "\n\n".join(parts) + "\n"
    if request.config.getoption("--regenerate-golden"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_both_transfers_start_before_anyone_waits(program: Program) -> None:
    plan = planned(program)
    names = [name for name in plan.order if "all_reduce" in name or "wait" in name]
    assert sorted(names[:2]) == ["all_reduce", "all_reduce_1"]
    assert plan.bound_seconds <= plan.seconds < plan.seconds_before
    assert plan == planned(program) and OverlapPlan.from_json(plan.to_json()) == plan


def test_the_picture(program: Program) -> None:
    plan = planned(program)
    picture = plan.svg().replace("&#160;", " ")
    assert f"as captured: {plan.seconds_before * 1e3:.3f} ms" in picture
    assert f"as planned: {plan.seconds * 1e3:.3f} ms" in picture and picture.count("group 0") == 2


def test_the_memory_holds(program: Program) -> None:
    free, tight = planned(program), planned(program, memory=1.0)
    assert free.peak_bytes > tight.peak_bytes_before >= tight.peak_bytes
    assert free.seconds < tight.seconds


@pytest.mark.parametrize("name", ["dropouts", "in place", "cross attention"])
def test_any_order_gives_the_same_bits(name: str) -> None:
    before, model, inputs = traced(name)
    given_tensors = arguments(before, model, inputs)
    expected = run_joint(before, given_tensors)

    @settings(max_examples=8)
    @given(st.integers(0, 10**6))
    def check(seed: int) -> None:
        shuffle = random.Random(seed)
        names: list[str] = []
        for graph in task_graphs(before, NodeSeconds({})):
            left = list(range(len(graph.tasks)))
            done: set[int] = set()
            while left:
                ready = [i for i in left if done.issuperset(graph.tasks[i].after)]
                done.add(chosen := shuffle.choice(ready))
                left.remove(chosen)
                names.append(graph.tasks[chosen].name)
        after = reordered(before, names)
        verify(after, before=before)
        assert [n.name for n in after.operators()] == names
        pairs = zip(run_joint(after, given_tensors), expected, strict=True)
        assert all(a is b if b is None else torch.equal(a, b) for a, b in pairs)

    check()


def test_operators_that_the_plan_does_not_name(program: Program) -> None:
    plan = planned(program)
    some = [name for name in plan.order if "all_reduce" in name or "add" in name]
    after = reordered(program, some)
    verify(after, before=program)
    order = [n.name for n in after.operators()]
    assert [name for name in order if name in some] == some and sorted(order) == sorted(plan.order)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda names: (*names, "gone"), "the plan orders gone, which is no operator of this program"),
        (lambda names: (*names, names[0]), "the plan orders .* twice"),
        (lambda names: names[::-1], "the plan runs .* before .*, which it needs"),
    ],
)
def test_plans_that_cannot_be_applied(program: Program, change: Any, said: str) -> None:
    plan = planned(program)
    with pytest.raises(PlanError, match=said):
        OverlapComm().apply(program, replace(plan, order=change(plan.order)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"memory": "min"}, 'memory="min" names no order; write memory=1.0'),
        ({"memory": "a lot"}, "memory='a lot'"),
        ({"gap": 0.9}, "gap=0.9 is not a multiple of the bound"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        OverlapComm(**options)


def test_what_cannot_be_planned(program: Program) -> None:
    costs = Costs.of(program, GENERIC_CPU)
    with pytest.raises(PlanError, match='overlap-comm needs compiler="eager"'):
        OverlapComm().plan(program, replace(costs, fused=True))
    with pytest.raises(PlanError, match=r"no order of the operators found fits 1\.00 kB") as caught:
        OverlapComm(links=LINKS, memory=1000).plan(program, costs)
    assert caught.value.reachable_bytes == planned(program, memory=1.0).peak_bytes


def test_a_group_that_is_not_there() -> None:
    def f(x: Tensor) -> Tensor:
        return collectives.wait_tensor(collectives.all_reduce(x, "sum", "nowhere")) + 1

    lost = graphopt.trace(f, [torch.ones(2)], training=False)
    with pytest.raises(PlanError, match="there is no process group nowhere"):
        planned(lost)


def test_no_transfers() -> None:
    before, _, _ = traced("perceptron")
    plan = planned(before)
    assert str(plan) == "no transfers: the order stays" and plan.table() == ""
    assert program_text(OverlapComm().apply(before, plan)).count("\n") == program_text(before).count("\n")


def test_reasons() -> None:
    send = (Task("a", "link", 2.0, (), (), (0,)), Task("b", "link", 2.0, (), (), (1,)))
    waits = Task("use a", "compute", 1.0, (0,), (0,)), Task("use b", "compute", 1.0, (1,), (1,))
    graph = TaskGraph((*send, *waits), (8, 8))
    assert [(e.seconds, e.reason) for e in exposures(run_order(graph, (0, 1, 2, 3)))] == [
        (2.0, "dependency"),
        (1.0, "channel busy"),
    ]
    late = run_order(graph, (0, 2, 1, 3))
    assert [(e.seconds, e.reason) for e in exposures(late, 8)] == [(2.0, "dependency"), (2.0, "memory")]
