"""Parameters gathered from shards: how early, kept or gathered again, within a bound of memory."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_ranks import fake_mesh
from hypothesis import given
from hypothesis import strategies as st
from texts import program_text
from torch import nn

import graphopt
from graphopt import OverlapComm, PlanError
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import GENERIC_CPU, Cluster
from graphopt.cost_models.link_costs import LinkCosts
from graphopt.cost_models.overlap_run import run_order
from graphopt.cost_models.task_graph import Task, TaskGraph
from graphopt.passes.gather_choice import fastest
from graphopt.passes.gathered_parameters import gathered_again, gathers_of
from graphopt.passes.overlap_plan import OverlapPlan
from graphopt.passes.overlap_search import schedule
from graphopt.program import Program
from graphopt.verify import verify

GOLDEN = Path(__file__).parent.parent / "golden" / "gathered_parameters.txt"
WIDTH, LAYERS = 64, 10
WEIGHT = 4 * WIDTH * WIDTH  # bytes

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


def captured(layers: int, rows: int) -> Program:
    """A training step of linear layers whose weights are in shards, one half on each rank."""
    modules = (m for _ in range(layers) for m in (nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh()))
    with fake_mesh(2) as mesh:
        model = graphopt.shard_parameters(nn.Sequential(*modules), mesh)
        optimized = graphopt.optimize(model, passes=[], device="cpu-generic")
        optimized(torch.ones(rows, WIDTH, requires_grad=True)).sum().backward()
    (record,) = optimized._graphopt.log.records
    return record.before  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def program() -> Iterator[Program]:
    found = captured(LAYERS, 32)
    with fake_mesh(2):
        yield found


def planned(program: Program, bytes_per_s: float = 4e9, **options: Any) -> OverlapPlan:
    links = LinkCosts(Cluster(GENERIC_CPU, 2, bytes_per_s, 1e-7, "example"))
    chosen = OverlapComm(links=links, split=1, **options)
    return chosen.plan(program, Costs.of(program, GENERIC_CPU))


def test_the_golden_text(request: pytest.FixtureRequest) -> None:
    small = captured(2, 4)
    with fake_mesh(2):
        free = planned(small)
        plan = planned(small, memory=free.peak_bytes - WEIGHT)
        after = OverlapComm().apply(small, plan)
    verify(after, before=small)
    data = {k: v for k, v in json.loads(plan.to_json()).items() if k in ("again", "gathers", "order")}
    text = "\n\n".join([program_text(small), json.dumps(data, indent=1), program_text(after)]) + "\n"
    if request.config.getoption("--regenerate-golden"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_two_layers_are_enough(program: Program) -> None:
    """With room for two gathered layers of ten, the step is as fast as with all of them kept."""
    free = planned(program)
    assert free.again == () and free.gathered_bytes == LAYERS * WEIGHT
    others = free.peak_bytes - free.gathered_bytes
    tight = planned(program, memory=others + 2 * WEIGHT)
    assert tight.peak_bytes - others <= 0.25 * free.gathered_bytes
    assert tight.gap <= 1.01 and tight.seconds <= 1.01 * free.seconds
    assert tight.seconds < 0.9 * tight.seconds_before
    assert len(tight.again) >= LAYERS - 2 and max(row[4] for row in tight.gathers) >= 1


def test_no_more_is_gathered_again_than_needed(program: Program) -> None:
    """On a slow link, each parameter that is kept saves time."""
    free = planned(program, 2e8)
    peaks, seconds, counts = [], [], []
    for layers in (0, 2, 4, 6):
        plan = planned(program, 2e8, memory=free.peak_bytes - layers * WEIGHT)
        counts.append(len(plan.again))
        peaks.append(plan.peak_bytes)
        seconds.append(plan.seconds)
    assert counts[0] == 0 and counts == sorted(counts) and counts[-1] >= 4
    assert peaks == sorted(peaks, reverse=True) and seconds == sorted(seconds)


def test_the_last_of_the_forward_is_kept_first(program: Program) -> None:
    free = planned(program)
    plan = planned(program, memory=free.peak_bytes - 3 * WEIGHT)
    saved = [g.start.name for g in gathers_of(program) if g.is_saved]
    assert plan.again and set(plan.again) == set(saved[: len(plan.again)])
    uses = [row[3] for row in plan.gathers]
    assert uses.count("again") == len(plan.again) and uses.count("kept") == len(saved) - len(plan.again)


def test_plans_that_cannot_be_applied(program: Program) -> None:
    with pytest.raises(PlanError, match="the plan gathers mm again, which is no gathered parameter"):
        gathered_again(program, ["mm"])
    with pytest.raises(PlanError, match="the least peak found is") as caught:
        planned(program, memory=5 * WEIGHT)
    assert (caught.value.reachable_bytes or 0) > 5 * WEIGHT


# --- task graphs by hand -----------------------------------------------------------------------


def forward(layers: int, gather_s: float, compute_s: float) -> TaskGraph:
    """Layers of one byte, each gathered and then used."""
    tasks: list[Task] = []
    for layer in range(layers):
        before = (3 * layer - 1,) if layer else ()
        tasks.append(Task(f"gather {layer}", "link", gather_s, (), (), (layer,)))
        tasks.append(Task(f"wait {layer}", "compute", 0.0, (3 * layer,), (layer,)))
        tasks.append(Task(f"use {layer}", "compute", compute_s, (*before, 3 * layer + 1), (layer,)))
    return TaskGraph(tuple(tasks), (1,) * layers)


@pytest.mark.parametrize("layers", [10, 80])
@pytest.mark.parametrize(("gather_s", "compute_s"), [(9.4, 2.4), (2.4, 2.4), (1.0, 2.4)])
def test_many_layers_by_hand(layers: int, gather_s: float, compute_s: float) -> None:
    graph = forward(layers, gather_s, compute_s)
    early = sorted(range(3 * layers), key=lambda task: (task % 3 != 0, task))
    found = schedule(graph, memory_bytes=2)
    slowest, other = max(gather_s, compute_s), min(gather_s, compute_s)
    assert found.run.seconds == pytest.approx(layers * slowest + other)
    assert found.gap <= 1.01 and found.run.peak_bytes == 2
    all_early = run_order(graph, early)
    assert all_early.peak_bytes == layers >= 5 * found.run.peak_bytes
    assert all_early.seconds == pytest.approx(found.run.seconds)


# --- the choice, against all prefixes ----------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """What a plan takes."""

    seconds: float
    peak_bytes: int


@given(st.lists(st.integers(1, 9), min_size=0, max_size=12), st.integers(0, 60), st.data())
def test_as_many_are_kept_as_fit(sizes: list[int], limit: int, data: st.DataObject) -> None:
    names = [str(i) for i in range(len(sizes))]
    base = data.draw(st.integers(0, 30))

    def plan_with(again: tuple[str, ...]) -> Made:
        kept = len(names) - len(again)
        assert list(again) == names[kept:]
        peak = base + sum(sizes[:kept])
        if peak > limit:
            raise PlanError("too much", reachable_bytes=peak)
        return Made(float(len(again)), peak)

    fitting = [k for k in range(len(names) + 1) if base + sum(sizes[:k]) <= limit]
    if fitting:
        assert fastest(names, len(names), plan_with, lambda _: True).seconds == len(names) - max(fitting)
        return
    with pytest.raises(PlanError) as caught:
        fastest(names, len(names), plan_with, lambda _: True)
    assert caught.value.reachable_bytes == base
