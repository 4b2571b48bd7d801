"""Communication overlap: an order of the operators in which transfers run beside what computes.

The program becomes a task graph of channels (`graphopt.cost_models.program_tasks`); a portfolio of list
schedules and a search look for the fastest order within the memory (`graphopt.passes.overlap_search`).
Where that pays, operators run on parts of the batch (`graphopt.passes.batch_split`), so that the transfer
of one part is beside the computing of another. All ranks plan with the costs of the slowest.
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
from graphopt.cost_models.run_timeline import Span, chrome_trace, joined, spans_of
from graphopt.cost_models.task_graph import COMPUTE, TaskGraph
from graphopt.cost_models.values import output_tensors
from graphopt.errors import PlanError
from graphopt.passes.base import Pass
from graphopt.passes.batch_choice import CannotSplit, agreed_cut
from graphopt.passes.batch_rules import Batch
from graphopt.passes.batch_split import cut
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
_SPLIT_GAIN = 0.02  # of the time: for less the batch stays whole
Row = tuple[str, str, int, float, str, float, float, str]


@dataclass(frozen=True)
class OverlapPlan(Plan):
    """The operators in order, the forward before the backward, and what the cost model says of it.

    A row of `transfers` has: name of the operator that starts it; what it does; bytes that a rank puts
    in; seconds; their source ("measured", "fitted", "roofline"); seconds that computing waits for it in
    the captured order, and in this one; the reason for the latter. No order takes less than
    `bound_seconds` (without contention). Peaks are of the step, operators that overwrite their operands
    not considered; `memory_bytes` bounds that of this order.

    With `parts` > 1 the operators named by `cut` run on so many parts of the `batch` of samples, and
    `order` and `transfers` are those of the program that this makes. `remark` says why it is cut or not.
    A span of either timeline has a name, a channel, and when it begins and ends in seconds; operators
    that compute without a wait between them are one.
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
    batch: int = 1
    parts: int = 1
    cut: tuple[str, ...] = ()
    remark: str = ""
    spans_before: tuple[Span, ...] = ()
    spans: tuple[Span, ...] = ()

    @property
    def gap(self) -> float:
        """The predicted time as a multiple of the bound."""
        return self.seconds / self.bound_seconds if self.bound_seconds else 1.0

    def __str__(self) -> str:
        if not self.transfers:
            return "no transfers: the order stays"
        exposed = [sum(row[i] for row in self.transfers) for i in (5, 6)]  # type: ignore[misc]
        split = f" of {self.parts} parts of the batch" if self.parts > 1 else ""
        return (
            f"{len(self.transfers)} transfers{split}, exposed {_ms(exposed[1])} instead of "
            f"{_ms(exposed[0])}; step {_ms(self.seconds)} instead of {_ms(self.seconds_before)}, "
            f"{self.gap:.2f} x the bound; peak {format_bytes(self.peak_bytes)} instead of "
            f"{format_bytes(self.peak_bytes_before)}"
        )

    def chrome_trace(self) -> str:
        """JSON for `chrome://tracing`: the step as captured, and as planned."""
        return chrome_trace({"as captured": self.spans_before, "as planned": self.spans})

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
        more += [self.remark] if self.remark else []
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

    `split` says into how many parts the batch is cut: 1 leaves it whole, None takes 2 where the cost
    model promises a gain; the plan's remark says why. Operators that sum over the batch, such as the
    gradients of weights, run on the whole of it. With `exact` so does what this machine rounds otherwise
    on a part, so that results are the same bits where two ranks add; among more of them the order in
    which a collective adds may depend on how much it adds.
    """

    name: ClassVar[str] = "overlap-comm"

    memory: Budget = None
    links: LinkCosts | None = None
    seed: int = 0
    gap: float = GAP
    split: int | None = None
    exact: bool = True

    def __post_init__(self) -> None:
        check_budget(self.memory)
        if self.memory == "min":
            raise PlanError('memory="min" names no order; write memory=1.0 for no more than now')
        if not 1 <= self.gap < math.inf:
            raise PlanError(f"gap={self.gap!r} is not a multiple of the bound of at least 1")
        if self.split is not None and (not isinstance(self.split, int) or self.split < 1):
            raise PlanError(f"split={self.split!r} is no number of parts of at least 1")

    def plan(self, program: Program, costs: Costs) -> OverlapPlan:
        """The order of the operators; PlanError on all ranks where they do not plan the same."""
        if costs.fused:
            raise PlanError('Inductor orders operators itself: overlap-comm needs compiler="eager"')
        groups, nodes = groups_of(program), list(program.operators())
        options = repr((self.memory, self.seed, self.gap, self.split, self.exact))
        check_same(groups, [options, *map(_line, nodes)], "the graphs")
        links = self._links(nodes, groups, costs.device)
        plan = self._ordered(program, costs, links)
        if self.split == 1 or not plan.transfers:
            return plan
        try:
            split = self._split(program, costs, links, plan)
        except CannotSplit as reason:
            if self.split is not None:
                raise PlanError(f"split={self.split}: {reason}") from reason
            return replace(plan, remark=f"the batch stays whole: {reason}")
        if self.split is None and split.seconds > (1 - _SPLIT_GAIN) * plan.seconds:
            return replace(plan, remark=f"the batch stays whole: {split.remark}")
        return split

    def _split(
        self, program: Program, costs: Costs, links: dict[str, LinkCosts], plain: OverlapPlan
    ) -> OverlapPlan:
        """The plan on parts of the batch; raises CannotSplit, as all ranks do."""
        found = agreed_cut(program, self.split or 2, groups_of(program), exact=self.exact)
        new = costs.with_nodes(found.program.graph.nodes)
        try:
            plan = self._ordered(found.program, new, links, plain.memory_bytes)
        except PlanError as error:
            if error.reachable_bytes is None:
                raise
            raise CannotSplit(f"in parts, {error}") from error
        remark = f"predicted are {_ms(plan.seconds)} in {found.batch.parts} parts of {found.batch.size}"
        remark += f" samples, {_ms(plain.seconds)} otherwise"
        if found.rounding:
            remark += f"; {len(found.rounding)} operators stay whole, as they round otherwise on a part"
        return replace(
            plan,
            seconds_before=plain.seconds_before,
            peak_bytes_before=plain.peak_bytes_before,
            spans_before=plain.spans_before,
            batch=found.batch.size,
            parts=found.batch.parts,
            cut=found.names,
            remark=remark,
        )

    def _ordered(
        self,
        program: Program,
        costs: Costs,
        links: dict[str, LinkCosts],
        memory_bytes: int | None = None,
    ) -> OverlapPlan:
        """The plan for `program` as it is, within `memory_bytes` or what the pass may take."""
        groups, nodes = groups_of(program), list(program.operators())
        check_same(groups, [*map(_line, nodes)], "the graphs")
        timings, seconds = _agreed(nodes, groups, costs, links)
        graphs = [_agreed_bytes(g, costs, groups) for g in task_graphs(program, seconds)]
        before = [run_order(g, range(len(g.tasks))) for g in graphs]
        peak = max(run.peak_bytes for run in before)
        limit = memory_bytes or self._limit(peak, costs.device, groups)
        found = [schedule(g, memory_bytes=limit, seed=self.seed, gap=self.gap) for g in graphs]
        plan = _plan(before, found, limit, timings, {n.name: n for n in nodes})
        check_same(groups, plan.order, "the planned orders")
        return plan

    def apply(self, program: Program, plan: OverlapPlan) -> Program:
        """The program on the parts of the batch, with its operators in the order of `plan`."""
        if plan.parts > 1:
            program = cut(program, Batch(plan.batch, plan.parts), plan.cut).program
        return reordered(program, plan.order)

    def _limit(self, peak: int, device: Device, groups: Sequence[str]) -> int:
        """Bytes that the step may take on every rank."""
        own = resolve_budget(self.memory, peak) or max(peak, device.memory_bytes)
        return -int(largest(groups, [-own], "the memory")[0])

    def _links(
        self, nodes: Sequence[fx.Node], groups: Sequence[str], device: Device
    ) -> dict[str, LinkCosts]:
        """The costs of each group: given, measured (of parts, too), or of a link that nobody knows."""
        starts = [n for n in nodes if collective_of(n) is not None]
        sizes = largest(groups, [put_in_bytes(n) for n in starts], "the sizes of collectives")
        found = {}
        for group in groups:
            cluster = Cluster(device, size_of(group), *_UNKNOWN_LINK)
            wanted: dict[str, list[int]] = {}
            for node, nbytes in zip(starts, sizes, strict=True):
                transfer = ops.transfer_of(node)
                if transfer is not None and transfer.group == group:
                    parts = {1, self.split or 2}
                    wanted.setdefault(transfer.kind, []).extend(int(nbytes) // n for n in parts)
            if self.links is not None:
                found[group] = self.links
            elif is_real(group):
                found[group] = measured_links(group, wanted, _device_of(starts), cluster)
            else:
                found[group] = LinkCosts(cluster)
        return found


def _agreed(
    nodes: Sequence[fx.Node], groups: Sequence[str], costs: Costs, links: dict[str, LinkCosts]
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
        spans_before=_spans(before),
        spans=_spans([s.run for s in found]),
    )


def _spans(runs: Sequence[Run]) -> tuple[Span, ...]:
    """One run after the other."""
    found: list[Span] = []
    begin = 0.0
    for run in runs:
        found += joined(spans_of(run, begin))
        begin += run.seconds
    return tuple(found)
