"""A deep step from a shallow one: the operators of one layer, once for each layer.

A step of k layers and one of k + 1, captured at the same sizes, differ in one run of operators in the
forward and one in the backward. That run is the unit that repeats. What a unit reads of another is as far
away in every layer (of the next one, of its own forward), and what it reads of the rest of the step is
the same, so that any number of layers follows. The result is compared with the captured k + 1 layers,
operator by operator.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from graphopt.cost_models.memory import NO_PRODUCER, Dataflow, Operator, Value
from graphopt.cost_models.symbolic import Sample, SymbolicFlow
from graphopt.errors import GraphoptError

LEAST_UNITS = 3  # a unit with another on each side shows what it reads of its neighbours
NOT_ALIKE = "the layers of this model are not alike"
Key = tuple[int | None, Any]  # a value: its unit (None: the rest of the step), and which of that unit's


def repeated(flow: SymbolicFlow, deeper: Sample, added: int) -> SymbolicFlow:
    """`flow` with `added` layers more. `deeper` is the step with one layer more, at its smallest sizes.

    Raises GraphoptError where the layers are not alike, or `flow` has less than three.
    """
    found = _Unrolled(flow, deeper, 1).flow()
    if _canonical(found.structure) != _canonical(deeper.flow):
        raise GraphoptError(NOT_ALIKE)
    return found if added == 1 else _Unrolled(flow, deeper, added).flow()


@dataclass(frozen=True)
class Half:
    """Units of one half of the step: operators [first + i length, first + (i + 1) length), i < count.

    The half is operators [start, stop). Units count from the model's input, in the backward `reverse`.
    """

    start: int
    stop: int
    first: int
    length: int
    count: int
    reverse: bool

    def unit(self, operator: int) -> int | None:
        """The unit of an operator; None outside of the units."""
        place = (operator - self.first) // self.length
        if not 0 <= place < self.count:
            return None
        return self.count - 1 - place if self.reverse else place

    def begin(self, unit: int) -> int:
        """The first operator of a unit."""
        place = self.count - 1 - unit if self.reverse else unit
        return self.first + place * self.length

    def is_near_output(self, operator: int) -> bool:
        """True for an operator outside of the units beside the last layer."""
        return (operator < self.first) is self.reverse

    def template(self, unit: int, added: int) -> int:
        """The unit of the shallow step that `unit` of the deep one is like."""
        middle = self.count // 2
        return unit if unit <= middle else max(middle, unit - added)

    def sequence(self, added: int) -> Iterator[tuple[int, int | None]]:
        """The operators of the deep half: each one's template, and the unit that it is in."""
        units = range(self.count + added)
        yield from ((i, None) for i in range(self.start, self.first))
        for unit in reversed(units) if self.reverse else units:
            begin = self.begin(self.template(unit, added))
            yield from ((i, unit) for i in range(begin, begin + self.length))
        yield from ((i, None) for i in range(self.first + self.count * self.length, self.stop))


class _Unrolled:
    """The deep step: `values` and `operators`, each with the one of the shallow step that it is like."""

    def __init__(self, flow: SymbolicFlow, deeper: Sample, added: int) -> None:
        self.symbolic, self.old, self.added = flow, flow.structure, added
        self.halves = _halves(self.old, deeper.flow)
        self.more_static = _elsewhere(deeper.flow) - _elsewhere(self.old)
        self.keys = _keys(self.old, self.halves)
        self.olds = {key: value for value, key in self.keys.items()}
        self.number: dict[Key, int] = {}
        self.like: list[int] = []
        self.values: list[Value] = []
        self.templates: list[int] = []
        self.operators: list[Operator] = []

    def flow(self) -> SymbolicFlow:
        """The deep flow, symbolic as the shallow one."""
        self._static_values()
        for half in self.halves:
            for old, unit in half.sequence(self.added):
                self._operator(half, old, unit)
        flow, sample = self.symbolic, self.symbolic.sample
        columns = [*self.like, *flow.columns.of_operators(self.templates)]
        numbers = np.column_stack([flow.numbers[:, columns], self._static(flow)])
        parameters = frozenset(i for i, old in enumerate(self.like) if old in sample.parameters)
        loads = tuple(sample.loads[i] for i in self.templates)
        return replace(flow, sample=Sample(self._dataflow(), loads, parameters), numbers=numbers)

    def _static(self, flow: SymbolicFlow) -> Any:
        """Coefficients of the static bytes: of the values, and of what is held elsewhere."""
        before = [i for i, v in enumerate(self.old.values) if v.producer == NO_PRODUCER]
        now = [old for old in self.like if self.old.values[old].producer == NO_PRODUCER]
        static = flow.static - flow.bytes_of(before) + flow.bytes_of(now)
        if self.more_static and flow.has_width:
            raise GraphoptError(f"{NOT_ALIKE}: what each holds elsewhere is known at one width only")
        static[flow.constant] += self.added * self.more_static
        return static

    def _static_values(self) -> None:
        """Parameters, buffers and inputs: those of the whole step, then those of each unit."""
        static = [i for i, v in enumerate(self.old.values) if v.producer == NO_PRODUCER]
        for old in static:
            if self.keys[old][0] is None:
                self._new(self.keys[old], old, NO_PRODUCER, "")
        forward = self.halves[0]
        for unit in range(forward.count + self.added):
            template = forward.template(unit, self.added)
            for old in static:
                owner, kind = self.keys[old]
                if owner == template:
                    self._new((unit, kind), old, NO_PRODUCER, self._suffix(forward, unit))

    def _suffix(self, half: Half, unit: int | None) -> str:
        """What tells the names of an added unit from those of its template."""
        middle = half.count // 2
        return f"~{unit - middle}" if unit is not None and middle < unit <= middle + self.added else ""

    def _new(self, key: Key, old: int, producer: int, suffix: str) -> int:
        self.number[key] = len(self.values)
        self.like.append(old)
        value = self.old.values[old]
        self.values.append(replace(value, producer=producer, label=value.label + suffix))
        return len(self.values) - 1

    def _operator(self, half: Half, old: int, unit: int | None) -> None:
        operator, suffix = self.old.operators[old], self._suffix(half, unit)
        own, producer = half.unit(old), len(self.operators)

        def meant(value: int) -> int:
            owner, kind = self.keys[value]
            if owner is None:
                return self.number[None, value]
            if unit is None or own is None:
                new = owner + (self.added if half.is_near_output(old) else 0)
            else:
                new = unit + owner - own
            if (new, kind) not in self.number:
                raise GraphoptError(NOT_ALIKE)
            return self.number[new, kind]

        def made(value: int) -> int:
            key = (unit, self.keys[value][1]) if unit is not None else (None, value)
            return self._new(key, value, producer, suffix)

        self.templates.append(old)
        self.operators.append(
            replace(
                operator,
                name=operator.name + suffix,
                reads=tuple(meant(v) for v in operator.reads),
                reusable=tuple(meant(v) for v in operator.reusable),
                writes=tuple(made(v) for v in operator.writes),
                state=None if operator.state is None else made(operator.state),
            )
        )

    def _dataflow(self) -> Dataflow:
        gradients, outputs = (
            set(self.old.gradients),
            tuple(self.number[None, v] for v in self.old.outputs),
        )
        static = sum(v.nbytes for v in self.values if v.producer == NO_PRODUCER)
        return replace(
            self.old,
            operators=tuple(self.operators),
            values=tuple(self.values),
            value_of={},
            late=frozenset(o.name for o in self.operators if o.backward),
            outputs=outputs,
            gradients=tuple(i for i, old in enumerate(self.like) if old in gradients),
            static_bytes=static + _elsewhere(self.old) + self.added * self.more_static,
        )


