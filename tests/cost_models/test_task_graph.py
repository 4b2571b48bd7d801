"""Task graphs refuse what cannot be run, and say what is wrong."""

import pytest

from graphopt.cost_models.task_graph import Task, TaskGraph
from graphopt.errors import PlanError

WORK, SEND = Task("work", "compute", 1.0, (), (), (0,)), Task("send", "link", 2.0, (0,), (0,), (1,))
GRAPH = TaskGraph((WORK, SEND), (8, 8))


@pytest.mark.parametrize(
    ("tasks", "contention", "said"),
    [
        ((Task("work", "compute", -1.0),), {}, "task work takes -1.0 seconds"),
        ((Task("work", "compute", float("nan")),), {}, "task work takes nan seconds"),
        ((Task("work", "compute", 1.0, (0,)),), {}, "task work comes after task 0, which is not before"),
        ((Task("work", "compute", 1.0, (-1,)),), {}, "comes after task -1"),
        ((Task("work", "compute", 1.0, (), (0,)),), {}, "task work reads buffer 0 before it is written"),
        ((), {"link": -0.5}, "contention of link is -0.5"),
    ],
)
def test_what_is_no_graph(tasks: tuple[Task, ...], contention: dict[str, float], said: str) -> None:
    with pytest.raises(PlanError, match=said.replace("(", r"\(")):
        TaskGraph(tasks, (8,), contention=contention)


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ((1, 0), "task send is placed before work"),
        ((0,), "an order of 1 tasks"),
        ((0, 0), "is none of the 2 tasks"),
        ((0, 2), "is none of the 2 tasks"),
    ],
)
def test_what_is_no_order(order: tuple[int, ...], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        GRAPH.check_order(order)


def test_arrays() -> None:
    assert GRAPH.check_order((0, 1)) is None
    arrays = TaskGraph((WORK, SEND), (8, 8), kept=(0, 1)).arrays
    assert arrays.channel.tolist() == [0, 1] and arrays.users.tolist() == [1]
    assert arrays.readers.tolist() == [2, 1]  # the reader of the first buffer, and who keeps both
