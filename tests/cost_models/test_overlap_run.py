"""Orders run as a naive interpreter in exact fractions runs them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_tasks import orders, slow_peak, slow_run, task_graphs

from graphopt.cost_models.overlap_run import peak_of, run_order, seconds_of
from graphopt.cost_models.task_graph import Task, TaskGraph


@settings(max_examples=150)
@given(task_graphs(), st.data())
def test_times_and_peak(graph: TaskGraph, data: st.DataObject) -> None:
    order = data.draw(st.sampled_from(list(orders(graph))))
    run, slow = run_order(graph, order), slow_run(graph, order)
    for task, (begin, end) in slow.items():
        assert run.begin[task] == pytest.approx(float(begin))
        assert run.end[task] == pytest.approx(float(end))
    computed = sum(b - a for t, (a, b) in slow.items() if graph.tasks[t].channel == "compute")
    last = max((end for t, (_, end) in slow.items() if graph.tasks[t].channel == "compute"), default=0)
    blocked = sum(run.idle[t] for t in order if graph.tasks[t].channel == "compute")
    transfers = sum(run.idle[t] for t in order if graph.tasks[t].channel != "compute")
    assert float(computed) + blocked <= float(last) + 1e-9 <= float(computed) + blocked + transfers + 2e-9
    assert run.peak_bytes == slow_peak(graph, order) == peak_of(graph, np.array(order))
    assert run.seconds == seconds_of(graph, np.array(order))


@pytest.mark.parametrize("share", [0.0, 0.37, 1.0])
@pytest.mark.parametrize(("work", "sent"), [(3.0, 2.0), (2.0, 3.0), (2.0, 2.0)])
def test_contention(share: float, work: float, sent: float) -> None:
    two = TaskGraph(
        (Task("send", "link", sent), Task("work", "compute", work)), contention={"link": share}
    )
    expected = max(work, sent) + share * min(work, sent)
    assert run_order(two, (0, 1)).seconds == pytest.approx(expected)
    assert run_order(two, (1, 0)).seconds == pytest.approx(work + sent)  # started too late


def test_a_channel_takes_one_transfer_at_a_time_and_the_host_does_not_wait() -> None:
    tasks = (
        Task("send a", "link", 2.0),
        Task("send b", "link", 2.0),
        Task("work", "compute", 1.0),
        Task("use b", "compute", 1.0, (1,)),
    )
    run = run_order(TaskGraph(tasks), (0, 1, 2, 3))
    assert run.issued.tolist() == [0, 0, 0, 4] and run.begin.tolist() == [0, 2, 0, 4]
    assert run.end.tolist() == [2, 4, 1, 5] and run.idle.tolist() == [0, 0, 0, 3]


def test_nothing() -> None:
    run = run_order(TaskGraph(()), ())
    assert run.seconds == run.peak_bytes == 0
