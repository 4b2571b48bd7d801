"""Choices of places and orders, against all that there are."""

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt import PlanError
from graphopt.cost_models.link_costs import Line
from graphopt.cost_models.optimizer_tasks import HOST, PLACES, Subgroup, UpdateCosts, update_tasks
from graphopt.cost_models.overlap_bound import bound
from graphopt.cost_models.overlap_run import run_order
from graphopt.cost_models.task_graph import TaskGraph
from graphopt.passes.optimizer_choice import Cutting, choose_updates, least_bytes

LINES = st.builds(Line, st.just(0.0), st.integers(1, 8).map(lambda n: n / 4))
COSTS = st.builds(UpdateCosts, LINES, LINES, LINES, LINES, LINES)
ONE = Subgroup(4, 16, 32, 16)


def orders(graph: TaskGraph, done: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """All orders in which no task is before one that it waits for."""
    rest = [i for i in range(len(graph.tasks)) if i not in done]
    if not rest:
        yield done
    for task in rest:
        if all(before in done for before in graph.tasks[task].after):
            yield from orders(graph, (*done, task))


def fastest(cutting: Cutting, costs: UpdateCosts, memory_bytes: int, hosted: bool) -> float:
    """Of all orders within the memory, of all places with something on the host, or without."""
    best = float("inf")
    for places in itertools.product(PLACES, repeat=len(cutting.subgroups)):
        if (HOST in places) is not hosted:
            continue
        graph, _ = update_tasks(cutting.subgroups, places, costs, cutting.base_bytes(places))
        for order in orders(graph):
            run = run_order(graph, order)
            if run.peak_bytes <= memory_bytes:
                best = min(best, run.seconds)
    return best


@settings(max_examples=15)
@given(COSTS, st.integers(0, 200))
def test_two_subgroups_against_all_choices(costs: UpdateCosts, memory_bytes: int) -> None:
    cutting = Cutting((ONE, ONE), 10, 10)
    device, host = (fastest(cutting, costs, memory_bytes, hosted) for hosted in (False, True))
    try:
        found = choose_updates([cutting], costs, memory_bytes)
    except PlanError as error:
        assert min(device, host) == float("inf") and memory_bytes < (error.reachable_bytes or 0)
        return
    assert found.schedule.run.peak_bytes <= memory_bytes
    if HOST in found.places:  # only where that is a tenth quicker
        assert found.schedule.run.seconds <= min(1.001 * host, 0.9 * 1.001 * device)
    else:
        assert found.schedule.run.seconds <= 1.001 * device and device <= 1.001 * host / 0.9


@settings(max_examples=25)
@given(
    COSTS,
    st.lists(st.integers(1, 9).map(lambda n: Subgroup(n, 4 * n, 8 * n, 4 * n)), min_size=1, max_size=9),
    st.integers(70, 400),
    st.sampled_from([None, 0.0, 0.5, 1.0]),
)
def test_choices_keep_to_the_memory(
    costs: UpdateCosts, subgroups: list[Subgroup], memory_bytes: int, share: float | None
) -> None:
    cutting = Cutting(tuple(subgroups), 8, 8)
    try:
        found = choose_updates([cutting], costs, memory_bytes, share)
    except PlanError as error:
        assert error.reachable_bytes == least_bytes([cutting], share)
        return
    graph, steps = update_tasks(subgroups, found.places, costs, cutting.base_bytes(found.places))
    assert sorted(found.order) == sorted(steps)
    run = run_order(graph, [steps.index(step) for step in found.order])
    assert run.peak_bytes <= memory_bytes
    assert run.seconds == pytest.approx(found.schedule.run.seconds)
    assert run.seconds >= bound(graph).seconds - 1e-9
    if share == 1.0:
        assert "device" not in found.places
    if share == 0.0:
        assert "host" not in found.places


def test_a_slow_host_is_not_asked_and_a_slow_channel_is_spared() -> None:
    cutting = Cutting((ONE,) * 12, 0, 0)
    quick, slow = Line(0.0, 0.1), Line(0.0, 50.0)
    memory = 64 + 3 * ONE.state_bytes
    asked = choose_updates([cutting], UpdateCosts(quick, slow, quick, quick, quick), memory)
    assert "host" not in asked.places
    spared = choose_updates([cutting], UpdateCosts(quick, quick, quick, slow, slow), memory)
    assert "device" not in spared.places
    both = choose_updates([cutting], UpdateCosts(slow, slow, quick, quick, quick), memory)
    assert {"host", "device"} <= {*both.places, "device"} and both.schedule.gap < 1.2
