"""The peak of a step as a formula of batch, sequence length and hidden size, for the plan at hand.

Which values are alive while an operator runs depends on the plan, not on sizes. So the bytes alive are a
polynomial at each position of the step, and the peak is the maximum of these: exact, and short, since
nearly all of them are below others wherever one looks. A formula is solved for the largest batch or
sequence that fits by evaluating it; nothing runs.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from graphopt.cost_models.devices import Device
from graphopt.cost_models.memory import Dataflow
from graphopt.cost_models.polynomials import Sizes, Terms, Whole, largest
from graphopt.cost_models.symbolic import NOTHING, SymbolicFlow
from graphopt.cost_models.training_state import ALONE, TrainingSetup
from graphopt.errors import GraphoptError
from graphopt.passes.chain_solver import Choice
from graphopt.passes.checkpoint import CheckpointPlan, choice_of
from graphopt.passes.checkpoint_choice import everything, step_of


@dataclass(frozen=True)
class Piece:
    """One of the polynomials that can be the peak: coefficients of the bytes, and where it stands.

    `operator` is the one that runs then, in the "forward", the "backward" or the optimizer's "update".
    """

    coefficients: tuple[int, ...]
    operator: str
    half: str


@dataclass(frozen=True)
class PeakFormula:
    """The bytes of the step at its peak: the largest of `pieces`, over `scale`, rounded up.

    It holds for sizes within `ranges` (of each variable of `terms`), ends included.
    """

    terms: Terms
    ranges: tuple[tuple[int, int], ...]
    pieces: tuple[Piece, ...]
    scale: int = 1

    @cached_property
    def expression(self) -> Any:
        """The peak as a sympy expression of positive whole symbols."""
        import sympy

        parts = [self.terms.expression(p.coefficients) / self.scale for p in self.pieces]
        found = parts[0] if len(parts) == 1 else sympy.Max(*parts, evaluate=False)
        return found if self.scale == 1 else sympy.ceiling(found, evaluate=False)

    @cached_property
    def compiled(self) -> Callable[..., int]:
        """A function of the sizes, some microseconds a call, exact for Python integers."""
        if self.terms.units:
            terms, counted = self.terms, replace(self, terms=replace(self.terms, units=())).compiled
            return lambda *sizes: counted(*terms.counts(sizes))
        import sympy

        symbols = self.terms.symbols()
        parts = [sympy.horner(self.terms.expression(p.coefficients)) for p in self.pieces]
        largest_of: Callable[..., tuple[int, ...]] = sympy.lambdify(symbols, tuple(parts), modules=[{}])
        scale = self.scale
        if scale == 1:
            return lambda *sizes: max(largest_of(*sizes))
        return lambda *sizes: -(-max(largest_of(*sizes)) // scale)

    def at(self, *sizes: int) -> int:
        """The peak in bytes; GraphoptError for sizes outside of the ranges, or no multiples of a unit."""
        for name, size, (low, high) in zip(self.terms.variables, sizes, self.ranges, strict=True):
            if not low <= size <= high:
                raise GraphoptError(f"{name}={size} is outside of the {low} to {high} of this formula")
        return self.compiled(*sizes)

    def binding(self, *sizes: int) -> Piece:
        """The piece that is the peak at some sizes."""
        powers = self.terms.at(sizes)
        return max(self.pieces, key=lambda p: int(powers.dot(np.array(p.coefficients, dtype=object))))

    def largest(self, variable: str, memory_bytes: int, others: Sizes = ()) -> int | None:
        """The largest size of `variable` with which the peak is within `memory_bytes`.

        `others` are the sizes of the other variables. None where even the smallest of the range does not
        fit; the end of the range where that fits.
        """
        place = self.terms.variables.index(variable)
        low, high, unit = self._counted(place)

        def fits(count: int) -> bool:
            return self.at(*others[:place], count * unit, *others[place:]) <= memory_bytes

        self._check_rising(place, others)
        if not fits(low):
            return None
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low * unit

    def _counted(self, place: int) -> tuple[int, int, int]:
        """The range of a variable in units, and its unit."""
        (low, high), unit = self.ranges[place], self.terms.unit(place)
        return low // unit, high // unit, unit

    def _check_rising(self, place: int, others: Sizes) -> None:
        """Raise GraphoptError where the peak might fall as the size rises: a bisection needs that not."""
        low, _, _ = self._counted(place)
        for piece in self.pieces:
            found = self._along(piece, place, others)
            rises = all(
                sum(c * math.comb(i, k) * low ** (i - k) for i, c in enumerate(found) if i >= k) >= 0
                for k in range(1, len(found))
            )
            if not rises:
                name = self.terms.variables[place]
                raise GraphoptError(f"the peak at {piece.operator} falls as {name} rises")

    def _along(self, piece: Piece, place: int, others: Sizes) -> list[int]:
        """Coefficients of `piece` in the powers of one variable, where the others have these sizes.

        They are those of how many units the variable has.
        """
        found = [0] * (self.terms.degrees[place] + 1)
        known = self.terms.counts((*others[:place], 0, *others[place:]))
        counts = known[:place] + known[place + 1 :]
        for exponents, c in zip(self.terms.exponents, piece.coefficients, strict=True):
            rest = exponents[:place] + exponents[place + 1 :]
            found[exponents[place]] += c * math.prod(map(pow, counts, rest))
        return found

    def piecewise(self, variable: str, others: Sizes = ()) -> Any:
        """The peak along one variable as a sympy Piecewise: which polynomial holds up to which size."""
        import sympy

        place = self.terms.variables.index(variable)
        symbol, (low, high, unit) = self.terms.symbols()[place], self._counted(place)
        lines = [self._along(p, place, others) for p in self.pieces]
        parts, start = [], low
        while start <= high:
            line = max(lines, key=lambda c: (_value(c, start), _value(c, start + 1)))
            ends = (_first_above([a - b for a, b in zip(o, line, strict=True)], start) for o in lines)
            end = min((e - 1 for e in ends if e is not None and e <= high), default=high)
            value = sympy.Add(*(c * (symbol / unit) ** i for i, c in enumerate(line))) / self.scale
            parts.append((value if self.scale == 1 else sympy.ceiling(value), symbol <= end * unit))
            start = end + 1
        return sympy.Piecewise(*parts)

    def __str__(self) -> str:
        found = [(self.terms.expression(p.coefficients), p) for p in self.pieces]
        lines = [f"  {expression}   ({p.half}, {p.operator})" for expression, p in found]
        units = zip(self.terms.variables, self.terms.units, strict=False)
        multiples = "".join(f", {name} a multiple of {unit}" for name, unit in units if unit > 1)
        over = "" if self.scale == 1 else f", over {self.scale}"
        head = f"bytes at the peak{multiples}, the largest of{over}"
        return "\n".join([f"{head}:", *lines])


def _value(coefficients: Sequence[int], size: int) -> int:
    return sum(c * size**i for i, c in enumerate(coefficients))


def _first_above(difference: Sequence[int], start: int) -> int | None:
    """The first whole size after `start` at which a polynomial of degree 2 at most is positive."""
    constant, slope, square = (*difference, 0, 0)[:3]
    sizes = {start + 1}
    if square:
        inside = slope * slope - 4 * square * constant
        roots = (math.isqrt(inside), -math.isqrt(inside)) if inside >= 0 else ()
        sizes |= {(root - slope) // (2 * square) + i for root in roots for i in range(-1, 3)}
    elif slope:
        sizes.add(-constant // slope + 1)
    return min((s for s in sizes if s > start and _value(difference, s) > 0), default=None)


@dataclass(frozen=True)
class SymbolicStep:
    """A step under one plan: bytes alive at each position as polynomials, by what they are.

    `activations` has all that the step makes but gradients, `gradients` the bytes of these, each
    int[term, position]; `names` are the operator and the half of the step. Static bytes are those of the
    parameters, in the states of `flow`, and `inputs`, int[term]. `runs` is how often each operator runs.
    """

    flow: SymbolicFlow
    activations: Whole
    gradients: Whole
    names: tuple[tuple[str, str], ...]
    inputs: Whole
    runs: tuple[int, ...]

    @staticmethod
    def of(flow: SymbolicFlow, plan: CheckpointPlan | None = None) -> "SymbolicStep":
        """The step that keeps everything, or what `plan` keeps, at every size."""
        structure = flow.structure
        choice = everything(structure) if plan is None else choice_of(structure, plan)
        return SymbolicStep.under(flow, choice)

    @staticmethod
    def under(flow: SymbolicFlow, choice: Choice) -> "SymbolicStep":
        """The step under a choice made on the flow's structure."""
        plain = step_of(flow.structure, choice)
        halves = (("forward", plain.forward), ("backward", plain.backward))
        places = [(s.operator, half) for half, timeline in halves for s in timeline.steps]
        operators = flow.structure.operators
        nothing = [0] * len(places)
        parts = zip(flow.flows, flow.numbers, strict=True)
        lines = [_during(part, choice) if any(numbers) else nothing for part, numbers in parts]
        total = np.array(lines, dtype=object)
        lines = [
            _during(_only_gradients(flow, part), choice) if numbers[list(flow.trained)].any() else nothing
            for part, numbers in zip(flow.flows, flow.numbers, strict=True)
        ]
        gradients = np.array(lines, dtype=object)
        total = total - gradients
        runs = Counter(operator for operator, _ in places)
        return SymbolicStep(
            flow,
            total,
            gradients,
            tuple((operators[i].name, half) for i, half in places),
            flow.static - flow.bytes_of(sorted(flow.sample.parameters)),
            tuple(runs[i] for i in range(len(operators))),
        )

    def formula(self, setup: TrainingSetup = ALONE) -> PeakFormula:
        """The peak on one device, with what `setup` adds, shards and divides."""
        columns, names = self._columns(setup)
        chosen = largest(self.flow.terms, columns, self.flow.ranges)
        pieces = tuple(Piece(tuple(int(c) for c in columns[:, i]), *names[i]) for i in chosen)
        return PeakFormula(self.flow.terms, self.flow.ranges, pieces, setup.tensor)

    def _columns(self, setup: TrainingSetup) -> tuple[Whole, list[tuple[str, str]]]:
        """All bytes at each position, times the tensor degree: int[term, position], and its name.

        Where there is an optimizer, its updates are the last positions.
        """
        scale, states = setup.tensor, self.flow.states
        if self.flow.has_width and setup.divides:
            raise GraphoptError(
                "where the hidden size is a variable, weights are those of one device: what ZeRO, tensor "
                "parallelism and pipelines leave of them is rounded up, no polynomial"
            )
        columns = self.activations + scale * self.inputs[:, None]
        for index, (state, row) in enumerate(zip(states, self.gradients, strict=True)):
            fixed = setup.held_bytes(state)
            live = [fixed + setup.gradient_bytes(state, int(g)) for g in row]
            columns[index] = columns[index] + scale * np.array(live, dtype=object)
        if setup.optimizer == "none":
            return columns, list(self.names)
        updates = self._updates(setup)
        names = [*self.names, *(("optimizer", "update") for _ in updates.T)]
        return np.column_stack([columns, updates]), names

    def _updates(self, setup: TrainingSetup) -> Whole:
        """All bytes while the optimizer works, times the tensor degree: int[term, parameter].

        One column for each parameter's size: which one is the largest depends on the width.
        """
        flow = self.flow
        sizes = dict.fromkeys(tuple(int(x) for x in flow.numbers[:, v]) for v in flow.trained)
        columns = []
        for each in sizes or [(0,) * len(flow.states)]:
            parts = []
            for state, nbytes in zip(flow.states, each, strict=True):
                whole = setup.gradient_bytes(state, state.gradient_bytes)  # now all are there
                update = setup.update_bytes(replace(state, largest_bytes=nbytes))
                parts.append(setup.held_bytes(state) + whole + update)
            columns.append(setup.tensor * (self.inputs + np.array(parts, dtype=object)))
        return np.column_stack(columns)

    def parts(self, sizes: Sizes, setup: TrainingSetup = ALONE) -> dict[str, int]:
        """What the bytes at the peak are: weights, gradients, optimizer, inputs, and activations."""
        columns, _ = self._columns(setup)
        powers, state = self.flow.terms.at(sizes), self.flow.state_at(sizes)
        values = powers.dot(columns)
        place = int(np.argmax(values))
        is_update = place >= len(self.names)
        live = state.gradient_bytes if is_update else int(powers.dot(self.gradients[:, place]))
        optimizer = setup.optimizer_bytes(state)
        found = {
            "weights": setup.held_bytes(state) - optimizer,
            "gradients": setup.gradient_bytes(state, live),
            "optimizer": optimizer + (setup.update_bytes(state) if is_update else 0),
            "inputs": int(powers.dot(self.inputs)),
        }
        rest = -(-int(values[place]) // setup.tensor) - sum(found.values())
        return found | {"activations": rest}

    def seconds(self, sizes: Sizes, device: Device) -> float:
        """The time of the step on one device by the roofline, recomputation included."""
        loads = self.flow.loads(sizes)
        times = (n * x.seconds(device) for n, x in zip(self.runs, loads, strict=True) if x is not NOTHING)
        return sum(times)


def _during(flow: Dataflow, choice: Choice) -> list[int]:
    """Bytes alive at each position of the forward, then of the backward."""
    step = step_of(flow, choice)
    return [*step.forward.during, *step.backward.during]


def _only_gradients(flow: SymbolicFlow, part: Dataflow) -> Dataflow:
    """One of the flow's parts, in which nothing but returned gradients takes memory."""
    trained = set(flow.trained)
    values = tuple(v if i in trained else replace(v, nbytes=0) for i, v in enumerate(part.values))
    operators = tuple(replace(o, workspace_bytes=0) for o in part.operators)
    return replace(part, values=values, operators=operators, static_bytes=0)
