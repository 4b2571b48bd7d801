"""Plans for given paths: within the memory, never below the bound, and the optimum where it is known."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.cost_models.stage_costs import StageCost
from graphopt.errors import PlanError
from graphopt.passes.stage_paths import plan_paths
from graphopt.passes.stage_schedule import plan_pipeline

ONE = StageCost(1.0, 1.0, 1.0)
MIDDLE = (
    (1, 2),
    (1,),
    (2,),
    (1,),
    (2,),
    (1, 2),
    (1,),
    (2,),
    (1,),
    (2,),
)  # of four stages, three in the mean
PATHS = [tuple((s, s) for s in (0, *middle, 3)) for middle in MIDDLE]


def test_skipping_a_quarter_gains_a_quarter_only_on_stages_of_unequal_size() -> None:
    full = plan_pipeline([ONE] * 4, len(PATHS), schedule="1f1b").makespan_s
    equal = plan_paths([ONE] * 4, PATHS, memory=6)
    unequal = plan_paths([StageCost(*(n,) * 3) for n in (0.75, 1.25, 1.25, 0.75)], PATHS, memory=6)
    assert equal.is_optimal and unequal.is_optimal
    assert (full, equal.makespan_s, unequal.makespan_s) == (39.0, 36.0, 28.5)


def test_the_head_is_on_the_first_stage_where_it_takes_time() -> None:
    plan = plan_paths([ONE] * 2, [((0, 0), (1, 1)), ((0, 0),)], head_s=0.5)
    assert sorted(text for text in plan.orders[0] if "H" in text) == ["0H0", "0H1"]
    assert plan.makespan_s >= 2 * 3.5


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(PlanError, match="there is no stage 4 of 4"):
        plan_paths([ONE] * 4, [((0, 0), (4, 1))])
    with pytest.raises(PlanError, match="device 1 has no stage 0"):
        plan_paths([ONE] * 2, [((0, 1), (1, 1))], stage_devices=[[0], [1]])
    with pytest.raises(PlanError, match=r"room for 0\.5 activations wait for each other"):
        plan_paths([ONE] * 2, [((0, 0), (1, 1))], memory=0.5)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from((1, 2, 3)), unique=True), min_size=1, max_size=6), st.integers(1, 4)
)
def test_plans_keep_the_memory_and_the_bound(middles: list[list[int]], memory: int) -> None:
    paths = [tuple((s, s) for s in (0, *middle, 4)) for middle in middles]
    costs = [StageCost(1.0 + s, 0.5, 0.25 * s) for s in range(5)]
    try:
        plan = plan_paths(costs, paths, stage_devices=[[s] for s in range(5)], memory=memory, trials=20)
    except PlanError as error:
        assert "wait for each other" in str(error)
        return
    assert plan.makespan_s >= plan.bound_s - 1e-9
    assert max(plan.peak_activations) <= memory
    assert (
        plan.makespan_s
        <= plan_paths(
            costs, paths, stage_devices=[[s] for s in range(5)], memory=memory, trials=0
        ).makespan_s
    )
