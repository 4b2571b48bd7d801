"""Cut a model into the stages of a pipeline: the slowest stage as fast as can be, each within its memory.

Units are what is not cut: layers, or what lies between two narrow places of a traced model. Dynamic
programming over the places to cut; of the parts that a unit may belong to, the slowest one decides.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import format_bytes
from graphopt.cost_models.memory import NO_PRODUCER, Dataflow
from graphopt.cost_models.schedule import anchors
from graphopt.cost_models.stage_costs import StageCost
from graphopt.errors import PlanError
from graphopt.passes.segments import deep_reads, spans
from graphopt.plan import Plan
from graphopt.program import Program, Role

Parts = tuple[tuple[int, ...], ...]


def even_stages(
    seconds: Sequence[float],
    stages: int,
    *,
    nbytes: Sequence[int] = (),
    held_bytes: Sequence[int] = (),
    live: Sequence[float] = (),
    memory_bytes: int | None = None,
    rates: Sequence[float] = (),
) -> Parts:
    """The units of each stage, in order, such that the slowest stage takes least.

    A unit takes `seconds` of a microbatch; stage s is visited by the share `rates[s]` of them (1, if not
    given), and so takes that share of its seconds. It holds `held_bytes` of its units all the time and
    `live[s]` times their `nbytes`, within `memory_bytes`. Of cuts with the same slowest stage, the one
    with the smallest sum of squares is taken, which evens out the others. PlanError where no cut fits,
    with the least memory that one takes.

    >>> even_stages([1.0, 1.0, 1.0, 1.0, 3.0], 3)
    ((0, 1), (2, 3), (4,))
    >>> even_stages([1.0] * 6, 3, rates=[1.0, 0.5, 0.5])
    ((0,), (1, 2), (3, 4, 5))
    """
    count = len(seconds)
    if not 1 <= stages <= count:
        raise PlanError(f"{count} units in {stages} stages")
    time = np.concatenate([[0.0], np.cumsum(seconds)])
    held = np.concatenate([[0.0], np.cumsum(held_bytes or [0] * count)])
    kept = np.concatenate([[0.0], np.cumsum(nbytes or [0] * count)])
    share, alive = list(rates or [1.0] * stages), list(live or [1.0] * stages)

    def cost(stage: int) -> tuple[np.ndarray, np.ndarray]:
        """Seconds and bytes of the stage by where it begins (rows) and ends."""
        size = held[None, :] - held[:, None] + alive[stage] * (kept[None, :] - kept[:, None])
        return share[stage] * (time[None, :] - time[:, None]), size

    if memory_bytes is not None:
        least = _least(count, [cost(s)[1] for s in range(stages)])
        if least > memory_bytes:
            raise PlanError(
                f"no cut into {stages} stages fits {format_bytes(memory_bytes)}: the fullest stage of "
                f"the best cut holds {format_bytes(int(least))} ({int(least)} bytes)",
                reachable_bytes=int(least),
                budget_bytes=memory_bytes,
            )
    fits = [cost(s)[1] <= (np.inf if memory_bytes is None else memory_bytes) for s in range(stages)]
    slowest = _least(count, [np.where(fits[s], cost(s)[0], np.inf) for s in range(stages)])
    best, choices = np.full(count + 1, np.inf), []
    best[0] = 0.0
    for stage in range(stages):
        taken = cost(stage)[0]
        allowed = fits[stage] & (taken <= slowest * (1 + 1e-12)) & _ordered(count)
        total = np.where(allowed, best[:, None] + taken**2, np.inf)
        choices.append(total.argmin(axis=0))
        best = total.min(axis=0)
    ends = [count]
    for choice in reversed(choices):
        ends.append(int(choice[ends[-1]]))
    ends.reverse()
    return tuple(tuple(range(a, b)) for a, b in itertools.pairwise(ends))


def _ordered(count: int) -> np.ndarray:
    """Which begins and ends leave one unit or more between them."""
    place = np.arange(count + 1)
    return np.asarray(place[:, None] < place[None, :])


def _least(count: int, costs: Sequence[np.ndarray]) -> float:
    """The least maximum, over the stages, of what their units cost."""
    best = np.full(count + 1, np.inf)
    best[0] = 0.0
    for cost in costs:
        best = np.where(_ordered(count), np.maximum(best[:, None], cost), np.inf).min(axis=0)
    return float(best[count])


@dataclass(frozen=True)
class StagePlan(Plan):
    """How a traced model is cut: the last operator of each stage, its parameters, and its cost.

    `last[s]` names the operator of the forward after which the model is cut; `seconds[s]` are of a
    forward and backward of one microbatch, `nbytes[s]` what waits from one to the other,
    `weight_bytes[s]` the parameters' own bytes, and `output_bytes[s]` what the next stage is sent.
    """

    last: tuple[str, ...]
    parameters: tuple[tuple[str, ...], ...]
    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    nbytes: tuple[int, ...]
    weight_bytes: tuple[int, ...]
    output_bytes: tuple[int, ...]

    def costs(self, bytes_per_weight_byte: float = 1.0) -> tuple[StageCost, ...]:
        """The stages for `plan_pipeline`; half of a backward is taken to be the gradient of the weights.

        `bytes_per_weight_byte` is what is held for each byte of a parameter: 4.0 for weights, gradients
        and both states of Adam in the same type.
        """
        rows = zip(
            *(self.forward_s, self.backward_s, self.nbytes, self.weight_bytes, self.output_bytes),
            strict=True,
        )
        return tuple(
            StageCost(f, b / 2, b / 2, n, None, out, int(bytes_per_weight_byte * w))
            for f, b, n, w, out in rows
        )

    def __str__(self) -> str:
        lines = [f"{len(self.last)} stages"]
        for stage, name in enumerate(self.last):
            seconds = self.forward_s[stage] + self.backward_s[stage]
            kept, held = format_bytes(self.nbytes[stage]), format_bytes(self.weight_bytes[stage])
            lines.append(
                f"  stage {stage}  up to {name}: {seconds:.3g} s, {kept} of activations, {held} of "
                f"{len(self.parameters[stage])} parameters"
            )
        return "\n".join(lines)


def cut_stages(
    program: Program,
    costs: Costs,
    stages: int,
    *,
    memory_bytes: int | None = None,
    bytes_per_weight_byte: float = 4.0,
    rates: Sequence[float] = (),
) -> StagePlan:
    """Cut a traced `program` (of one microbatch) at narrow places into stages of equal time.

    Embedding and output layer count as what they take, as everything else does. Where `memory_bytes` is
    given, stage s of p holds the activations of p - s microbatches, as 1F1B does, and
    `bytes_per_weight_byte` times its parameters. A parameter that two stages read is counted in both.
    `rates[s]` is the share of the microbatches that visit stage s.
    """
    flow = costs.dataflow(program)
    units = _units(program, flow)
    count = len(units.forward_s)
    if count < stages:
        raise PlanError(f"the model has {count - 1} narrow places to cut at, too few for {stages} stages")
    parts = even_stages(
        [f + b for f, b in zip(units.forward_s, units.backward_s, strict=True)],
        stages,
        nbytes=units.nbytes,
        held_bytes=[int(bytes_per_weight_byte * w) for w in units.weight_bytes],
        live=[float(stages - s) for s in range(stages)],
        memory_bytes=memory_bytes,
        rates=rates,
    )

    def total(values: Sequence[float]) -> list[float]:
        return [sum(values[u] for u in part) for part in parts]

    named = [tuple(dict.fromkeys(n for u in part for n in units.parameters[u])) for part in parts]
    value_of = {name: value for value, name in _parameters(program, flow).items()}
    return StagePlan(
        tuple(units.last[part[-1]] for part in parts),
        tuple(named),
        tuple(total(units.forward_s)),
        tuple(total(units.backward_s)),
        tuple(int(v) for v in total(units.nbytes)),
        tuple(sum(flow.values[value_of[n]].nbytes for n in names) for names in named),
        tuple(units.output_bytes[part[-1]] for part in parts),
    )


@dataclass
class _Units:
    """By unit: the last operator, its parameters, seconds, bytes kept, of parameters, and sent on."""

    last: list[str]
    parameters: list[list[str]]
    forward_s: list[float]
    backward_s: list[float]
    nbytes: list[int]
    weight_bytes: list[int]
    output_bytes: list[int]


def _parameters(program: Program, flow: Dataflow) -> dict[int, str]:
    """The value of each parameter, and what the user calls it."""
    found: dict[int, str] = {}
    for item in program.inputs:
        if item.role is Role.PARAMETER:
            for value in flow.value_of[item.name]:
                found.setdefault(value, item.label)
    return found


def _units(program: Program, flow: Dataflow) -> _Units:
    """What lies between neighbouring narrow places, with its part of the backward."""
    cut = spans(flow)
    wanted = {v for row in deep_reads(flow, anchors(flow)) for v in row}
    names = _parameters(program, flow)
    units = _Units([], [], [], [], [], [], [])
    counted: set[int] = set()
    for k in range(len(cut)):
        operators = [flow.operators[i] for i in range(cut.cuts[k], cut.cuts[k + 1])]
        units.last.append(operators[-1].name)
        units.forward_s.append(sum(o.seconds for o in operators))
        units.nbytes.append(
            sum(flow.values[v].nbytes for o in operators for v in o.writes if v in wanted)
        )
        read = {v for o in operators for v in o.reads if v in names}
        units.parameters.append([names[v] for v in sorted(read)])
        units.weight_bytes.append(sum(flow.values[v].nbytes for v in read))
        is_last = k + 1 == len(cut)
        sent = () if is_last else cut.crossing[k + 1]
        units.output_bytes.append(sum(flow.values[v].nbytes for v in sent))
        units.backward_s.append(sum(_seconds_behind(flow, i, counted) for i in cut.anchors[k]))
    return units


def _seconds_behind(flow: Dataflow, index: int, counted: set[int]) -> float:
    """Seconds of an operator of the backward and of those that run for it on demand, each once."""
    stack, total = [index], 0.0
    while stack:
        operator = stack.pop()
        if operator == NO_PRODUCER or operator in counted or not flow.operators[operator].backward:
            continue
        counted.add(operator)
        total += flow.operators[operator].seconds
        stack += [
            maker
            for maker in (flow.values[v].producer for v in flow.operators[operator].reads)
            if maker != NO_PRODUCER and not flow.operators[maker].anchored
        ]
    return total
