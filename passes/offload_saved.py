"""Offloading: saved values that leave memory for a file in the forward, and return in the backward.

The third thing to do with a saved value, beside keeping and recomputing it. As in Beaumont et al.,
"Efficient Combination of Rematerialization and Offloading for Training DNNs", NeurIPS 2021, transfers run
beside the computing, so that they cost time only where something waits for them. A `Checkpoint` of some
budget decides what is recomputed; what it keeps is offloaded until the memory is met; the best of a few
such budgets is taken.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from operator import getitem
from typing import ClassVar

import torch
from torch import fx
from torch._prims.rng_prims import run_with_rng_state
from torch._subclasses.fake_tensor import FakeTensor

from graphopt import ops as facts
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import format_bytes
from graphopt.cost_models.memory import Dataflow, dataflow, may_overwrite
from graphopt.errors import PlanError
from graphopt.passes.base import Pass
from graphopt.passes.budget import Budget, check_budget, resolve_budget
from graphopt.passes.checkpoint import Checkpoint, CheckpointPlan, plan_of
from graphopt.passes.checkpoint_choice import LIGHT_SHARE, everything, step_of
from graphopt.passes.offload_choice import OffloadChoice, choose_offloads, least_bytes
from graphopt.passes.offload_ops import ops
from graphopt.passes.offload_schedule import HANDLE_BYTES, Candidate, OffloadProblem, Transfers
from graphopt.passes.offload_store import lines_of
from graphopt.passes.pack_saved import backward_readers, marked_late, read_instead
from graphopt.passes.replay import RECOMPUTE_OF
from graphopt.plan import Plan
from graphopt.program import Program, insert_call, leaves
from graphopt.split import late_nodes, saved_nodes

LEAST_BYTES = 4096  # below, the four operators cost more than they are worth
SHARES = (0.0, 0.25, 0.5, 0.75)  # of the way from the budget to the plain peak: `Checkpoint`'s budgets
BISECTIONS = 8


@dataclass(frozen=True)
class OffloadPlan(Plan):
    """What is offloaded: for each value its node, its bytes, and the operators that bound its absence.

    A write is awaited after the first of the two operators, the read is begun before the second.
    `checkpoint` says what is recomputed. Peaks are bytes of the whole step, parameters and inputs
    included. `step_seconds` is the computing without what is recomputed, `transfer_seconds` what the
    channel is busy, `exposed_seconds` what computing waits for it, and `predicted_seconds` all that the
    step takes. None takes less than `least_seconds`, the more of computing and transfers.
    """

    offloads: tuple[tuple[str, int, str, str], ...]
    checkpoint: CheckpointPlan
    budget_bytes: int | None
    peak_bytes: int
    baseline_bytes: int
    step_seconds: float
    recompute_seconds: float
    transfer_seconds: float
    exposed_seconds: float
    predicted_seconds: float
    least_seconds: float

    def __post_init__(self) -> None:
        if isinstance(self.checkpoint, dict):  # from JSON
            text = json.dumps({"plan": CheckpointPlan.__name__, **self.checkpoint})
            object.__setattr__(self, "checkpoint", CheckpointPlan.from_json(text))

    @property
    def offloaded_bytes(self) -> int:
        """The bytes that go to the file."""
        return sum(nbytes for _, nbytes, _, _ in self.offloads)

    def __str__(self) -> str:
        return (
            f"offload {len(self.offloads)} tensors of {format_bytes(self.offloaded_bytes)}: peak "
            f"{format_bytes(self.peak_bytes)} instead of {format_bytes(self.baseline_bytes)} for "
            f"{self._share(self.exposed_seconds)} more time waiting and "
            f"{self._share(self.recompute_seconds)} recomputing"
        )

    def _share(self, seconds: float) -> str:
        return f"{seconds / self.step_seconds if self.step_seconds else 0.0:.1%}"


@dataclass(frozen=True)
class _Base:
    """A program after a `Checkpoint`, and what can be offloaded of it."""

    checkpoint: CheckpointPlan
    program: Program
    problem: OffloadProblem

    @property
    def least_bytes(self) -> int:
        """The lowest peak by offloading, static bytes included."""
        handles = HANDLE_BYTES * len(self.problem.candidates)
        return self.problem.flow.static_bytes + least_bytes(self.problem) + handles

    def choice(self, budget_bytes: int) -> OffloadChoice | None:
        """The quickest within the budget."""
        handles = HANDLE_BYTES * len(self.problem.candidates)
        return choose_offloads(self.problem, budget_bytes - self.problem.flow.static_bytes - handles)


@dataclass(frozen=True)
class OffloadSaved(Pass):
    """Offload saved values to a file, and recompute others where that is quicker.

    It does what `Checkpoint` does, and offloads beside it: use one of the two. `memory` bounds the peak
    of the step, as in `Checkpoint`; None is for what can be had by offloading for hardly any time. The
    file is in `folder` (None: the system's folder for temporary files), has no name, and is gone with the
    last value in it. Transfers run at `bytes_per_s` at most; where that is None, at the speed that is
    measured, once for a folder, with the system's cache of files. With `recompute=False` nothing is
    recomputed. The steps run in eager order; values on other devices than the CPU stay where they are.
    """

    name: ClassVar[str] = "offload-saved"

    memory: Budget = None
    folder: str | None = None
    bytes_per_s: float | None = None
    recompute: bool = True

    def __post_init__(self) -> None:
        check_budget(self.memory)
        if self.bytes_per_s is not None and not self.bytes_per_s > 0:
            raise PlanError(f"bytes_per_s={self.bytes_per_s!r} must be positive")

    def plan(self, program: Program, costs: Costs) -> OffloadPlan:
        """What is offloaded and what recomputed; PlanError with `reachable_bytes` where none fits."""
        if costs.fused:
            raise PlanError('offload-saved runs in eager order; compiler="inductor" has its own')
        flow = costs.dataflow(program)
        baseline = flow.static_bytes + step_of(flow, everything(flow)).peak_bytes
        budget = resolve_budget(self.memory, baseline)
        kept = self._base(program, costs, plan_of(flow, everything(flow), budget, baseline))
        if not program.is_joint:
            return _plan(kept, _nothing(kept.problem), budget)
        if self.memory is None:
            return _plan(kept, _light(kept), budget)
        bases = [kept, *self._recomputing(program, costs, budget, baseline)]
        least = min(base.least_bytes for base in bases)
        limit = least if budget is None else budget
        found = [(base, base.choice(limit)) for base in bases]
        plans = [_plan(base, choice, budget) for base, choice in found if choice is not None]
        if not plans:
            raise PlanError(
                f"no plan keeps the step within {format_bytes(limit)}; the smallest reachable peak is "
                f"{format_bytes(least)} ({least} bytes)",
                reachable_bytes=least,
                budget_bytes=budget,
            )
        return min(plans, key=lambda p: (p.predicted_seconds, p.offloaded_bytes, p.recompute_seconds))

    def _recomputing(
        self, program: Program, costs: Costs, budget: int | None, baseline: int
    ) -> Iterator[_Base]:
        """What `Checkpoint` makes of the program at some budgets from this one up to the plain peak."""
        if not self.recompute or (budget is not None and budget >= baseline):
            return
        wishes: list[Budget] = ["min"]
        if budget is not None:
            wishes += [budget + int(share * (baseline - budget)) for share in SHARES]
        seen: set[CheckpointPlan] = set()
        for wish in wishes:
            try:
                plan = Checkpoint(memory=wish).plan(program, costs)
            except PlanError:
                continue  # "min" is there
            if (same := replace(plan, budget_bytes=None)) not in seen:
                seen.add(same)
                yield self._base(program, costs, plan)

    def _base(self, program: Program, costs: Costs, plan: CheckpointPlan) -> _Base:
        result = Checkpoint().apply(program, plan) if program.is_joint else program
        flow = _costs_after(result, costs).dataflow(result)
        write, read = lines_of(self.folder, self.bytes_per_s)
        saved = frozenset(
            v
            for n in saved_nodes(result)
            for v in flow.value_of[n.name]
            if n.op != "placeholder" and program.is_joint
        )
        problem = OffloadProblem(flow, saved, tuple(_candidates(result, flow)), write, read)
        return _Base(plan, result, problem)

    def apply(self, program: Program, plan: OffloadPlan) -> Program:
        """The joint graph with writes and reads; PlanError for what cannot be offloaded."""
        if not program.is_joint:
            return program.copy()
        result = Checkpoint().apply(program, plan.checkpoint)
        candidates = {c.name for c in _candidates(result, dataflow(result))}
        nodes = {n.name: n for n in result.graph.nodes}
        late = late_nodes(result)
        places = {n: i for i, n in enumerate(result.graph.nodes)}
        for name, _, *bounds in plan.offloads:
            if name not in candidates:
                raise PlanError(f"{name!r} is no value of this program that can be offloaded")
            if missing := [b for b in bounds if b not in nodes]:
                raise PlanError(f"{missing[0]!r} is no operator of this program")
        found = [(nodes[n], nodes[w], nodes[b]) for n, _, w, b in plan.offloads]
        firsts = {n: min(backward_readers(n, late), key=lambda r: places[r]) for n, _, _ in found}
        for node, awaited, begun in sorted(found, key=lambda f: places[firsts[f[0]]]):
            if awaited in late or begun not in late:
                raise PlanError(f"{node.name!r} cannot be away from {awaited.name} to {begun.name}")
            first = firsts[node]  # maybe a view, before the operator that reads it
            self._offload(result, node, awaited, min(begun, first, key=lambda n: places[n]), first)
        return result

    def _offload(
        self, program: Program, node: fx.Node, awaited: fx.Node, begun: fx.Node, first: fx.Node
    ) -> None:
        graph, late, value = program.graph, late_nodes(program), node.meta["val"]
        with graph.inserting_after(node):
            options = (node, self.folder, self.bytes_per_s)
            handle = insert_call(graph, node, ops.offload.default, options, name=f"{node.name}_offload")
        order = {n: i for i, n in enumerate(graph.nodes)}
        with graph.inserting_after(max(awaited, handle, key=lambda n: order[n])):
            wait = ops.offload_wait.default
            place = insert_call(graph, node, wait, (handle, node), name=f"{node.name}_place")
        with graph.inserting_before(begun):
            layout = (place, list(value.shape), list(value.stride()), value.dtype)
            buffer = insert_call(graph, node, ops.fetch.default, layout, name=f"{node.name}_fetch")
            marked_late(buffer)
        with graph.inserting_before(first):
            done = ops.fetch_wait.default
            again = insert_call(graph, node, done, (buffer, place), name=f"{node.name}_fetched")
        read_instead(graph, node, marked_late(again), late)

    def limit_bytes(self, program: Program, plan: OffloadPlan) -> int | None:
        """The budget; for "min" the plan's peak; None where no bound was asked for."""
        if self.memory is None:
            return None
        return plan.peak_bytes if plan.budget_bytes is None else plan.budget_bytes


def _candidates(program: Program, flow: Dataflow) -> Iterator[Candidate]:
    """The values that the backward takes from the forward and that can be elsewhere meanwhile."""
    index = {o.name: i for i, o in enumerate(flow.operators)}
    late = late_nodes(program)
    saved = [n for n in saved_nodes(program) if n.op != "placeholder"]
    fixed = {v for o in program.outputs if isinstance(o, fx.Node) for v in flow.value_of[o.name]}
    fixed |= {
        v
        for n in program.operators()
        if facts.mutates(n.target)
        for i in n.all_input_nodes
        for v in flow.value_of[i.name]
    }
    shared = [v for n in saved for v in flow.value_of[n.name]]
    for node in saved:
        value = flow.value_of[node.name][0]
        if not _is_movable(node) or value in fixed or shared.count(value) > 1:
            continue
        made = flow.values[value].producer
        readers = [i for i, o in enumerate(flow.operators) if value in o.reads]
        early = [i for i in readers if not flow.operators[i].backward]
        firsts = [index[n.name] for r in backward_readers(node, late) for n in _kernels(r, index)]
        if firsts and made >= 0:
            last = max([made, *early])
            yield Candidate(node.name, value, flow.values[value].nbytes, made, last, min(firsts))


def _kernels(node: fx.Node, index: Mapping[str, int]) -> Iterator[fx.Node]:
    """`node` where it is an operator, else the operators that read it, a view."""
    if node.name in index:
        yield node
    else:
        for user in node.users:
            if user.op != "output":
                yield from _kernels(user, index)


def _is_movable(node: fx.Node) -> bool:
    """True for a tensor on the CPU that fills a storage of its own, of known size."""
    tensor = node.meta.get("val")
    if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cpu" or len(leaves(node)) != 1:
        return False
    if type(tensor) is not FakeTensor or tensor.layout is not torch.strided:
        return False
    if not all(isinstance(size, int) for size in tensor.shape):
        return False
    made_here = leaves(node)[0].alias is None or node.target is getitem
    return made_here and leaves(node)[0].nbytes >= LEAST_BYTES and may_overwrite(node, node)


def _costs_after(program: Program, costs: Costs) -> Costs:
    """`costs` with those of recomputed operators: what the operator costs that they repeat."""
    makers = {n.name: n.meta.get(RECOMPUTE_OF, n.name) for n in program.operators()}
    nodes = {name: costs.nodes[maker] for name, maker in makers.items() if maker in costs.nodes}
    scratch = {name: costs.workspace_bytes.get(maker, 0) for name, maker in makers.items()}
    for node in program.operators():
        if node.target is run_with_rng_state:  # which puts the generator's present state aside
            state = node.args[0]
            assert isinstance(state, fx.Node)
            scratch[node.name] += leaves(state)[0].nbytes
    return replace(costs, nodes=nodes, workspace_bytes=scratch)


def _nothing(problem: OffloadProblem) -> OffloadChoice:
    return OffloadChoice((), Transfers({}, {}, float(problem.begins[-1])))


def _light(base: _Base) -> OffloadChoice:
    """The lowest peak for a hundredth of the step's time."""
    compute = float(base.problem.begins[-1])
    low, high = base.least_bytes, base.checkpoint.baseline_bytes
    best = _nothing(base.problem)
    for _ in range(BISECTIONS):
        middle = (low + high) // 2
        choice = base.choice(middle)
        if choice is not None and choice.transfers.seconds <= (1 + LIGHT_SHARE) * compute:
            best, high = choice, middle
        else:
            low = middle
    return best


def _plan(base: _Base, choice: OffloadChoice, budget: int | None) -> OffloadPlan:
    problem, checkpoint, transfers = base.problem, base.checkpoint, choice.transfers
    names = [o.name for o in problem.flow.operators]
    offloads = tuple(
        (c.name, c.nbytes, names[transfers.awaited[c.value]], names[transfers.begun[c.value]])
        for c in choice.offloaded
    )
    compute, moving = float(problem.begins[-1]), problem.transfer_seconds(choice.offloaded)
    return OffloadPlan(
        offloads=offloads,
        checkpoint=checkpoint,
        budget_bytes=budget,
        peak_bytes=problem.flow.static_bytes + problem.peak_bytes(choice.offloaded, transfers),
        baseline_bytes=checkpoint.baseline_bytes,
        step_seconds=checkpoint.step_seconds,
        recompute_seconds=checkpoint.recompute_seconds,
        transfer_seconds=moving,
        exposed_seconds=max(0.0, transfers.seconds - compute),
        predicted_seconds=transfers.seconds,
        least_seconds=max(compute, moving),
    )
