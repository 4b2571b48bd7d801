"""Plans of pipelines: chosen within the memory, stored, drawn, and refused where they are wrong."""

import json
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

import graphopt
from graphopt.cost_models.stage_costs import StageCost, StageLinks
from graphopt.errors import PlanError
from graphopt.passes.stage_orders import SCHEDULES
from graphopt.passes.stage_plan import Action, PipelinePlan
from graphopt.passes.stage_routes import Routing
from graphopt.passes.stage_schedule import plan_pipeline
from graphopt.passes.stage_vocab import VocabularyCost

GOLDEN = Path(__file__).parent.parent / "golden" / "stage_schedule.txt"
COST = StageCost(1.0, 1.0, 1.0, saved_bytes=10, output_bytes=3, weight_bytes=100)


def test_golden(request: pytest.FixtureRequest) -> None:
    plans = [plan_pipeline([COST] * 3, 6, schedule=name) for name in SCHEDULES]
    split = VocabularyCost(0.5, 0.5)
    plans.append(plan_pipeline([COST] * 3, 6, schedule="1f1b", vocabulary=split))
    parts = [f"{plan}\n{plan.gantt(72)}" for plan in plans]
    parts.append(plan_pipeline([COST] * 2, 2, schedule="zb-h1").to_json())
    text = "\n\n".join(parts) + "\n"
    if request.config.getoption("--regenerate-golden"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_plans_are_stored_and_above_their_bound(schedule: str) -> None:
    links = StageLinks.even(4, 0.1, 30.0)
    plan = plan_pipeline([COST] * 4, 8, schedule=schedule, links=links)
    assert PipelinePlan.from_json(plan.to_json()) == plan
    assert plan.bound_s <= plan.makespan_s + 1e-9 and plan.gap >= -1e-9
    busy = 4 * 8 * 3.0
    assert plan.bubble_share == pytest.approx(1 - busy / (4 * plan.makespan_s))
    # Weights of a device, and as many bytes as activations it holds.
    assert [n - 100 for n in plan.peak_bytes] == [round(10 * n) for n in plan.peak_activations]
    events = [e for e in json.loads(plan.chrome_trace())["traceEvents"] if e["ph"] == "X"]
    assert len(events) == sum(map(len, plan.orders))
    assert len(plan.gantt().splitlines()) == 4 + 2 and plan.table() == plan.gantt()
    drawn = ElementTree.fromstring(plan.svg(40))
    texts = "".join(drawn.itertext())
    assert all(f"device\u00a0{d}\u00a0│" in texts for d in range(plan.devices))
    colours = {
        c for text in (drawn.find("{*}style").text or "",) for c in re.findall("fill: (#[0-9a-f]+)", text)
    }
    assert len(colours) >= 4 and plan.svg(40) == plan.svg(40)


def test_best_within_the_memory() -> None:
    costs = [COST] * 8
    fastest = graphopt.plan_pipeline(costs, 32)
    small = graphopt.plan_pipeline(costs, 32, memory_bytes=160)
    assert fastest.schedule == "zbv" and max(fastest.peak_bytes) == 180
    assert small.schedule == "v-half" and max(small.peak_bytes) <= 160
    with pytest.raises(PlanError, match="least is 150 B") as error:
        graphopt.plan_pipeline(costs, 32, memory_bytes=120)
    assert error.value.reachable_bytes == 150 and error.value.budget_bytes == 120


def test_microbatches_that_skip() -> None:
    devices = ((0, 1), (2, 3), (4,))
    rows = tuple(tuple(0.2 + abs(i - j) * (1 + i + j) / 9 for j in range(5)) for i in range(5))
    problem = Routing(
        (COST,) * 3, replace(StageLinks.even(5), latency_s=rows), devices, 4, 2, 3, 0.25, 0.1
    )
    plan = plan_pipeline(problem, trials=20_000)
    best = plan_pipeline(problem, trials=20_000, exact=True)
    assert best.is_optimal and best.gap == 0
    assert plan.bound_s <= best.makespan_s + 1e-9 <= plan.makespan_s + 2e-9
    assert [len(path) for path in plan.paths] == [2] * 4
    assert sum(a.kind == "H" for d in range(5) for a in plan.actions(d)) == 4
    assert PipelinePlan.from_json(best.to_json()) == best


def test_wrong_plans_are_refused() -> None:
    plan = plan_pipeline([COST] * 2, 2, schedule="1f1b")

    def with_first(*row: str) -> PipelinePlan:
        times = (tuple(float(i) for i in range(len(row))), plan.begin_s[1])
        return replace(plan, orders=(row, plan.orders[1]), begin_s=times, end_s=times)

    for wrong, fact in (
        (with_first("0F0", "0F1", "0B0"), "takes F and B"),
        (with_first("0F0", "0F0", "0B0", "0F1", "0B1"), "twice"),
        (with_first("0B0", "0F0", "0F1", "0B1"), "after its backward"),
        (with_first("1F0", "0F0", "0B0", "0F1", "0B1"), "on no path"),
        (replace(plan, begin_s=()), "index"),
    ):
        with pytest.raises((PlanError, IndexError), match=fact):
            wrong.check()
    with pytest.raises(PlanError, match="visits a stage twice"):
        replace(plan, paths=(((0, 0), (0, 0)), plan.paths[1])).check()
    with pytest.raises(PlanError, match="is no action"):
        Action.read("0Q1")


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        ({"schedule": "best"}, "how many microbatches"),
        ({"microbatches": 8, "schedule": "dual"}, "none of gpipe"),
        ({"microbatches": 8, "links": StageLinks.even(3)}, "4 stages on 3 devices"),
        ({"microbatches": 8, "schedule": "gpipe", "links": StageLinks.even(2)}, "gpipe has no 4 stages"),
    ],
)
def test_rejections(arguments: dict[str, object], fact: str) -> None:
    with pytest.raises(PlanError, match=fact):
        plan_pipeline([COST] * 4, **arguments)  # type: ignore[arg-type]
