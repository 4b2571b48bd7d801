"""The operators of a program in another order: what a plan of overlap changes."""

import heapq
from collections.abc import Sequence

from torch import fx

from graphopt.cost_models.program_tasks import NodeSeconds, channel_of, task_graphs, unpacked
from graphopt.cost_models.task_graph import COMPUTE, TaskGraph
from graphopt.errors import PlanError
from graphopt.program import Program


def reordered(program: Program, names: Sequence[str]) -> Program:
    """A copy of `program` whose operators run in the order of `names`, the forward before the backward.

    Operators that are not named come right before the first that needs them. PlanError for a name that is
    not there or there twice, and for an order in which something is missing when it is needed.
    """
    result = program.copy()
    nodes = {node.name: node for node in result.graph.nodes}
    graphs = task_graphs(result, NodeSeconds({}))
    known = {task.name for graph in graphs for task in graph.tasks}
    if wrong := [name for name in names if name not in known]:
        raise PlanError(f"the plan orders {wrong[0]}, which is no operator of this program that can move")
    place = {name: i for i, name in enumerate(names)}
    if len(place) < len(names):
        twice = next(name for i, name in enumerate(names) if place[name] != i)
        raise PlanError(f"the plan orders {twice} twice")
    output = result.graph.output_node()
    for graph in graphs:
        for task in _sorted(graph, place):
            for node in _moving(nodes[graph.tasks[task].name]):
                output.prepend(node)
    result.module.recompile()
    return result


def _moving(node: fx.Node) -> list[fx.Node]:
    """`node` and what moves with it: what is taken out of the results of a transfer."""
    return [node] if channel_of(node) == COMPUTE else [node, *unpacked(node)]


def _sorted(graph: TaskGraph, place: dict[str, int]) -> list[int]:
    """The tasks of `graph` by their place, those without one as late as they can be."""
    tasks = graph.tasks
    for task in tasks:
        for before in task.after:
            if place.get(tasks[before].name, -1) > place.get(task.name, len(place)):
                raise PlanError(f"the plan runs {task.name} before {tasks[before].name}, which it needs")
    at = [float(place.get(task.name, len(place))) for task in tasks]
    for index in range(len(tasks) - 1, -1, -1):  # in the captured order, so that users are known
        for before in tasks[index].after:
            if tasks[before].name not in place:
                at[before] = min(at[before], at[index] - 0.5 / (len(tasks) + 1))
    waiting = [len(task.after) for task in tasks]
    users = graph.arrays.users_at, graph.arrays.users
    ready = [(at[i], i) for i, count in enumerate(waiting) if not count]
    heapq.heapify(ready)
    order = []
    while ready:
        task_index = heapq.heappop(ready)[1]
        order.append(task_index)
        for user in users[1][users[0][task_index] : users[0][task_index + 1]].tolist():
            waiting[user] -= 1
            if not waiting[user]:
                heapq.heappush(ready, (at[user], user))
    return order
