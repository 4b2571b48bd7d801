"""Costs of a step for every batch, sequence length and width: the numbers of a dataflow as polynomials.

The same model at two sizes is captured as the same operators on the same storages; only numbers differ
(a batch of one is an exception: copies become views there). So the step is captured at a few sizes,
exactly as it is for a run, which operators and storages there are is compared, and what differs is
interpolated. That is exact where all numbers are polynomials of the degrees that were assumed, and is
checked at further sizes, the largest of the range among them; where it is not so, it is an error.

What a simulation of memory adds up are these numbers, so that it is linear in them: it is run once for
each monomial, on the coefficients in place of the bytes (`SymbolicFlow.flows`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch

from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import Device
from graphopt.cost_models.memory import NO_PRODUCER, Dataflow
from graphopt.cost_models.nodes import Load, node_load, runs_kernel
from graphopt.cost_models.polynomials import NotPolynomialError, Sizes, Terms, Whole
from graphopt.cost_models.training_state import State
from graphopt.errors import GraphoptError
from graphopt.program import Program, Role

NOTHING = Load(0, 0, (), (), 0, torch.float32)


@dataclass(frozen=True)
class Sample:
    """One step as it was captured at some sizes. `parameters` are the values of parameters."""

    flow: Dataflow
    loads: tuple[Load, ...]
    parameters: frozenset[int]

    @staticmethod
    def of(program: Program, costs: Costs) -> "Sample":
        """The dataflow of `program` and what each of its operators asks of the device of `costs`."""
        flow = costs.dataflow(program)
        nodes = {n.name: n for n in program.graph.nodes}
        made = (nodes[o.name] for o in flow.operators)
        loads = tuple(node_load(n, costs.device) if runs_kernel(n) else NOTHING for n in made)
        own = (flow.value_of[i.name] for i in program.inputs if i.role is Role.PARAMETER)
        return Sample(flow, loads, frozenset(v for values in own for v in values))

    @cached_property
    def numbers(self) -> Whole:
        """All that depends on sizes: bytes of the values, scratch and FLOPs of the operators, what these
        read, write and work on, and the static bytes."""
        flow = self.flow
        scratch = [o.workspace_bytes for o in flow.operators]
        flops = [o.flops for o in flow.operators]
        traffic = [n for load in self.loads if load is not NOTHING for n in _traffic(load)]
        return np.array([*flow.sizes, *scratch, *flops, *traffic, flow.static_bytes], dtype=object)

    @cached_property
    def structure(self) -> tuple[Any, ...]:
        """All that must not depend on sizes."""
        flow = self.flow
        numberless = (replace(o, seconds=0.0, flops=0, workspace_bytes=0) for o in flow.operators)
        values = tuple((v.producer, v.label) for v in flow.values)
        bounds = tuple((*map(len, x.reads), -1, *map(len, x.elements)) for x in self.loads)
        return tuple(numberless), values, flow.outputs, flow.gradients, self.parameters, bounds


def _traffic(load: Load) -> Iterator[int]:
    """The numbers of `load` besides its FLOPs."""
    yield load.write_bytes
    for bounds in (*load.reads, *load.elements):
        yield from bounds


def _loaded(like: Load, flops: int, traffic: Iterator[int]) -> Load:
    """`like` with other numbers, which are taken from `traffic` in the order of `_traffic`."""
    if like is NOTHING:
        return like
    write = next(traffic)
    reads, elements = (
        tuple(tuple(next(traffic) for _ in bounds) for bounds in each)
        for each in (like.reads, like.elements)
    )
    return replace(like, flops=flops, write_bytes=write, reads=reads, elements=elements)


@dataclass(frozen=True)
class Columns:
    """Where the numbers of a `Sample` stand among all of them."""

    values: slice
    scratch: slice
    flops: slice
    traffic: slice
    traffic_counts: tuple[int, ...]

    @staticmethod
    def of(sample: Sample) -> "Columns":
        """Those of `sample`; the static bytes are last."""
        values, n = len(sample.flow.values), len(sample.flow.operators)
        counts = tuple(0 if x is NOTHING else sum(1 for _ in _traffic(x)) for x in sample.loads)
        ends = [values, values + n, values + 2 * n, values + 2 * n + sum(counts)]
        scratch, flops, traffic = (slice(a, b) for a, b in pairwise(ends))
        return Columns(slice(values), scratch, flops, traffic, counts)

    def of_operators(self, operators: Sequence[int]) -> list[int]:
        """The columns of scratch, FLOPs and traffic of some operators, in their order among all."""
        starts = list(accumulate(self.traffic_counts, initial=self.traffic.start))
        scratch = [self.scratch.start + i for i in operators]
        flops = [self.flops.start + i for i in operators]
        traffic = [c for i in operators for c in range(starts[i], starts[i + 1])]
        return [*scratch, *flops, *traffic]

    def named(self, sample: Sample, column: int) -> str:
        """What a number is, in words."""
        flow = sample.flow
        if column < self.values.stop:
            return f"the size of {flow.values[column].label}"
        if column < self.flops.start:
            return f"the scratch of {flow.operators[column - self.scratch.start].name}"
        if column < self.traffic.start:
            return f"the FLOPs of {flow.operators[column - self.flops.start].name}"
        return "what an operator reads or writes" if column < self.traffic.stop else "the static bytes"


@dataclass(frozen=True)
class SymbolicFlow:
    """A dataflow whose numbers are polynomials of `terms`, exact for sizes within `ranges`.

    `sample` is the step at the smallest sizes: operators, values, and which numbers there are; `numbers`
    has their coefficients, int[term, number]. `checked` are the sizes that it was compared at, none of
    which decided a coefficient. `unit_bytes` are those of the parameters of a layer, if it is known, and
    `itemsize` those of an element of a parameter.
    """

    terms: Terms
    ranges: tuple[tuple[int, int], ...]
    sample: Sample
    numbers: Whole
    checked: tuple[Sizes, ...]
    unit_bytes: int = 0
    itemsize: int = 4

    @cached_property
    def structure(self) -> Dataflow:
        """The dataflow at the smallest sizes."""
        return self.sample.flow

    @cached_property
    def columns(self) -> "Columns":
        """Which column of `numbers` is which."""
        return Columns.of(self.sample)

    @cached_property
    def flows(self) -> tuple[Dataflow, ...]:
        """One dataflow for each monomial: its coefficients in place of bytes and FLOPs."""
        return tuple(self._flow([int(x) for x in row], None) for row in self.numbers)

    def at(self, sizes: Sizes, device: Device) -> Dataflow:
        """The dataflow at some sizes, with seconds on `device`; no capture is needed.

        Raises GraphoptError for sizes outside of the ranges.
        """
        self.check(sizes)
        seconds = [x.seconds(device) if x is not NOTHING else 0.0 for x in self.loads(sizes)]
        return self._flow([int(x) for x in self.terms.at(sizes).dot(self.numbers)], seconds)

    def loads(self, sizes: Sizes) -> list[Load]:
        """What each operator asks of the device at some sizes."""
        return self._loads([int(x) for x in self.terms.at(sizes).dot(self.numbers)])

    def _loads(self, numbers: list[Any]) -> list[Load]:
        flops, traffic = numbers[self.columns.flops], iter(numbers[self.columns.traffic])
        return [_loaded(x, f, traffic) for x, f in zip(self.sample.loads, flops, strict=True)]

    def check(self, sizes: Sizes) -> None:
        """Raise GraphoptError where some size is outside of its range."""
        for name, size, (low, high) in zip(self.terms.variables, sizes, self.ranges, strict=True):
            if not low <= size <= high:
                raise GraphoptError(f"{name}={size} is outside of {low} to {high}")
        self.terms.counts(sizes)

    def _flow(self, numbers: list[int], seconds: Sequence[float] | None) -> Dataflow:
        flow, which = self.structure, self.columns
        facts = zip(flow.operators, numbers[which.flops], numbers[which.scratch], strict=True)
        sizes = zip(flow.values, numbers[which.values], strict=True)
        values = tuple(replace(v, nbytes=n) for v, n in sizes)
        times = [0.0] * len(flow.operators) if seconds is None else seconds
        operators = tuple(
            replace(o, seconds=t, flops=f, workspace_bytes=w)
            for t, (o, f, w) in zip(times, facts, strict=True)
        )
        return replace(flow, operators=operators, values=values, static_bytes=numbers[-1])

    def node_table(self) -> dict[str, dict[str, Any]]:
        """For each operator, sympy expressions of the bytes it makes, reads, writes, and its FLOPs."""
        import sympy

        expressions = [self.terms.expression(list(column)) for column in self.numbers.T]
        loads = self._loads(expressions)
        scratch = expressions[self.columns.scratch]
        return {
            o.name: {
                "made_bytes": sympy.Add(*(expressions[v] for v in o.writes)),
                "scratch_bytes": scratch[index],
                "flops": sympy.sympify(loads[index].flops),
                "read_bytes": sympy.Add(*(sympy.Min(*bounds) for bounds in loads[index].reads)),
                "write_bytes": sympy.sympify(loads[index].write_bytes),
            }
            for index, o in enumerate(self.structure.operators)
        }

    def bytes_of(self, values: Sequence[int]) -> Whole:
        """Coefficients of the bytes of some values together, int[term]."""
        found: Whole = self.numbers[:, list(values)].sum(axis=1)
        return found

    @cached_property
    def static(self) -> Whole:
        """Coefficients of the bytes that are there all through the step, int[term]."""
        found: Whole = self.numbers[:, -1]
        return found

    @property
    def constant(self) -> int:
        """Which of the terms is 1."""
        return self.terms.exponents.index((0,) * len(self.terms.variables))

    @cached_property
    def states(self) -> tuple[State, ...]:
        """For each monomial, coefficients of the bytes of the parameters and of their gradients.

        The number of tensors, and the largest unit that is sharded, are with the monomial 1. Where
        weights depend on no size, the others are nothing.
        """
        return tuple(self._state(row, index == self.constant) for index, row in enumerate(self.numbers))

    def state_at(self, sizes: Sizes) -> State:
        """Bytes of the parameters, of their gradients, and of the largest unit that is sharded."""
        return self._state(self.terms.at(sizes).dot(self.numbers), True)

    def _state(self, numbers: Whole, whole: bool) -> State:
        own = [int(numbers[v]) for v in self.trained]
        weights = [int(numbers[v]) for v in self.sample.parameters]
        tensors, unit = (len(own), self.unit_bytes or max(weights, default=0)) if whole else (0, 0)
        return State(sum(weights), sum(own), max(own, default=0), tensors, unit, self.itemsize)

    @cached_property
    def has_width(self) -> bool:
        """Whether the bytes of the parameters depend on a size."""
        parameters = self.numbers[:, sorted(self.sample.parameters)]
        return bool(np.delete(parameters, self.constant, axis=0).any())

    @cached_property
    def trained(self) -> tuple[int, ...]:
        """Values of gradients that the backward makes."""
        values = self.structure.values
        return tuple(v for v in self.structure.gradients if values[v].producer != NO_PRODUCER)


def symbolic_flow(
    capture: Callable[[Sizes], Sample],
    terms: Terms,
    values: Sequence[Sequence[int]],
    ranges: Sequence[tuple[int, int]],
    further: Sequence[Sizes],
) -> SymbolicFlow:
    """The step of `capture` for all sizes within `ranges`.

    `values` are sizes of each variable to decide the coefficients by, at least one more than its degree;
    the result is compared with the capture at all of `further`. Raises GraphoptError where operators
    differ between sizes, or a number is no polynomial of `terms`.
    """
    points = terms.grid(values)
    samples = [capture(p) for p in points]
    first = samples[0]
    for point, sample in zip(points, samples, strict=True):
        _compare_structure(terms, first, points[0], sample, point)
    numbers = terms.solve(points, np.stack([s.numbers for s in samples]))
    found = SymbolicFlow(terms, tuple(ranges), first, numbers, tuple(further))
    for point in further:
        sample = capture(point)
        _compare_structure(terms, first, points[0], sample, point)
        _compare_numbers(found, sample, point)
    return found


def _compare_structure(terms: Terms, first: Sample, at: Sizes, other: Sample, point: Sizes) -> None:
    if first.structure == other.structure:
        return
    pairs = zip(first.structure[0], other.structure[0], strict=False)
    unlike = next((a.name for a, b in pairs if a != b), "its end")
    where = f"from {unlike} on"
    raise GraphoptError(
        f"the step at {_named(terms, point)} is not the one at {_named(terms, at)}, {where}"
    )


def _compare_numbers(found: SymbolicFlow, sample: Sample, point: Sizes) -> None:
    predicted = found.terms.at(point).dot(found.numbers)
    wrong = np.flatnonzero(predicted != sample.numbers)
    if len(wrong):
        place = int(wrong[0])
        raise NotPolynomialError(
            f"{found.columns.named(sample, place)} is {sample.numbers[place]} at "
            f"{_named(found.terms, point)}; a "
            f"polynomial of degrees {found.terms.degrees} through other sizes says {predicted[place]}"
        )


def _named(terms: Terms, sizes: Sizes) -> str:
    return ", ".join(f"{name}={size}" for name, size in zip(terms.variables, sizes, strict=True))
