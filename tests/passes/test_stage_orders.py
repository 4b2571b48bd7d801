"""The published schedules have the bubbles and the memory that their papers say."""

import pytest

from graphopt.cost_models.stage_costs import StageCost
from graphopt.errors import PlanError
from graphopt.passes.stage_orders import SCHEDULES, orders_of, stages_of
from graphopt.passes.stage_plan import PipelinePlan
from graphopt.passes.stage_schedule import plan_pipeline

SIZES = [(2, 4), (3, 9), (4, 8), (5, 15), (8, 32)]


def planned(
    schedule: str, devices: int, microbatches: int, f: float = 1.0, i: float = 1.0, w: float = 1.0
) -> PipelinePlan:
    return plan_pipeline([StageCost(f, i, w)] * devices, microbatches, schedule=schedule)


@pytest.mark.parametrize(("p", "m"), SIZES)
@pytest.mark.parametrize(("f", "i", "w"), [(1.0, 1.0, 1.0), (1.0, 1.5, 0.5)])
def test_gpipe_and_1f1b(p: int, m: int, f: float, i: float, w: float) -> None:
    gpipe, one = planned("gpipe", p, m, f, i, w), planned("1f1b", p, m, f, i, w)
    for plan in (gpipe, one):
        assert plan.makespan_s == pytest.approx((m + p - 1) * (f + i + w))
        assert plan.bubble_share == pytest.approx((p - 1) / (m + p - 1))
    assert gpipe.peak_activations == (m,) * p
    assert one.peak_activations == tuple(min(m, p - d) for d in range(p))


@pytest.mark.parametrize(("p", "m"), SIZES)
@pytest.mark.parametrize("v", [2, 3])
def test_interleaved(p: int, m: int, v: int) -> None:
    from graphopt.cost_models.stage_costs import StageLinks

    cost = StageCost(1.0, 1.0, 1.0).part(v)
    plan = plan_pipeline([cost] * (p * v), m, schedule="interleaved", links=StageLinks.even(p))
    assert plan.makespan_s == pytest.approx(3 * m + (p - 1) * 3 / v)
    assert plan.peak_activations[0] == pytest.approx(min(m, p * (1 + (p - 1) / (p * v))), abs=1e-5)


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_zero_bubble_h1(p: int, m: int) -> None:
    plan = planned("zb-h1", p, m)
    assert plan.makespan_s == pytest.approx(3 * m + (p - 1) * (1 + 2 - 2))  # (p - 1)(F + B - 2W), B whole
    assert set(plan.peak_activations) == {min(m, p)}


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_zbv(p: int, m: int) -> None:
    plan = planned("zbv", p, m)
    # The table of the orders of torch 2.13: 25.5 for (4, 8) and 99.5 for (8, 32): only the start is idle.
    assert plan.makespan_s == pytest.approx(3 * m + (p - 1) / 2)
    assert set(plan.peak_activations) == {p}
    assert plan.is_optimal


@pytest.mark.parametrize(("p", "m"), [(4, 16), (8, 32), (16, 64)])
def test_v_half(p: int, m: int) -> None:
    plan, whole = planned("v-half", p, m), planned("1f1b", p, m)
    # Half of 1F1B's memory, and one microbatch (I0 = 3 slots of six, and the wait for the weights).
    assert set(plan.peak_activations) == {p / 2 + 1}
    idle, most = plan.makespan_s - 3 * m, whole.makespan_s - 3 * m
    assert 0.5 <= idle / most <= 0.67


@pytest.mark.parametrize("p", [3, 5, 7])
def test_v_half_of_an_odd_number(p: int) -> None:
    assert max(planned("v-half", p, 4 * p).peak_activations) <= (p + 1) / 2 + 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_orders_are_of_torch(schedule: str) -> None:
    from torch.distributed.pipelining.schedules import _Action

    for device, row in enumerate(orders_of(schedule, 4, 8)):
        for text in row:
            action = _Action.from_str(text)
            assert str(action) == text and action.stage_index in stages_of(schedule, 4)[device]
            assert action.is_compute_op


def test_orders_that_torch_accepts() -> None:
    from torch.distributed.pipelining.schedules import _Action, _validate_schedule

    for schedule in SCHEDULES:
        rows = {d: [_Action.from_str(t) for t in row] for d, row in enumerate(orders_of(schedule, 4, 8))}
        _validate_schedule(rows, 4, sum(map(len, stages_of(schedule, 4))), 8)


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (("dual", 4, 8), "none of gpipe"),
        (("gpipe", 4, 0), "0 microbatches"),
        (("interleaved", 4, 6), "no multiple of the 4"),
        (("zbv", 4, 6), "7 microbatches or more"),
    ],
)
def test_rejections(arguments: tuple[str, int, int], fact: str) -> None:
    with pytest.raises(PlanError, match=fact):
        orders_of(*arguments)
