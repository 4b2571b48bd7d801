"""The task graphs of a program as all ranks see them: alike, and with the costs of the slowest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from graphopt import ops
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.link_costs import HOST_LINK, LinkCosts, Timing, collective_of, put_in_bytes
from graphopt.cost_models.program_tasks import NodeSeconds, channel_of, task_graphs
from graphopt.cost_models.task_graph import COMPUTE, TaskGraph
from graphopt.passes.offload_ops import timing_of
from graphopt.program import Program
from graphopt.ranks import check_same, groups_of, largest


@dataclass(frozen=True)
class AgreedTasks:
    """The task graphs of forward and backward, the same on all ranks, and what their transfers take."""

    graphs: tuple[TaskGraph, ...]
    timings: dict[str, Timing]

    @property
    def seconds(self) -> dict[str, float]:
        """What each task takes, by name."""
        return {task.name: task.seconds for graph in self.graphs for task in graph.tasks}


def agreed_tasks(program: Program, costs: Costs, links: Mapping[str, LinkCosts]) -> AgreedTasks:
    """The tasks of `program`, with what they take on the slowest rank; errors where graphs differ."""
    groups, nodes = groups_of(program), list(program.operators())
    check_same(groups, [*map(line_of, nodes)], "the graphs")
    timings, seconds = _agreed(nodes, groups, costs, links)
    graphs = (_agreed_bytes(g, costs, groups) for g in task_graphs(program, seconds))
    return AgreedTasks(tuple(graphs), timings)


def _agreed(
    nodes: Sequence[fx.Node], groups: Sequence[str], costs: Costs, links: Mapping[str, LinkCosts]
) -> tuple[dict[str, Timing], NodeSeconds]:
    """What each transfer, and each operator, takes on the slowest rank."""
    timings = {n.name: _timing(n, links) for n in nodes if channel_of(n) != COMPUTE}
    own = [timings[n.name].seconds if n.name in timings else _seconds(n, costs) for n in nodes]
    shares = [links[group].contention for group in groups]
    numbers = largest(groups, [*own, *shares], "the costs")
    by_name = {n.name: number for n, number in zip(nodes, numbers, strict=False)}
    channels = {channel_of(n) for n in nodes if n.name in timings}
    contention = {f"group {g}": k for g, k in zip(groups, numbers[len(nodes) :], strict=True)}
    used = {channel: k for channel, k in contention.items() if channel in channels}
    agreed = {name: Timing(by_name[name], t.source) for name, t in timings.items()}
    return agreed, NodeSeconds(by_name, costs.workspace_bytes, used)


def _agreed_bytes(graph: TaskGraph, costs: Costs, groups: Sequence[str]) -> TaskGraph:
    """`graph` with the sizes of the rank where they are largest; shards may be uneven."""
    numbers = [*graph.nbytes, *(t.scratch_bytes for t in graph.tasks)]
    base = graph.base_bytes + costs.reserved_bytes
    *found, base = map(int, largest(groups, [*numbers, base], "the sizes"))
    nbytes, scratch = found[: len(graph.nbytes)], found[len(graph.nbytes) :]
    pairs = zip(graph.tasks, scratch, strict=True)
    tasks = tuple(replace(task, scratch_bytes=held) for task, held in pairs)
    return replace(graph, tasks=tasks, nbytes=tuple(nbytes), base_bytes=base)


def line_of(node: fx.Node) -> str:
    """What has to be the same of `node` on all ranks; shapes may differ."""
    return f"{node.name} = {node.target}({', '.join(n.name for n in node.all_input_nodes)})"


def _timing(start: fx.Node, links: Mapping[str, LinkCosts]) -> Timing:
    collective, transfer = collective_of(start), ops.transfer_of(start)
    if collective is None or transfer is None:
        return timing_of(start) or Timing(HOST_LINK.seconds(put_in_bytes(start)), "roofline")
    return links[transfer.group].timing(collective)


def _seconds(node: fx.Node, costs: Costs) -> float:
    known = costs.nodes.get(node.name)
    return 0.0 if known is None else known.seconds
