"""No order of a small graph is faster than the bound, and the bound is the machine's best."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_tasks import orders, slow_seconds, task_graphs

from graphopt.cost_models.overlap_bound import bound, heads, tails
from graphopt.cost_models.task_graph import Task, TaskGraph

JOBS = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=4
)


@settings(max_examples=60)
@given(task_graphs(most=6))
def test_no_order_is_faster(graph: TaskGraph) -> None:
    best = min(slow_seconds(graph, order) for order in orders(graph))
    assert bound(graph).seconds <= float(best) + 1e-9


@pytest.mark.parametrize(("k", "seconds"), [(0.0, 6.0), (0.5, 7.0), (1.0, 8.0), (3.0, 8.0)])
def test_contention(k: float, seconds: float) -> None:
    """2 of 4 s of computing can be beside 2 of 4 s of transfers, which gains nothing where k is 1."""
    work = (Task("a", "compute", 2.0), Task("b", "compute", 2.0))
    sent = (Task("send a", "link", 2.0, (0,)), Task("send b", "link", 2.0, (1,)))
    assert bound(TaskGraph((*work, *sent), contention={"link": k})).seconds == pytest.approx(seconds)


@settings(max_examples=60)
@given(JOBS)
def test_one_machine(jobs: list[tuple[int, int, int]]) -> None:
    """Against the same machine in steps of one second, every choice of each step tried."""
    best = max(_preemptive(tuple((head, work) for head, work, _ in jobs), tuple(t for *_, t in jobs)), 0)
    chains = [
        (
            Task("head", f"before {i}", head),
            Task("work", "compute", work),
            Task("tail", f"behind {i}", tail),
        )
        for i, (head, work, tail) in enumerate(jobs)
    ]
    tasks = [
        Task(t.name, t.channel, t.seconds, (3 * i + k - 1,) if k else ())
        for i, chain in enumerate(chains)
        for k, t in enumerate(chain)
    ]
    path = max(sum(job) for job in jobs)
    assert bound(TaskGraph(tuple(tasks))).seconds == max(best, path)


def _preemptive(jobs: tuple[tuple[int, int], ...], tail: tuple[int, ...]) -> int:
    """The least end over all ways to give each second to one of the released jobs."""
    end = sum(head + work for head, work in jobs)
    states = {(tuple(work for _, work in jobs), 0)}
    for now, _ in itertools.product(range(end), (0,)):
        new = set()
        for left, worst in states:
            released = [i for i, (head, _) in enumerate(jobs) if head <= now and left[i]]
            for i in released or (None,):
                if i is None:
                    new.add((left, worst))
                    continue
                after = (*left[:i], left[i] - 1, *left[i + 1 :])
                new.add((after, worst if after[i] else max(worst, now + 1 + tail[i])))
        states = new
    idle = [max((h + t for (h, w), t in zip(jobs, tail, strict=True) if w == 0), default=0)]
    return max(min((worst for left, worst in states if not any(left)), default=0), *idle)


def test_heads_and_tails() -> None:
    graph = TaskGraph(
        (Task("a", "compute", 1.0), Task("b", "link", 2.0, (0,)), Task("c", "compute", 3.0, (0, 1)))
    )
    assert heads(graph).tolist() == [0.0, 1.0, 3.0] and tails(graph).tolist() == [5.0, 3.0, 0.0]
    assert bound(graph).by == "critical path" and bound(TaskGraph(())).seconds == pytest.approx(0.0)
