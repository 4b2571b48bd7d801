"""Plans run as pipelines of real processes: losses, outputs and gradients are those of one process."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import ROOT, found_by, run_python
from torch.distributed.pipelining import schedules, stage

from graphopt.cost_models.stage_costs import StageCost
from graphopt.distributed import visits_of
from graphopt.errors import GraphoptError, PlanError
from graphopt.passes.stage_orders import SCHEDULES
from graphopt.passes.stage_paths import plan_paths
from graphopt.passes.stage_plan import PipelinePlan
from graphopt.passes.stage_schedule import plan_pipeline
from graphopt.pipeline_transfers import Rows, check_messages, check_runs, with_head, with_transfers
from graphopt.pipelining import missing, require

ONE = StageCost(1.0, 1.0, 1.0)
SAME = 1e-12
CASES = "ours,stock,routes,changes,head,replicas,reversed_losses,relays,evaluation,refusals"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What two ranks found, in all cases."""
    return found_by("pipeline_worker", tmp_path_factory.mktemp("two"), "2", CASES)


def check_equal(found: Any) -> None:
    """Everything but refusals equals one process."""
    assert set(found["ours"]) == set(SCHEDULES)
    assert len(found["stock"]) == 7 and len(found["routes"]) == 10 and len(found["changes"]) == 5
    ours = found["reversed_losses"]["ours"]
    single = (found["head"], found["replicas"], ours)
    several = (found["ours"], found["stock"], found["relays"])
    lists = (found["routes"], found["changes"], found["evaluation"])
    worst = [*single, *(e for d in several for e in d.values()), *(e for row in lists for e in row)]
    assert max(worst) < SAME


def test_a_pipeline_is_one_process(two: Any) -> None:
    check_equal(two)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [3, 4])
def test_a_longer_pipeline_is_one_process(ranks: int, tmp_path: Path) -> None:
    check_equal(found_by("pipeline_worker", tmp_path, str(ranks), CASES))


def test_losses_are_those_of_their_microbatch(two: Any) -> None:
    # torch 2.13 trains on wrong gradients here, without an error; should it no longer, ours can go.
    assert two["reversed_losses"]["torch"] > 1e-3


def test_what_does_not_fit_is_refused_by_name_on_every_rank(two: Any) -> None:
    texts = two["refusals"]["texts"]
    assert two["refusals"]["same"]
    assert texts["ranks"] == "the plan is for 3 devices, and the group has 2 ranks"
    assert texts["stage"].startswith("rank 1: the plan has stages [1] on this rank, which was not given")
    assert texts["differ"].startswith("pipeline plans differ between ranks")
    assert "stage 1 right to stage 2, which are both on device 1" in texts["neighbours"]
    assert texts["runs"].startswith("stage 2 does not run on float64[2, 6]")
    assert texts["shape"].endswith("puts out float64[2, 5], to stage 2, which takes float64[2, 6]")
    assert texts["follow"].startswith(
        "the schedule has 4 microbatches and stages on ((0,), (1,)); the plan has 8"
    )


def test_the_example_trains_as_one_process() -> None:
    run = run_python(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(str(ROOT / "examples/train_pipeline.py"), "--steps", "2", "--width", "16", "--layers", "4"),
    )
    rows = [line.split() for line in run.stdout.splitlines() if line[:3].strip().isdigit()]
    assert len(rows) == 2
    assert all(abs(float(one) - float(pipeline)) < 1e-5 for _, one, pipeline in rows)


def without_transfers(rows: Rows) -> list[tuple[str, ...]]:
    kept = ("SEND", "RECV", "REDUCE")
    return [tuple(text for text in row if not any(k in text for k in kept)) for row in rows]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("devices", [2, 3, 5])
def test_torchs_simulator_runs_what_is_lowered(schedule: str, devices: int) -> None:
    plan = plan_pipeline([ONE] * devices, 2 * devices, schedule=schedule)
    rows = with_transfers(plan)
    check_messages(plan, rows)
    assert without_transfers(rows) == list(plan.orders)
    actions = {
        d: [schedules._Action.from_str(text) for text in row if "REDUCE" not in text]
        for d, row in enumerate(rows)
    }
    ran = schedules._simulate_comms_compute(actions, lambda s: plan.stage_devices[s][0], plan.stages)
    assert sum(a is not None for row in ran.values() for a in row) == sum(map(len, actions.values()))


@st.composite
def routed_plans(draw: st.DrawFn) -> PipelinePlan:
    """Drawn paths with skips and swaps, on stages with drawn times that may share devices."""
    stages = draw(st.integers(2, 6))
    devices = draw(st.permutations(range(stages)))
    costs = [StageCost(*(draw(st.sampled_from((0.0, 0.5, 1.0, 3.0))) for _ in range(3))) for _ in devices]
    paths = []
    for _ in range(draw(st.integers(1, 6))):
        middle = draw(st.lists(st.sampled_from(range(1, stages - 1)), unique=True)) if stages > 2 else []
        paths.append(tuple((s, devices[s]) for s in (0, *middle, stages - 1)))
    return plan_paths(costs, paths, stage_devices=[[d] for d in devices], split=draw(st.booleans()))


