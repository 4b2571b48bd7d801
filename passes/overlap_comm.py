"""Communication overlap: an order of the operators in which transfers run beside what computes.

The program becomes a task graph of channels (`graphopt.cost_models.program_tasks`); a portfolio of list
schedules and a search look for the fastest order within the memory (`graphopt.passes.overlap_search`).
Where that pays, operators run on parts of the batch (`graphopt.passes.batch_split`), so that the transfer
of one part is beside the computing of another. Parameters that are gathered from shards are kept for the
backward or gathered again there (`graphopt.passes.gather_choice`). All ranks plan with the costs of the
slowest.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from graphopt import ops
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import (
    NETWORK_BYTES_PER_S,
    NETWORK_LATENCY_S,
    NETWORK_SOURCE,
    Cluster,
    Device,
)
from graphopt.cost_models.link_costs import LinkCosts, collective_of, put_in_bytes
from graphopt.cost_models.link_probe import measured_links
from graphopt.cost_models.overlap_run import run_order
from graphopt.cost_models.values import output_tensors
from graphopt.errors import PlanError
from graphopt.passes.base import Pass
from graphopt.passes.batch_choice import CannotSplit, agreed_cut
from graphopt.passes.batch_rules import Batch
from graphopt.passes.batch_split import cut
from graphopt.passes.budget import Budget, check_budget, resolve_budget
from graphopt.passes.capacity_choice import agreed_chunks, best_degree
from graphopt.passes.capacity_split import CannotChunk, CapacityChunks
from graphopt.passes.gather_choice import by_worth, fastest, most_kept
from graphopt.passes.gathered_parameters import gather_rows, gathered_again, gathers_of
from graphopt.passes.overlap_order import reordered
from graphopt.passes.overlap_plan import OverlapPlan, in_ms, plan_of, spans_of_step
from graphopt.passes.overlap_search import GAP, schedule
from graphopt.passes.overlap_tasks import AgreedTasks, agreed_tasks, line_of
from graphopt.passes.sequence_parallel import CannotShard, TokenShares
from graphopt.passes.share_choice import agreed_shares
from graphopt.program import Program
from graphopt.ranks import check_same, groups_of, is_real, largest, size_of

# Of a link that nobody measured.
_UNKNOWN_LINK = (NETWORK_BYTES_PER_S, NETWORK_LATENCY_S, NETWORK_SOURCE)
_SPLIT_GAIN = 0.02  # of the time: for less the batch stays whole


@dataclass(frozen=True)
class OverlapComm(Pass):
    """Start transfers early, wait for them late, and compute in between what does not need them.

    For models that are split over ranks, by DTensor or with functional collectives. `memory` bounds the
    peak of the step as the new order has it: bytes, "6GiB", or a share of the captured peak (1.0: no
    more than now, as one may want behind a `Checkpoint`); None: what the device has, or no more than now
    where values are offloaded. `links` says what transfers take; None measures them on the process groups
    of the program. The search is the same for the same `seed`, and ends within `gap` of the lower bound.
    Every rank of the groups has to plan the same program at the same time.

    Behind `OffloadSaved` it also orders what goes to the file and comes back, on a channel in either
    direction: a fetched value takes memory from the start of its transfer, one that is offloaded up to
    the wait for it, within the forward. No order starts a fetch before the backward begins.

    `split` says into how many parts the batch, or one text with causal attention, is cut: 1 leaves it
    whole, None takes 2 where the cost model promises a gain; the plan's remark says why. Operators that
    sum over the batch, such as the gradients of weights, and the backward of attention to one text, run
    on the whole of it. With `exact` so does what this machine rounds otherwise on a part, so that results
    are the same bits where two ranks add; among more of them the order in which a collective adds may
    depend on how much it adds.

    Parameters in shards (`graphopt.shard_parameters`, for one) are gathered as early as pays. Where
    `memory` has no room to keep all that the backward reads from the forward on, some are gathered again.

    An all-reduce may become a reduce-scatter and an all-gather, with the residual additions and norms
    between them on a rank's share of the tokens, for ranks of the same inputs: with `sequence_parallel`
    None in inference where the cost model promises a gain, with True always, with False never. In
    training, what sums over tokens (gradients of norms and biases) then reads gathered ones; without
    `exact` each rank begins with its own, which rounds otherwise.

    Experts behind an all-to-all of [experts, capacity, ...] may work on `capacity_split` chunks of their
    capacity; None takes as many as the cost model finds best, where it promises a gain. With a `split`,
    this and norms on shares are done only if they are asked for.
    """

    name: ClassVar[str] = "overlap-comm"

    memory: Budget = None
    links: LinkCosts | None = None
    seed: int = 0
    gap: float = GAP
    split: int | None = None
    exact: bool = True
    sequence_parallel: bool | None = None
    capacity_split: int | None = None

    def __post_init__(self) -> None:
        check_budget(self.memory)
        if self.memory == "min":
            raise PlanError('memory="min" names no order; write memory=1.0 for no more than now')
        if not 1 <= self.gap < math.inf:
            raise PlanError(f"gap={self.gap!r} is not a multiple of the bound of at least 1")
        if self.split is not None and (not isinstance(self.split, int) or self.split < 1):
            raise PlanError(f"split={self.split!r} is no number of parts of at least 1")
        if self.sequence_parallel and (self.split or 1) > 1:
            raise PlanError("sequence_parallel=True leaves the batch whole: it takes no split")
        if self.capacity_split is not None and self.capacity_split < 1:
            raise PlanError(
                f"capacity_split={self.capacity_split!r} is no number of chunks of at least 1"
            )
        if (self.capacity_split or 1) > 1 and (self.sequence_parallel or (self.split or 1) > 1):
            raise PlanError("capacity_split leaves the batch and the norms whole: give one of the three")

    def plan(self, program: Program, costs: Costs) -> OverlapPlan:
        """The order of the operators; PlanError on all ranks where they do not plan the same."""
        if costs.fused:
            raise PlanError('Inductor orders operators itself: overlap-comm needs compiler="eager"')
        groups, nodes = groups_of(program), list(program.operators())
        options = (self.memory, self.seed, self.gap, self.split, self.exact, self.links is None)
        more = self.sequence_parallel, self.capacity_split
        check_same(groups, [repr((*options, *more)), *map(line_of, nodes)], "the graphs")
        links = self._links(program, groups, costs.device)
        tasks = agreed_tasks(program, costs, links)
        before = [run_order(g, range(len(g.tasks))) for g in tasks.graphs]
        peak = max(run.peak_bytes for run in before)
        limit = self._limit(program, peak, costs.device, groups)
        plan = self._gathered(program, costs, links, tasks, limit)
        if plan.transfers and (self.split or 1 + bool(groups)) > 1:
            plan = self._in_parts(gathered_again(program, plan.again), costs, links, plan)
        if plan.transfers and self._may_share(program):
            plan = self._by_tokens(program, costs, links, plan, limit)
        if self._may_chunk(plan):
            plan = self._in_chunks(program, costs, links, plan, limit)
        return replace(
            plan,
            seconds_before=sum(run.seconds for run in before),
            peak_bytes_before=peak,
            spans_before=spans_of_step(before),
            gathered_bytes_before=gather_rows(program, [n.name for n in nodes])[1],
        )

    def _gathered(
        self, program: Program, costs: Costs, links: dict[str, LinkCosts], tasks: AgreedTasks, limit: int
    ) -> OverlapPlan:
        """The plan on the whole batch, with the parameters that are best gathered twice."""

        def plan_with(again: tuple[str, ...]) -> OverlapPlan:
            if not again:
                return self._ordered(program, tasks, limit)
            changed = gathered_again(program, again)
            known = agreed_tasks(changed, costs.with_nodes(changed.graph.nodes), links)
            return replace(self._ordered(changed, known, limit), again=again)

        saved = [gather for gather in gathers_of(program) if gather.is_saved]
        saved = by_worth(saved, {name: timing.seconds for name, timing in tasks.timings.items()})
        names = [gather.start.name for gather in saved]
        over = tasks.graphs[0].end_bytes - limit if saved else 0
        most = most_kept([gather.saved_bytes for gather in saved], over)
        bounded = self.memory is not None
        return fastest(names, most, plan_with, lambda plan: not bounded or plan.gap <= self.gap)

    def _in_parts(
        self, program: Program, costs: Costs, links: dict[str, LinkCosts], plan: OverlapPlan
    ) -> OverlapPlan:
        """The plan on parts of the batch where that pays or is asked for; or `plan`, with the reason."""
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
        """The faster plan on parts of the batch, or of one text; raises CannotSplit, as all ranks do."""
        plans, reasons = [], []
        for along in ("batch", "sequence"):
            try:
                plans.append(self._split_along(along, program, costs, links, plain))
            except CannotSplit as reason:
                reasons.append(str(reason))
        if not plans:
            raise CannotSplit("; along the sequence: ".join(reasons))
        return min(plans, key=lambda plan: plan.seconds)

    def _split_along(
        self, along: str, program: Program, costs: Costs, links: dict[str, LinkCosts], plain: OverlapPlan
    ) -> OverlapPlan:
        """The plan on parts of the batch or the sequence; raises CannotSplit, as all ranks do."""
        groups = groups_of(program)
        found = agreed_cut(program, self.split or 2, groups, along, exact=self.exact)
        tasks = agreed_tasks(found.program, costs.with_nodes(found.program.graph.nodes), links)
        try:
            plan = self._ordered(found.program, tasks, plain.memory_bytes or 0)
        except PlanError as error:
            if error.reachable_bytes is None:
                raise
            raise CannotSplit(f"in parts, {error}") from error
        remark = f"predicted are {in_ms(plan.seconds)} in {found.batch.parts} parts of {found.batch.size}"
        remark += f" {'samples' if along == 'batch' else 'tokens'}, {in_ms(plain.seconds)} otherwise"
        if found.rounding:
            remark += f"; {len(found.rounding)} operators stay whole, as they round otherwise on a part"
        return replace(
            plan,
            batch=found.batch.size,
            along=found.batch.along,
            parts=found.batch.parts,
            cut=found.names,
            remark=remark,
            again=plain.again,
        )

    def _may_share(self, program: Program) -> bool:
        """True where norms on shares of the tokens are to be tried."""
        if self.sequence_parallel is None:
            return self.split is None and not program.is_joint
        return self.sequence_parallel

    def _may_chunk(self, plan: OverlapPlan) -> bool:
        """True where experts on chunks of their capacity are to be tried."""
        free = self.split is None and not self.sequence_parallel
        wanted = self.capacity_split > 1 if self.capacity_split is not None else free
        return wanted and "all_to_all" in {row[1] for row in plan.transfers}

    def _by_tokens(
        self, program: Program, costs: Costs, links: dict[str, LinkCosts], plan: OverlapPlan, limit: int
    ) -> OverlapPlan:
        """The plan with norms on shares of the tokens where that pays or is asked for; or `plan`."""
        try:
            found = agreed_shares(program, groups_of(program), exact=self.exact)
        except CannotShard as reason:
            if self.sequence_parallel:
                raise PlanError(f"sequence_parallel=True: {reason}") from reason
            return plan
        tasks = agreed_tasks(found.program, costs.with_nodes(found.program.graph.nodes), links)
        shared = self._ordered(found.program, tasks, limit)
        said = f"with norms on shares of the tokens predicted are {in_ms(shared.seconds)}"
        if self.sequence_parallel or shared.seconds <= (1 - _SPLIT_GAIN) * plan.seconds:
            said += f", {in_ms(plan.seconds)} otherwise"
            return replace(shared, shared=found.names, partial=not self.exact, remark=said)
        return plan if plan.parts > 1 else replace(plan, remark=_with(plan.remark, said))

    def _in_chunks(
        self, program: Program, costs: Costs, links: dict[str, LinkCosts], plan: OverlapPlan, limit: int
    ) -> OverlapPlan:
        """The plan with experts on chunks of their capacity where that pays or is asked; or `plan`."""
        groups = groups_of(program)

        def in_chunks(chunks: int) -> AgreedTasks:
            found = agreed_chunks(program, chunks, groups, exact=self.exact).program
            return agreed_tasks(found, costs.with_nodes(found.graph.nodes), links)

        try:
            chunks = self.capacity_split
            if chunks is None:
                whole, halves = agreed_tasks(program, costs, links), in_chunks(2)
                chunks = best_degree(program, whole.seconds, halves.seconds)
            if chunks == 1:
                return plan
            found = agreed_chunks(program, chunks, groups, exact=self.exact).program
        except CannotChunk as reason:
            if self.capacity_split is not None:
                raise PlanError(f"capacity_split={self.capacity_split}: {reason}") from reason
            return plan
        cut = self._ordered(found, agreed_tasks(found, costs.with_nodes(found.graph.nodes), links), limit)
        said = f"in {chunks} chunks of the experts' capacity predicted are {in_ms(cut.seconds)}"
        if self.capacity_split or cut.seconds <= (1 - _SPLIT_GAIN) * plan.seconds:
            return replace(cut, chunks=chunks, remark=f"{said}, {in_ms(plan.seconds)} otherwise")
        return plan if plan.parts > 1 else replace(plan, remark=_with(plan.remark, said))

    def _ordered(self, program: Program, tasks: AgreedTasks, limit: int) -> OverlapPlan:
        """The plan for `program` as it is, within `limit` bytes."""
        before = [run_order(g, range(len(g.tasks))) for g in tasks.graphs]
        found = [schedule(g, memory_bytes=limit, seed=self.seed, gap=self.gap) for g in tasks.graphs]
        plan = plan_of(before, found, limit, tasks.timings, program)
        check_same(groups_of(program), plan.order, "the planned orders")
        return plan

    def apply(self, program: Program, plan: OverlapPlan) -> Program:
        """The program as `plan` changes it, with its operators in the order of `plan`."""
        program = gathered_again(program, plan.again)
        if plan.shared:
            program = TokenShares(program, plan.shared, partial=plan.partial).program
        if plan.chunks > 1:
            program = CapacityChunks(program, plan.chunks).program
        if plan.parts > 1:
            program = cut(program, Batch(plan.batch, plan.parts, plan.along), plan.cut).program
        return reordered(program, plan.order)

    def _limit(self, program: Program, peak: int, device: Device, groups: Sequence[str]) -> int:
        """Bytes that the step may take on every rank; `peak` is what it takes now."""
        most = 0 if any(map(ops.offloads, program.operators())) else device.memory_bytes
        own = resolve_budget(self.memory, peak) or max(peak, most)
        return -int(largest(groups, [-own], "the memory")[0])

    def _links(self, program: Program, groups: Sequence[str], device: Device) -> dict[str, LinkCosts]:
        """The costs of each group: given, measured (of parts, too), or of a link that nobody knows."""
        starts = [n for n in program.operators() if collective_of(n) is not None]
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
                    if transfer.kind == "all_reduce" and self._may_share(program):
                        wanted.setdefault("reduce_scatter", []).append(int(nbytes))
                        wanted.setdefault("all_gather", []).append(int(nbytes) // size_of(group))
            if self.links is not None:
                found[group] = self.links
            elif is_real(group):
                found[group] = measured_links(group, wanted, _device_of(starts), cluster)
            else:
                found[group] = LinkCosts(cluster)
        return found


def _with(remark: str, more: str) -> str:
    return f"{remark}; {more}" if remark else more


def _device_of(nodes: Sequence[fx.Node]) -> torch.device:
    return next(t.device for n in nodes for t in output_tensors(n))