def _keys(flow: Dataflow, halves: tuple[Half, Half]) -> dict[int, Key]:
    """For every value its unit and its place there: by its producer, or by its first reader."""
    found: dict[int, Key] = {}
    readers: dict[int, list[tuple[int | None, Any]]] = {}
    forward = halves[0]
    for index, operator in enumerate(flow.operators):
        half = halves[0] if index < forward.stop else halves[1]
        unit = half.unit(index)
        place = None if unit is None else (half.reverse, index - half.begin(unit))
        states = () if operator.state is None else (operator.state,)
        for position, value in enumerate((*operator.writes, *states)):
            found[value] = (None, value) if unit is None else (unit, (place, "makes", position))
        for position, value in enumerate(operator.reads if half is forward else ()):
            readers.setdefault(value, []).append((unit, (place, "reads", position)))
    for value, fact in enumerate(flow.values):
        if fact.producer == NO_PRODUCER:
            known = readers.get(value, [(None, value)])
            units = {unit for unit, _ in known}
            found[value] = known[0] if len(units) == 1 and None not in units else (None, value)
    return found


def _halves(shallow: Dataflow, deep: Dataflow) -> tuple[Half, Half]:
    """The units of the forward and of the backward."""
    before, after = _signatures(shallow), _signatures(deep)
    middle, deep_middle = len(shallow.forward), len(deep.forward)
    forward = half_of(before[:middle], after[:deep_middle], 0, False)
    backward = half_of(before[middle:], after[deep_middle:], middle, True)
    return forward, backward


def half_of(shallow: list[Any], deep: list[Any], start: int, reverse: bool) -> Half:
    """The units of one half, which begins at `start`, from signatures of two depths.

    GraphoptError where less than three repeat.
    """
    length = len(deep) - len(shallow)
    prefix = _common(shallow, deep)
    suffix = _common(shallow[::-1], deep[::-1])
    first = len(shallow) - suffix
    count = (prefix - first) // length if length > 0 else 0
    if count < LEAST_UNITS:
        raise GraphoptError(f"{NOT_ALIKE}: {max(count, 0)} repeat where {LEAST_UNITS} are needed")
    return Half(start, start + len(shallow), start + first, length, count, reverse)


def _common(a: list[Any], b: list[Any]) -> int:
    """How many items the beginnings of two lists share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _signatures(flow: Dataflow) -> list[Any]:
    """What an operator is like, whichever values it works on."""
    sizes = flow.sizes
    return [
        (
            tuple(sizes[v] for v in o.writes),
            tuple((sizes[v], flow.values[v].producer == NO_PRODUCER) for v in o.reads),
            tuple(o.reads.index(v) for v in o.reusable),
            *(o.workspace_bytes, o.flops, o.anchored, o.recomputable, o.state is None),
        )
        for o in flow.operators
    ]


def _canonical(flow: Dataflow) -> Any:
    """`flow` with its values numbered as they first appear: what two equal flows agree in."""
    number: dict[int, int] = {}

    def of(values: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(number.setdefault(v, len(number)) for v in values)

    operators = [
        (of(o.reads), of(o.writes), of(o.reusable), o.state is None, s, o.backward)
        for o, s in zip(flow.operators, _signatures(flow), strict=True)
    ]
    ends = of(flow.outputs), sorted(of(flow.gradients))
    return operators, ends, flow.static_bytes


def _elsewhere(flow: Dataflow) -> int:
    """Static bytes that are no value of the flow."""
    return flow.static_bytes - sum(v.nbytes for v in flow.values if v.producer == NO_PRODUCER)