@settings(max_examples=60, deadline=None)
@given(routed_plans())
def test_any_paths_are_received_in_the_order_in_which_they_are_sent(plan: PipelinePlan) -> None:
    rows = with_transfers(plan)
    check_messages(plan, rows)
    assert without_transfers(rows) == list(plan.orders)
    crossed = sum(len(path) - 1 for path in plan.paths) * 2
    for kind in ("SEND_", "RECV_"):
        assert sum(kind in text for row in rows for text in row) == crossed
    check_delivery(plan, rows)


def check_delivery(plan: PipelinePlan, rows: Rows) -> None:
    """Run the rows with queues that nothing tells apart: what is taken out is what was meant."""
    queues: dict[tuple[int, int], list[str]] = {}
    waiting = [list(row) for row in rows]
    taken: set[str] = set()
    moved = True
    while moved:
        moved = False
        for device, row in enumerate(waiting):
            while row:
                text = row[0]
                number, _, rest = text.partition("SEND_" if "SEND_" in text else "RECV_")
                if rest:
                    path = [s for s, _ in plan.paths[int(rest[1:])]]
                    at = path.index(int(number)) + (1 if ("SEND" in text) == (rest[0] == "F") else -1)
                    peer = plan.stage_devices[path[at]][0]
                    if "SEND" in text:
                        queues.setdefault((device, peer), []).append(f"{path[at]}{rest}")
                    elif queues.get((peer, device)):
                        taken.add(queues[peer, device].pop(0))
                        assert f"{number}{rest}" in taken
                    else:
                        break
                row.pop(0)
                moved = True
    assert not any(waiting) and not any(queues.values())


def test_messages_in_another_order_are_refused() -> None:
    plan = plan_pipeline([ONE] * 2, 2, schedule="gpipe")
    rows = with_transfers(plan)
    swap = {"1RECV_F0": "1RECV_F1", "1RECV_F1": "1RECV_F0"}
    wrong = (rows[0], tuple(swap.get(text, text) for text in rows[1]))
    with pytest.raises(PlanError, match="message 0 is 0SEND_F0 on device 0, 0SEND_F1 on device 1"):
        check_messages(plan, wrong)
    with pytest.raises(PlanError, match="message 3 is 1SEND_B1 on device 0, nothing on device 1"):
        check_messages(plan, (rows[0], tuple(text for text in rows[1] if text != "1SEND_B1")))


def test_what_torch_cannot_run_is_refused_by_name() -> None:
    plan = plan_pipeline([ONE] * 2, 2, schedule="1f1b")
    short = plan_paths([ONE] * 3, [((0, 0), (1, 1)), ((0, 0), (2, 2))])
    with pytest.raises(PlanError, match=r"from stage 0 to stage 1: .* the loss is on stage 2"):
        check_runs(short)
    with pytest.raises(PlanError, match="device 2 holds no stage"):
        check_runs(
            replace(plan, orders=(*plan.orders, ()), begin_s=(*plan.begin_s, ()), end_s=(*plan.end_s, ()))
        )
    with pytest.raises(PlanError, match="no action for U"):
        with_head(replace(plan, orders=(("0E0", *plan.orders[0]), ("1U0", *plan.orders[1]))))
    circle = replace(plan, orders=(("0F0", "0B0", "0F1", "0B1"), ("1F1", "1B1", "1F0", "1B0")))
    with pytest.raises(PlanError, match="wait for each other"):
        with_transfers(circle)


def test_relays_keep_the_order_of_stages() -> None:
    paths = [((0, 0), (2, 2), (1, 1), (3, 3)), ((0, 0), (3, 3))]
    with pytest.raises(PlanError, match=r"microbatch 0 goes through \[0, 2, 1, 3\]"):
        visits_of(plan_paths([ONE] * 4, paths))
    found = visits_of(
        plan_paths([ONE] * 4, [paths[1], ((0, 0), (1, 1), (3, 3))], stage_devices=[[0], [1], [2], [3]])
    )
    assert found.tolist() == [[True, False, False, True], [True, True, False, True]]


def test_a_torch_without_what_is_needed_is_named() -> None:
    modules = {"schedules": schedules, "stage": stage}
    assert not missing(modules)
    require(modules, torch.__version__)

    class Runtime:
        def __init__(self) -> None:
            self._internal_losses: list[Any] = []

        def step(self) -> None: ...

    other = SimpleNamespace(_PipelineScheduleRuntime=Runtime)
    found = missing({**modules, "schedules": other})
    assert "schedules._Action" in found
    assert "schedules._PipelineScheduleRuntime._maybe_get_loss" in found
    assert "schedules._PipelineScheduleRuntime.pipeline_order" in found
    assert not {
        f"schedules._PipelineScheduleRuntime.{name}" for name in ("step", "_internal_losses")
    } & set(found)
    with pytest.raises(
        GraphoptError, match=r"torch 9\.9 has no schedules\._Action, .* torch 2\.11 to 2\.13"
    ):
        require({**modules, "schedules": other}, "9.9")
