"""The facts about one captured graph that a report shows: bytes, times, tensors, their origin."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import fx
from torch._prims.rng_prims import run_and_save_rng_state

from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import format_bytes
from graphopt.cost_models.memory import NO_PRODUCER, Dataflow
from graphopt.origin import Origin, format_seconds, operator_name, origin_of
from graphopt.passes.checkpoint_choice import everything, holding_outputs
from graphopt.passes.replay import RECOMPUTE_OF
from graphopt.program import Program, Role, bytes_behind, leaves, tensors_of
from graphopt.runtime import GraphRecord
from graphopt.timeline import MemoryTimeline, memory_timeline


@dataclass(frozen=True)
class TensorFact:
    """One tensor in memory. `why` says in words why it is there; "" where nothing is to be said."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    origin: Origin
    category: str
    why: str = ""


@dataclass(frozen=True)
class RecomputeFact:
    """An operator of the forward that the backward runs again, `count` times, for `seconds` in all.

    The plain step keeps `kept_bytes` of its results, of which `freed_bytes` are alive at its peak.
    Results of other recomputed operators are there to make those of `leads_to`.
    """

    name: str
    operator: str
    count: int
    seconds: float
    freed_bytes: int
    kept_bytes: int
    leads_to: str
    origin: Origin
    why: str


