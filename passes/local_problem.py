"""One span's choice on its own: a small dataflow with names taken out, so that equal spans are equal.

Structurally equal spans (the layers of a transformer) give equal `LocalProblem`s, which are solved
once.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from graphopt.cost_models.memory import EXTERNAL, NO_PRODUCER, Dataflow, Operator, Value
from graphopt.cost_models.schedule import Step, anchors, simulate
from graphopt.passes.segments import Spans


@dataclass(frozen=True)
class LocalProblem:
    """A run of spans as a dataflow of its own.

    `borders` are the values that come from outside and stay; `must_keep` values made inside that are
    kept whatever is chosen; `entering` and `leaving` the values of the backward that are alive at the
    two ends of this span's part of it; `leaving_forward` what is alive when its forward ends.
    """

    flow: Dataflow
    borders: frozenset[int]
    must_keep: frozenset[int]
    entering: frozenset[int]
    leaving: frozenset[int]
    leaving_forward: frozenset[int]

    def __hash__(self) -> int:
        flow = self.flow
        return hash((flow.operators, flow.values, self.must_keep, self.entering, self.leaving))


@dataclass(frozen=True)
class Placed:
    """A `LocalProblem`, where it stands: the numbers in the whole of its values and operators.

    `passing_bytes` are values of the backward (gradients, mostly) alive all the while.
    """

    problem: LocalProblem
    values: tuple[int, ...]
    operators: tuple[int, ...]
    passing_bytes: int


@dataclass(frozen=True)
class Surroundings:
    """What every local problem of one dataflow needs to know of the whole."""

    flow: Dataflow
    spans: Spans
    alive: tuple[frozenset[int], ...]
    position: dict[int, int]

    @staticmethod
    def of(flow: Dataflow, spans: Spans) -> "Surroundings":
        """Follow the backward once, to know which of its values are alive before each operator."""
        order = anchors(flow)
        steps = [Step(i, flow.operators[i].writes) for i in order]
        alive = _alive_before(flow, steps)
        return Surroundings(flow, spans, alive, {a: p for p, a in enumerate(order)})


def _alive_before(flow: Dataflow, steps: list[Step]) -> tuple[frozenset[int], ...]:
    timeline = simulate(flow, steps, (), flow.gradients)
    wanted = {v for step in steps for v in flow.operators[step.operator].reads}
    wanted.update(flow.gradients)
    alive: set[int] = set()
    found = [frozenset[int]()]
    for step, dying in zip(timeline.steps, timeline.last_read, strict=True):
        alive.update(v for v in step.makes if v in wanted)
        alive.difference_update(dying)
        found.append(frozenset(alive))
    return tuple(found)


def place(world: Surroundings, first: int, stop: int) -> Placed:
    """The local problem of the spans from `first` to before `stop`, taken as one."""
    flow, cut = world.flow, world.spans
    inside = range(cut.cuts[first], cut.cuts[stop])
    late = [a for k in range(stop - 1, first - 1, -1) for a in cut.anchors[k]]
    numbering = _Numbering(flow, set(inside))
    for index in inside:
        numbering.add_operator(index)
    for index in late:
        numbering.add_needed(index)
    entering, leaving = _ends(world, late)
    touched = entering & set(numbering.number)
    passing = sum(flow.values[v].nbytes for v in entering & leaving - touched)
    made = {v for i in inside for v in flow.operators[i].writes}
    crossing = cut.crossing[stop] if stop < len(cut) else frozenset()
    outputs = frozenset(flow.outputs) & made
    stuck = {v for v in made if not flow.operators[flow.values[v].producer].recomputable}
    must = ((crossing | cut.pinned) & made) | stuck
    new_gradients = leaving & set(numbering.number)
    local = LocalProblem(
        numbering.flow(),
        numbering.local(numbering.outside - entering),
        numbering.local(must),
        numbering.local(touched),
        numbering.local(new_gradients),
        numbering.local(outputs | must),
    )
    return Placed(local, tuple(numbering.number), tuple(numbering.operators), passing)


def _ends(world: Surroundings, late: list[int]) -> tuple[frozenset[int], frozenset[int]]:
    if not late:
        return frozenset(), frozenset()
    begin = world.position[late[0]]
    return world.alive[begin], world.alive[begin + len(late)]


class _Numbering:
    """Numbers values and operators in the order in which a span meets them."""

    def __init__(self, flow: Dataflow, inside: set[int]) -> None:
        self.flow_of = flow
        self.inside = inside
        self.number: dict[int, int] = {}
        self.operators: dict[int, Operator] = {}
        self.outside: set[int] = set()

    def _value(self, value: int) -> int:
        return self.number.setdefault(value, len(self.number))

    def add_operator(self, index: int) -> None:
        """Take in an operator after those whose results it reads."""
        operator = self.flow_of.operators[index]
        kept = [v for v in operator.reads if self.flow_of.values[v].producer != NO_PRODUCER]
        for value in kept:
            if value not in self.number:
                self.outside.add(value)
        self.operators[index] = replace(
            operator,
            name="",
            reads=tuple(self._value(v) for v in kept),
            writes=tuple(self._value(v) for v in operator.writes),
            reusable=tuple(self.number[v] for v in operator.reusable if v in self.number),
            state=None,
        )

    def add_needed(self, index: int) -> None:
        """Take in an operator of the backward, and before it what runs on demand for it."""
        stack = [(index, iter(self.flow_of.operators[index].reads))]
        while stack:
            current, reads = stack[-1]
            below = next((p for p in map(self._on_demand, reads) if p is not None), None)
            if below is not None:
                stack.append((below, iter(self.flow_of.operators[below].reads)))
                continue
            stack.pop()
            self.add_operator(current)

    def _on_demand(self, value: int) -> int | None:
        producer = self.flow_of.values[value].producer
        if producer == NO_PRODUCER or producer in self.operators:
            return None
        operator = self.flow_of.operators[producer]
        return producer if operator.backward and not operator.anchored else None

    def local(self, values: Iterable[int]) -> frozenset[int]:
        """The numbers of those `values` that occur here."""
        return frozenset(self.number[v] for v in values if v in self.number)

    def flow(self) -> Dataflow:
        """The dataflow of everything taken in."""
        producer = {v: i for i, o in enumerate(self.operators.values()) for v in o.writes}
        values = tuple(
            Value(self.flow_of.values[v].nbytes, producer.get(n, EXTERNAL), "")
            for v, n in self.number.items()
        )
        return Dataflow(tuple(self.operators.values()), values, {}, frozenset(), (), (), 0)
