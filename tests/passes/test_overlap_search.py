"""Schedules are orders, keep the memory, come near the best of all orders, and repeat."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_tasks import orders, slow_peak, slow_seconds, task_graphs

from graphopt.cost_models.overlap_run import run_order
from graphopt.cost_models.task_graph import Task, TaskGraph
from graphopt.errors import PlanError
from graphopt.passes.overlap_search import Schedule, schedule, sunk


@settings(max_examples=80)
@given(task_graphs(most=6))
def test_against_every_order(graph: TaskGraph) -> None:
    found = schedule(graph)
    graph.check_order(found.order)
    every = {order: slow_seconds(graph, order) for order in orders(graph)}
    best = float(min(every.values()))
    assert float(every[found.order]) == pytest.approx(found.run.seconds)
    assert found.run.seconds <= float(every[tuple(range(len(graph.tasks)))]) + 1e-9
    assert best - 1e-9 <= found.run.seconds <= 1.2 * best + 1e-9
    assert found.bound.seconds <= best + 1e-9


@settings(max_examples=60)
@given(task_graphs(most=6), st.integers(0, 60))
def test_the_memory_holds(graph: TaskGraph, limit: int) -> None:
    least = min(slow_peak(graph, order) for order in orders(graph))
    try:
        found = schedule(graph, memory_bytes=limit)
    except PlanError as error:
        assert error.reachable_bytes is not None and error.reachable_bytes >= max(least, limit + 1)
        assert str(error.reachable_bytes) in str(error)
    else:
        assert least <= slow_peak(graph, found.order) == found.run.peak_bytes <= limit


def test_most_small_graphs_are_solved() -> None:
    """Of graphs in which order matters, nearly all end at the best of their orders."""
    solved = tried = 0

    @settings(max_examples=120)
    @given(task_graphs(most=7, contention=False, overwriting=False))
    def count(graph: TaskGraph) -> None:
        nonlocal solved, tried
        every = [slow_seconds(graph, order) for order in orders(graph)]
        if min(every) < max(every):
            tried += 1
            solved += schedule(graph).run.seconds <= float(min(every)) + 1e-9

    count()
    assert tried > 20 and solved >= 0.97 * tried, (solved, tried)


def two_chains(layers: int, work: float, sent: float) -> TaskGraph:
    """Two micro-batches, one after the other, through layers that each end with a transfer."""
    tasks: list[Task] = []
    for chain in "ab":
        last: tuple[int, ...] = ()
        for layer in range(layers):
            tasks.append(Task(f"{chain}{layer}", "compute", work, last))
            tasks.append(Task(f"send {chain}{layer}", "link", sent, (len(tasks) - 1,)))
            tasks.append(Task(f"wait {chain}{layer}", "compute", 0.0, (len(tasks) - 1,)))
            last = (len(tasks) - 1,)
    return TaskGraph(tuple(tasks))


@pytest.mark.parametrize(("work", "sent"), [(1.0, 0.6), (0.5, 1.0), (1.0, 1.0)])
def test_independent_chains_are_woven(work: float, sent: float) -> None:
    graph = two_chains(8, work, sent)
    found = schedule(graph)
    assert found.gap <= 1.01
    assert run_order(graph, range(len(graph.tasks))).seconds == pytest.approx(16 * (work + sent))


def gathered(layers: int) -> TaskGraph:
    """Sharded parameters: each layer computes with 10 bytes that are gathered for it."""
    tasks: list[Task] = []
    for layer in range(layers):
        before = (3 * layer - 1,) if layer else ()
        tasks.append(Task(f"gather {layer}", "link", 0.9, (), (), (layer,)))
        tasks.append(Task(f"wait {layer}", "compute", 0.0, (3 * layer,), (layer,)))
        tasks.append(Task(f"layer {layer}", "compute", 1.0, (3 * layer + 1, *before), (layer,)))
    return TaskGraph(tuple(tasks), (10,) * layers)


def test_two_gathered_layers_are_enough() -> None:
    seconds = {}
    for layers in (1, 2, 3, 10):
        found = schedule(gathered(10), memory_bytes=10 * layers)
        assert found.run.peak_bytes <= 10 * layers
        seconds[layers] = found.run.seconds
    assert seconds[1] == pytest.approx(19.0)
    assert [seconds[2], seconds[3], seconds[10]] == pytest.approx([10.9] * 3)


def test_repeats() -> None:
    def facts(found: Schedule) -> tuple[object, ...]:
        return found.order, found.run.seconds, found.found_by, found.tried

    graph = TaskGraph(two_chains(6, 1.0, 0.9).tasks, contention={"link": 0.4})
    assert facts(schedule(graph, seed=3)) == facts(schedule(graph, seed=3))


def test_nothing_to_gain_is_nothing_to_change() -> None:
    tasks = two_chains(4, 1.0, 0.9).tasks
    in_turns = TaskGraph(tasks, contention={"link": 1.0})  # overlap takes as long as taking turns
    found = schedule(in_turns)
    kept = [i for i in found.order if tasks[i].seconds]  # all but the waits
    assert kept == [i for i, t in enumerate(tasks) if t.seconds]
    assert found.found_by == "captured order, as it is"


def test_waits_are_late() -> None:
    tasks = (
        Task("send", "link", 1.0),
        Task("wait", "compute", 0.0, (0,)),
        Task("view", "compute", 0.0, (1,)),
        Task("other", "compute", 1.0),
        Task("use", "compute", 1.0, (2,)),
        Task("unread", "compute", 0.0, (3,)),
    )
    assert sunk(TaskGraph(tasks), range(6)).tolist() == [0, 3, 1, 2, 4, 5]
    assert schedule(TaskGraph(tasks)).run.seconds == 2.0