@dataclass(frozen=True)
class InputFact:
    """An argument of the model."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclass(frozen=True)
class PassFact:
    """A pass and its plan, each as a line of text, and how long planning and applying took.

    `table` has more lines about the plan.
    """

    name: str
    options: str
    plan: str
    seconds: float
    table: str = ""


@dataclass(frozen=True)
class PeakFact:
    """The instant of the peak: the operator that runs, in which half, and the tensors beside it."""

    operator: str
    half: str
    origin: Origin
    tensors: tuple[TensorFact, ...]


@dataclass(frozen=True, eq=False)
class GraphReport:
    """One captured graph before and after the passes. Peaks count everything, static bytes too.

    Static are parameters, buffers and inputs, and the `reserved_bytes` that the step holds outside
    of this graph. `budget_bytes` bounds the peak. `kept` is ordered by bytes, `recomputed` by
    seconds. The step's own seconds and FLOPs do not count what recomputation adds.
    """

    is_training: bool
    operators: int
    inputs: tuple[InputFact, ...]
    static_bytes: int
    reserved_bytes: int
    parameter_bytes: int
    buffer_bytes: int
    input_bytes: int
    baseline_peak_bytes: int
    peak_bytes: int
    budget_bytes: int | None
    step_seconds: float
    recompute_seconds: float
    step_flops: int
    recompute_flops: int
    trace_seconds: float
    passes: tuple[PassFact, ...]
    kept: tuple[TensorFact, ...]
    recomputed: tuple[RecomputeFact, ...]
    peak: PeakFact | None
    before: MemoryTimeline
    after: MemoryTimeline

    @staticmethod
    def of(record: GraphRecord) -> "GraphReport":
        """The facts about one graph of the log."""
        before = Side.before(record)
        after = before if record.after is record.before else Side.after(record)
        plain = record.costs.dataflow(record.before)
        again = [o for o in after.flow.operators if o.name in after.again]
        return GraphReport(
            is_training=record.before.is_joint,
            operators=sum(1 for _ in record.before.operators()),
            inputs=_inputs(record.before),
            static_bytes=plain.static_bytes,
            reserved_bytes=record.costs.reserved_bytes,
            parameter_bytes=_role_bytes(record.before, plain, Role.PARAMETER),
            buffer_bytes=_role_bytes(record.before, plain, Role.BUFFER),
            input_bytes=_role_bytes(record.before, plain, Role.INPUT),
            baseline_peak_bytes=before.timeline.peak_bytes,
            peak_bytes=record.compiled_peak_bytes or after.timeline.peak_bytes,
            budget_bytes=_budget(record),
            step_seconds=sum(o.seconds for o in before.flow.operators),
            recompute_seconds=sum(o.seconds for o in again),
            step_flops=sum(o.flops for o in before.flow.operators),
            recompute_flops=sum(o.flops for o in again),
            trace_seconds=record.trace_seconds,
            passes=tuple(
                PassFact(s.pass_.name, repr(s.pass_), _one_line(s.plan), s.seconds, s.plan.table())
                for s in record.steps
            ),
            kept=_kept(after),
            recomputed=_recomputed(before, after),
            peak=_peak(after),
            before=before.timeline,
            after=after.timeline,
        )


def costs_of(record: GraphRecord, program: Program) -> Costs:
    """The costs of `program`, which some passes of `record` made.

    A recomputation costs what its original does; what a pass made anew is costed alike.
    """
    table, scratch, new = {}, {}, []
    for node in program.operators():
        name = node.meta.get(RECOMPUTE_OF, node.name)
        if name in record.costs.nodes:
            table[node.name] = record.costs.nodes[name]
            scratch[node.name] = record.costs.workspace_bytes.get(name, 0)
        else:
            new.append(node)
    return replace(record.costs, nodes=table, workspace_bytes=scratch).with_nodes(new)


class Side:
    """The program before or after the passes, as a dataflow and its timeline.

    `nodes` are its nodes by name; `again` names the recomputations, and `original` says of what.
    """

    def __init__(self, program: Program, costs: Costs, hold_outputs: bool) -> None:
        self.costs = costs
        flow = costs.dataflow(program)
        self.flow = holding_outputs(flow) if hold_outputs else flow
        self.nodes: dict[str, fx.Node] = {n.name: n for n in program.graph.nodes}
        self.original = {name: n.meta.get(RECOMPUTE_OF) for name, n in self.nodes.items()}
        self.again = frozenset(name for name, of in self.original.items() if of is not None)
        self.choice = everything(self.flow)
        self.timeline = memory_timeline(self.flow, self.choice, self.again)

    @staticmethod
    def before(record: GraphRecord) -> "Side":
        """The program as it was captured."""
        return Side(record.before, record.costs, _holds_outputs(record))

    @staticmethod
    def after(record: GraphRecord) -> "Side":
        """The program as planned."""
        return Side(record.after, costs_of(record, record.after), _holds_outputs(record))

    def fact(self, value: int, category: str, why: str = "") -> TensorFact:
        """The tensor behind a value of the flow."""
        known = self.flow.values[value]
        operator = self.flow.operators[known.producer]
        node = self.nodes[operator.name]
        own = [i for i, leaf in enumerate(leaves(node)) if leaf.alias is None]
        tensor = (
            tensors_of(node)[own[operator.writes.index(value)]]
            if value in operator.writes[: len(own)]
            else torch.empty(known.nbytes, dtype=torch.uint8, device="meta")
        )
        shape, dtype = _shape_and_dtype(tensor)
        return TensorFact(known.label, shape, dtype, known.nbytes, origin_of(node), category, why)


def _holds_outputs(record: GraphRecord) -> bool:
    return any(getattr(step.pass_, "hold_outputs", False) for step in record.steps)


def _budget(record: GraphRecord) -> int | None:
    plans = [s.plan for s in record.steps if getattr(s.pass_, "memory", None) is not None]
    return next((getattr(plan, "budget_bytes", None) for plan in plans), None)


def _one_line(plan: object) -> str:
    text = " ".join(str(plan).split())
    return text if len(text) <= 200 else text[:197] + "..."


def _shape_and_dtype(tensor: torch.Tensor | None) -> tuple[tuple[int, ...], str]:
    if tensor is None:
        return (), ""
    return tuple(int(s) for s in tensor.shape), str(tensor.dtype).removeprefix("torch.")


def _inputs(program: Program) -> tuple[InputFact, ...]:
    nodes = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    found = []
    for item in program.inputs:
        tensor = next(iter(tensors_of(nodes[item.name])), None)
        if item.role is Role.INPUT and tensor is not None:
            nbytes = bytes_behind(nodes[item.name])
            name = f"argument {item.label}" if item.label.isdigit() else item.label
            found.append(InputFact(name, *_shape_and_dtype(tensor), nbytes))
    return tuple(found)


def _role_bytes(program: Program, flow: Dataflow, role: Role) -> int:
    values = {v for i in program.inputs if i.role is role for v in flow.value_of[i.name]}
    return sum(flow.values[v].nbytes for v in values)


def _kept(side: Side) -> tuple[TensorFact, ...]:
    flow = side.flow
    starts: dict[int, int] = {}
    for operator in flow.operators:
        if operator.name in side.again:
            for value in operator.reads:
                starts[value] = starts.get(value, 0) + 1
    facts = [
        side.fact(value, "kept", _why_kept(side, value, starts.get(value, 0)))
        for value in side.choice.keep
        if flow.values[value].producer != NO_PRODUCER
    ]
    return tuple(sorted(facts, key=lambda fact: (-fact.nbytes, fact.name)))


def _why_kept(side: Side, value: int, starts: int) -> str:
    operator = side.flow.operators[side.flow.values[value].producer]
    if side.nodes[operator.name].target is run_and_save_rng_state and value == operator.writes[0]:
        return "the state of the generator, to draw the same random numbers again"
    if operator.recomputable:
        reason = f"making it again would take {format_seconds(operator.seconds)}"
    else:
        reason = "it cannot be made again"
    if starts:
        reason += f"; {starts} recomputation{'s' * (starts > 1)} start{'s' * (starts == 1)} from it"
    return reason


def _recomputed(before: Side, after: Side) -> tuple[RecomputeFact, ...]:
    groups: dict[str, list[int]] = {}
    for index, operator in enumerate(after.flow.operators):
        if operator.name in after.again:
            groups.setdefault(str(after.original[operator.name]), []).append(index)
    kept = _bytes_by_maker(before.flow, before.choice.keep)
    at_peak = (v for v, category in before.timeline.alive_at_peak if category == "kept")
    freed = _bytes_by_maker(before.flow, at_peak)
    facts = []
    for name, runs in groups.items():
        node = after.nodes[after.flow.operators[runs[0]].name]
        seconds = sum(after.flow.operators[i].seconds for i in runs)
        parts = seconds, freed.get(name, 0), kept.get(name, 0), _next(after, runs[0])
        runs_what, origin = operator_name(before.nodes.get(name, node)), origin_of(node)
        why = why_recomputed(*parts)
        facts.append(RecomputeFact(name, runs_what, len(runs), *parts, origin, why))
    return tuple(sorted(facts, key=lambda fact: (-fact.seconds, fact.name)))


def _bytes_by_maker(flow: Dataflow, values: Iterable[int]) -> dict[str, int]:
    found: dict[str, int] = {}
    for value in values:
        if flow.values[value].producer != NO_PRODUCER:
            name = flow.operators[flow.values[value].producer].name
            found[name] = found.get(name, 0) + flow.values[value].nbytes
    return found


def _next(after: Side, index: int) -> str:
    """The first operator that reads what operator `index` makes, by its name in the forward."""
    made = set(after.flow.operators[index].writes)
    reader = next((o.name for o in after.flow.operators if made & set(o.reads)), "")
    return after.original.get(reader) or reader


def why_recomputed(seconds: float, freed_bytes: int, kept_bytes: int, leads_to: str) -> str:
    """In words: what a recomputation costs and what it is good for."""
    time = format_seconds(seconds)
    if freed_bytes:
        return f"{time} for {format_bytes(freed_bytes)} freed at the peak"
    if kept_bytes:
        return f"{time} for {format_bytes(kept_bytes)} freed before or after the peak"
    return f"{time} on the way to {leads_to}"


def _peak(side: Side) -> PeakFact | None:
    timeline = side.timeline
    if not len(timeline.operators):
        return None
    operator = side.flow.operators[timeline.operators[timeline.peak]]
    return PeakFact(
        operator.name,
        "forward" if timeline.peak < timeline.forward_steps else "backward",
        origin_of(side.nodes[operator.name]),
        tuple(side.fact(value, category) for value, category in timeline.alive_at_peak),
    )
