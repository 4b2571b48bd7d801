"""Communication overlap: an order of the operators in which transfers run beside what computes.

The program becomes a task graph of channels (`graphopt.cost_models.program_tasks`); a portfolio of list
schedules and a search look for the fastest order within the memory (`graphopt.passes.overlap_search`).
Only the order changes, and all ranks plan with the same costs: those of the slowest.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from graphopt import ops
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import Cluster, Device, format_bytes
from graphopt.cost_models.link_costs import HOST_LINK, LinkCosts, Timing, collective_of, put_in_bytes
from graphopt.cost_models.link_probe import measured_links
from graphopt.cost_models.overlap_run import Run, run_order
from graphopt.cost_models.program_tasks import NodeSeconds, channel_of, task_graphs
from graphopt.cost_models.task_graph import COMPUTE, TaskGraph
from graphopt.cost_models.values import output_tensors
from graphopt.errors import PlanError
from graphopt.passes.base import Pass
from graphopt.passes.budget import Budget, check_budget, resolve_budget
from graphopt.passes.exposure import exposures
from graphopt.passes.overlap_order import reordered
from graphopt.passes.overlap_search import GAP, Schedule, schedule
from graphopt.plan import Plan
from graphopt.program import Program
from graphopt.ranks import check_same, groups_of, is_real, largest, size_of

# Of a link that nobody measured: 100 Gbit/s of InfiniBand, 4 us a hop (torch/_inductor/comm_analysis.py).
_UNKNOWN_LINK = (12.5e9, 4e-6, "torch/_inductor/comm_analysis.py")
_TOP = 12  # transfers that the table shows
Row = tuple[str, str, int, float, str, float, float, str]


@dataclass(frozen=True)
class OverlapPlan(Plan):
    """The operators in order, the forward before the backward, and what the cost model says of it.

    A row of `transfers` has: name of the operator that starts it; what it does; bytes that a rank puts
    in; seconds; their source ("measured", "fitted", "roofline"); seconds that computing waits for it in
    the captured order, and in this one; the reason for the latter. No order takes less than
    `bound_seconds` (without contention). Peaks are of the step, operators that overwrite their operands
    not considered; `memory_bytes` bounds that of this order.
    """

    order: tuple[str, ...]
    transfers: tuple[Row, ...]
    seconds_before: float
    seconds: float
    bound_seconds: float
    peak_bytes_before: int
    peak_bytes: int
    memory_bytes: int | None
    contention: float
    found_by: tuple[str, ...]

    @property
    def gap(self) -> float:
        """The predicted time as a multiple of the bound."""
        return self.seconds / self.bound_seconds if self.bound_seconds else 1.0

    def __str__(self) -> str:
        if not self.transfers:
            return "no transfers: the order stays"
        exposed = [sum(row[i] for row in self.transfers) for i in (5, 6)]  # type: ignore[misc]
        return (
            f"{len(self.transfers)} transfers, exposed {_ms(exposed[1])} instead of {_ms(exposed[0])}; "
            f"step {_ms(self.seconds)} instead of {_ms(self.seconds_before)}, "
            f"{self.gap:.2f} x the bound; peak {format_bytes(self.peak_bytes)} instead of "
            f"{format_bytes(self.peak_bytes_before)}"
        )

    def table(self) -> str:
        """The transfers that computing waits for, the longest first, as text."""
        rows = sorted(self.transfers, key=lambda row: (-row[6], -row[5]))
        lines = [("transfer", "what", "bytes", "takes", "exposed", "before", "reason")]
        for name, kind, nbytes, seconds, source, before, after, reason in rows[:_TOP]:
            takes = f"{_ms(seconds)} {source}"
            lines.append((name, kind, format_bytes(nbytes), takes, _ms(after), _ms(before), reason))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = ("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines)
        more = [f"and {len(rows) - _TOP} more"] if len(rows) > _TOP else []
        return "\n".join([*(line.rstrip() for line in padded), *more]) if rows else ""


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"


@dataclass(frozen=True)
class OverlapComm(Pass):
    """Start transfers early, wait for them late, and compute in between what does not need them.

    For models that are split over ranks, by DTensor or with functional collectives. `memory` bounds the
    peak of the step as the new order has it: bytes, "6GiB", or a share of the captured peak (1.0: no
    more than now, as one may want behind a `Checkpoint`); None: what the device has. `links` says what
    transfers take; None measures them on the process groups of the program. The search is the same for
    the same `seed`, and ends within `gap` of the lower bound. Every rank of the groups has to plan the
    same program at the same time.
    """

    name: ClassVar[str] = "overlap-comm"

    memory: Budget = None
    links: LinkCosts | None = None
    seed: int = 0
    gap: float = GAP

    def __post_init__(self) -> None:
        check_budget(self.memory)
        if self.memory == "min":
            raise PlanError('memory="min" names no order; write memory=1.0 for no more than now')
        if not 1 <= self.gap < math.inf:
            raise PlanError(f"gap={self.gap!r} is not a multiple of the bound of at least 1")

    def plan(self, program: Program, costs: Costs) -> OverlapPlan:
        """The order of the operators; PlanError on all ranks where they do not plan the same."""
        if costs.fused:
            raise PlanError('Inductor orders operators itself: overlap-comm needs compiler="eager"')
        groups, nodes = groups_of(program), list(program.operators())
        check_same(groups, [repr((self.memory, self.seed, self.gap)), *map(_line, nodes)], "the graphs")
        timings, seconds = self._agreed(nodes, groups, costs)
        graphs = [_agreed_bytes(g, costs, groups) for g in task_graphs(program, seconds)]
        before = [run_order(g, range(len(g.tasks))) for g in graphs]
        limit = self._limit(max(run.peak_bytes for run in before), costs.device, groups)
        found = [schedule(g, memory_bytes=limit, seed=self.seed, gap=self.gap) for g in graphs]
        plan = _plan(before, found, limit, timings, {n.name: n for n in nodes})
        check_same(groups, plan.order, "the planned orders")
        return plan

    def apply(self, program: Program, plan: OverlapPlan) -> Program:
        """The program with its operators in the order of `plan`."""
        return reordered(program, plan.order)

    def _limit(self, peak: int, device: Device, groups: Sequence[str]) -> int:
        """Bytes that the step may take on every rank."""
        own = resolve_budget(self.memory, peak) or max(peak, device.memory_bytes)
        return -int(largest(groups, [-own], "the memory")[0])

    def _agreed(
        self, nodes: Sequence[fx.Node], groups: Sequence[str], costs: Costs
    ) -> tuple[dict[str, Timing], NodeSeconds]:
        """What each transfer, and each operator, takes on the slowest rank."""
        links = self._links(nodes, groups, costs.device)
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

    def _links(
        self, nodes: Sequence[fx.Node], groups: Sequence[str], device: Device
    ) -> dict[str, LinkCosts]:
        """The costs of each group: given, measured, or of a link that nobody knows."""
        starts = [n for n in nodes if collective_of(n) is not None]
        sizes = largest(groups, [put_in_bytes(n) for n in starts], "the sizes of collectives")
        found = {}
        for group in groups:
            cluster = Cluster(device, size_of(group), *_UNKNOWN_LINK)
            wanted: dict[str, list[int]] = {}
            for node, nbytes in zip(starts, sizes, strict=True):
                transfer = ops.transfer_of(node)
                if transfer is not None and transfer.group == group:
                    wanted.setdefault(transfer.kind, []).append(int(nbytes))
            if self.links is not None:
                found[group] = self.links
            elif is_real(group):
                found[group] = measured_links(group, wanted, _device_of(starts), cluster)
            else:
                found[group] = LinkCosts(cluster)
        return found


def _agreed_bytes(graph: TaskGraph, costs: Costs, groups: Sequence[str]) -> TaskGraph:
    """`graph` with the sizes of the rank where they are largest; shards may be uneven."""
    numbers = [*graph.nbytes, *(t.scratch_bytes for t in graph.tasks)]
    base = graph.base_bytes + costs.reserved_bytes
    *found, base = map(int, largest(groups, [*numbers, base], "the sizes"))
    nbytes, scratch = found[: len(graph.nbytes)], found[len(graph.nbytes) :]
    pairs = zip(graph.tasks, scratch, strict=True)
    tasks = tuple(replace(task, scratch_bytes=held) for task, held in pairs)
    return replace(graph, tasks=tasks, nbytes=tuple(nbytes), base_bytes=base)


def _line(node: fx.Node) -> str:
    """What has to be the same of `node` on all ranks; shapes may differ."""
    return f"{node.name} = {node.target}({', '.join(n.name for n in node.all_input_nodes)})"


def _device_of(nodes: Sequence[fx.Node]) -> torch.device:
    return next(t.device for n in nodes for t in output_tensors(n))


def _timing(start: fx.Node, links: dict[str, LinkCosts]) -> Timing:
    collective, transfer = collective_of(start), ops.transfer_of(start)
    if collective is None or transfer is None:
        return Timing(HOST_LINK.seconds(put_in_bytes(start)), "roofline")
    return links[transfer.group].timing(collective)


def _seconds(node: fx.Node, costs: Costs) -> float:
    known = costs.nodes.get(node.name)
    return 0.0 if known is None else known.seconds


def _plan(
    before: Sequence[Run],
    found: Sequence[Schedule],
    limit: int,
    timings: dict[str, Timing],
    nodes: dict[str, fx.Node],
) -> OverlapPlan:
    rows: list[Row] = []
    for plain, planned in zip(before, found, strict=True):
        pairs = zip(exposures(plain), exposures(planned.run, limit), strict=True)
        for first, then in pairs:
            name = plain.graph.tasks[first.task].name
            transfer, timing = ops.transfer_of(nodes[name]), timings[name]
            kind = "" if transfer is None else transfer.kind
            facts = (name, kind, put_in_bytes(nodes[name]), timing.seconds, timing.source)
            rows.append((*facts, first.seconds, then.seconds, then.reason))
    return OverlapPlan(
        order=tuple(s.run.graph.tasks[i].name for s in found for i in s.order),
        transfers=tuple(rows),
        seconds_before=sum(run.seconds for run in before),
        seconds=sum(s.run.seconds for s in found),
        bound_seconds=sum(s.bound.seconds for s in found),
        peak_bytes_before=max(run.peak_bytes for run in before),
        peak_bytes=max(s.run.peak_bytes for s in found),
        memory_bytes=limit,
        contention=max((k for s in found for k in s.run.graph.contention.values()), default=0.0),
        found_by=tuple(s.found_by for s in found),
    )
