"""Task graphs of captured programs: what is a transfer, what waits for what, which buffers are alive."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fake_ranks import fake_mesh
from torch import Tensor, nn

import graphopt
from graphopt.cost_models.program_tasks import NodeSeconds, channel_of, task_graphs
from graphopt.cost_models.task_graph import COMPUTE, Task, TaskGraph
from graphopt.program import Program

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
collectives: Any = torch.ops._c10d_functional
X = torch.ones(4, 4)


@pytest.fixture(scope="module")
def hidden() -> Iterator[Callable[[Tensor], Tensor]]:
    """A custom operator that may well communicate."""
    with torch.library._scoped_library("graphopt_tests", "FRAGMENT") as library:
        library.define("hidden(Tensor x) -> Tensor")
        library.impl("hidden", torch.clone, "CompositeExplicitAutograd")
        torch.library.register_fake("graphopt_tests::hidden", torch.empty_like, lib=library)
        yield torch.ops.graphopt_tests.hidden


def forward_tasks(function: Callable[..., Any], *inputs: Tensor) -> tuple[Program, TaskGraph]:
    program = graphopt.trace(function, list(inputs), training=False)
    (graph,) = task_graphs(program, NodeSeconds({}))
    return program, graph


def by_name(graph: TaskGraph) -> dict[str, Task]:
    return {task.name: task for task in graph.tasks}


def names_after(graph: TaskGraph, name: str) -> set[str]:
    return {graph.tasks[i].name for i in by_name(graph)[name].after}


def test_a_collective_and_its_wait() -> None:
    def f(x: Tensor) -> Tensor:
        begun = collectives.all_reduce(x * 2, "sum", "7")
        other = torch.relu(x)
        return collectives.wait_tensor(begun) + other

    _, graph = forward_tasks(f, X)
    tasks = by_name(graph)
    assert graph.channels == (COMPUTE, "group 7")
    assert [t.name for t in graph.tasks if t.channel != COMPUTE] == ["all_reduce"]
    assert names_after(graph, "all_reduce") == {"mul"} and names_after(graph, "relu") == set()
    assert names_after(graph, "wait_tensor") == {"all_reduce"}
    assert names_after(graph, "add") == {"wait_tensor", "relu"}
    sent, received = tasks["mul"].writes, tasks["all_reduce"].writes
    assert tasks["all_reduce"].reads == sent and tasks["wait_tensor"].writes == ()
    assert set(tasks["wait_tensor"].reads) == {*sent, *received}  # both are in use until then
    assert [graph.nbytes[b] for b in (*sent, *received)] == [64, 64] and graph.base_bytes == 64
    assert graph.kept == tasks["add"].writes


@pytest.mark.parametrize(
    ("start", "channel"),
    [
        (lambda x: collectives.all_gather_into_tensor(x, 2, "0"), "group 0"),
        (lambda x: collectives.reduce_scatter_tensor(x, "sum", 2, "tp"), "group tp"),
        (lambda x: collectives.all_to_all_single(x, [2, 2], [2, 2], "ep"), "group ep"),
        (lambda x: collectives.broadcast(x, 0, "0"), "group 0"),
    ],
)
def test_every_kind(start: Callable[[Tensor], Tensor], channel: str) -> None:
    _, graph = forward_tasks(lambda x: collectives.wait_tensor(start(x)) + 1, X)
    assert graph.channels == (COMPUTE, channel) and len(graph.transfers) == 1


def test_several_tensors_in_one_transfer() -> None:
    def f(x: Tensor) -> Tensor:
        a, b = collectives.all_reduce_coalesced([x + 1, x + 2], "sum", "0")
        return collectives.wait_tensor(a) * collectives.wait_tensor(b)

    program, graph = forward_tasks(f, X)
    (transfer,) = (graph.tasks[i] for i in graph.transfers)
    assert len(transfer.writes) == 2 and sum(graph.nbytes[b] for b in transfer.writes) == 128
    assert not any("getitem" in t.name for t in graph.tasks)
    assert any("getitem" in n.name for n in program.operators())
    assert [t.after for t in graph.tasks if "wait" in t.name] == [graph.transfers] * 2


def test_what_nobody_waits_for_is_a_barrier() -> None:
    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        begun = collectives.all_reduce(x * 2, "sum", "0")
        return begun, x + 1

    program, graph = forward_tasks(f, X)
    assert graph.transfers == ()
    assert names_after(graph, "all_reduce") == {"mul"} and names_after(graph, "add") == {"all_reduce"}
    assert all(channel_of(n) == COMPUTE for n in program.operators())


def test_an_unknown_operator_is_a_barrier(hidden: Callable[[Tensor], Tensor]) -> None:
    def f(x: Tensor) -> Tensor:
        begun = collectives.all_reduce(x * 2, "sum", "0")
        other = torch.relu(x)
        return hidden(x) + other + collectives.wait_tensor(begun)

    _, graph = forward_tasks(f, X)
    assert names_after(graph, "hidden") == {"mul", "all_reduce", "relu"}
    assert "hidden" in names_after(graph, "wait_tensor") and "hidden" in names_after(graph, "add")


def test_random_operators_keep_their_order() -> None:
    def f(x: Tensor) -> Tensor:
        return torch.rand_like(x) + torch.relu(x) + torch.rand_like(x)

    _, graph = forward_tasks(f, X)
    first, second = (t.name for t in graph.tasks if "rand" in t.name)
    assert names_after(graph, second) == {first} and names_after(graph, "relu") == set()


def test_forward_and_backward() -> None:
    program = graphopt.trace(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)), [X])
    costs = NodeSeconds({n.name: 1.0 for n in program.operators()}, {"addmm": 7}, {"group 0": 0.5})
    forward, backward = task_graphs(program, costs)
    names = [t.name for g in (forward, backward) for t in g.tasks]
    assert sorted(names) == sorted(n.name for n in program.operators())
    assert all(t.seconds == 1.0 for t in (*forward.tasks, *backward.tasks))
    assert by_name(forward)["addmm"].scratch_bytes == 7 and forward.contention == {"group 0": 0.5}
    assert {forward.nbytes[b] for b in by_name(forward)["tanh"].writes} == {64}
    assert [backward.nbytes[b] for b in backward.alive] == [64]  # what tanh made is saved
    assert set(by_name(forward)["tanh"].writes) <= set(forward.kept) and len(forward.kept) == 2
    assert sorted(backward.nbytes[b] for b in backward.kept) == [4, 16, 16, 64]
    assert forward.base_bytes == backward.base_bytes == 64 + 4 * (16 + 4 + 4 + 1)


def test_tensor_parallel_modules() -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    with fake_mesh(2) as mesh:
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), nn.Linear(4, 1))
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        program = graphopt.trace(lambda x: model(x).sum(), [X.clone().requires_grad_()])
        labels = {i.label: i.role.value for i in program.inputs if i.role.value == "parameter"}
        forward, backward = task_graphs(program, NodeSeconds({}))
    assert [len(g.transfers) for g in (forward, backward)] == [1, 1]
    assert len(forward.channels) == 2 and forward.channels == backward.channels
    assert sorted(labels) == [f"model.{i}.{kind}" for i in (0, 2, 3) for kind in ("bias", "weight")]
