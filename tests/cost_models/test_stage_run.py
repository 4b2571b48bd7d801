"""Steps of pipelines run as naive simulators run them, and fast."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_oracle import slow_greedy, slow_orders, stage_steps

from graphopt.cost_models.stage_costs import StageCost, StageLinks
from graphopt.cost_models.stage_run import run_greedy, run_orders
from graphopt.cost_models.stage_tasks import ANYWHERE, StageStep, StageTask, StageTasks
from graphopt.errors import PlanError


@settings(max_examples=120, deadline=None)
@given(stage_steps(), st.data())
def test_orders_run_as_the_naive_simulator_runs_them(step: StageTasks, data: st.DataObject) -> None:
    orders = [
        data.draw(st.permutations([i for i, t in enumerate(step.tasks) if t.device == d]))
        for d in range(step.devices)
    ]
    slow = slow_orders(step, orders)
    if slow is None:
        with pytest.raises(PlanError, match="wait for each other"):
            run_orders(step, orders)
        return
    assert run_orders(step, orders).begin.tolist() == slow


@settings(max_examples=120, deadline=None)
@given(stage_steps(), st.sampled_from((1.0, 2.0, 99.0)), st.data())
def test_greedy_runs_as_the_naive_simulator_does(
    step: StageTasks, memory: float, data: st.DataObject
) -> None:
    shifts = st.integers(-4, 4).map(lambda n: n / 2)
    bias = data.draw(st.lists(shifts, min_size=len(step.tasks), max_size=len(step.tasks)))
    slow = slow_greedy(step, memory, bias)
    if len(slow) < len(step.tasks):
        with pytest.raises(PlanError, match="wait for each other"):
            run_greedy(step, memory, bias)
        return
    run = run_greedy(step, memory, bias)
    assert run.begin.tolist() == [slow[i] for i in range(len(step.tasks))]
    assert max(run.peaks()[0]) <= memory
    again = run_orders(step, run.orders)  # what was found, as an order that is given
    assert again.seconds <= run.seconds + 1e-9


def test_30_microbatches_on_20_nodes_take_less_than_a_millisecond() -> None:
    links = StageLinks.even(20, 0.3)
    step = StageStep([StageCost(0.44, 0.33, 0.33)] * 20, links, head_s=0.11)
    for j in range(30):
        step.add_path(j, tuple((s, (s + j) % 20) for s in range(4)))
    tasks = step.step(20, [()] * 20, 0.13)
    run_greedy(tasks, 30)
    taken = []
    for _ in range(20):
        begin = time.perf_counter()
        run_greedy(tasks, 30)
        taken.append(time.perf_counter() - begin)
    assert min(taken) < 1e-3


def test_transfers_and_bytes() -> None:
    cost = StageCost(
        1.0, 1.0, 0.5, saved_bytes=10, weight_input_bytes=4, output_bytes=6, weight_bytes=100
    )
    step = StageStep([cost] * 2, StageLinks.even(2, 1.0, 3.0), split=True)
    step.add_path(0, ((0, 0), (1, 1)))
    tasks = step.step(2, [(0,), (1,)])
    run = run_orders(tasks, tasks.indices([["0F0", "0I0", "0W0"], ["1F0", "1I0", "1W0"]]))
    # A transfer takes 1 s and 6 bytes at 3 bytes a second; the gradient of the input is as large.
    assert [run.begin[tasks.number[n]] for n in ("0F0", "1F0", "1I0", "0I0", "0W0")] == [0, 4, 5, 9, 10]
    assert run.seconds == 10.5
    assert run.peaks() == ((1.0, 1.0), (110, 110))


@pytest.mark.parametrize(
    ("make", "fact"),
    [
        (lambda: StageCost(-1.0, 1.0, 1.0), "negative time"),
        (lambda: StageCost(1.0, 1.0, 1.0, 5, 6), "6 of 5 bytes"),
        (lambda: StageLinks(((0.0,),), ((1.0, 1.0),)), "two matrices of 1 rows"),
        (lambda: StageTasks((StageTask("a", 2, 1.0),), 2), "device 2 of 2"),
        (lambda: StageTasks((StageTask("a", 0, 1.0, ((0, 0.0),)),), 1), "after task 0"),
        (lambda: StageTasks((StageTask("a", ANYWHERE, float("inf")),), 1), "inf seconds"),
        (lambda: run_orders(StageTasks((StageTask("a", 0, 1.0),), 2), [[], [0]]), "another device"),
        (lambda: run_orders(StageTasks((StageTask("a", 0, 1.0),), 1), [[]]), "each task once"),
    ],
)
def test_rejections(make, fact: str) -> None:
    with pytest.raises(PlanError, match=fact):
        make()
