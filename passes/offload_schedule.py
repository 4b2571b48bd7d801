"""When offloaded values go and come back: one channel for transfers beside one for computing.

A write begins when its value is made, and is waited for after the last use in the forward: where it is
done, or earlier where the memory is needed. A read begins as late as it can and still be done in time,
later where there is no memory for it before. The channel is first in, first out.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from graphopt.cost_models.link_costs import Line
from graphopt.cost_models.memory import Dataflow, Operator, Value
from graphopt.cost_models.schedule import Step, Timeline, simulate

HANDLE_BYTES = 16  # of the handle of a write and of a place, while they are there


@dataclass(frozen=True)
class Candidate:
    """A value that may be offloaded: its node, its index, and the operators (indices) that matter.

    `made` makes it, `last` is the last of the forward that has to do with it, `first` the first of the
    backward.
    """

    name: str
    value: int
    nbytes: int
    made: int
    last: int
    first: int


@dataclass(frozen=True)
class Transfers:
    """Where each write is awaited (after which operator), each read begun (before which), and the time.

    `seconds` are the step's with its waits.
    """

    awaited: Mapping[int, int]
    begun: Mapping[int, int]
    seconds: float


@dataclass(frozen=True)
class OffloadProblem:
    """A program in its order of execution, what of it can be offloaded, and what transfers take."""

    flow: Dataflow
    saved: frozenset[int]
    candidates: tuple[Candidate, ...]
    write: Line
    read: Line

    @cached_property
    def begins(self) -> NDArray[np.float64]:
        """When each operator begins (and the last one ends) where nothing is waited for: seconds."""
        return np.concatenate([[0.0], np.cumsum([o.seconds for o in self.flow.operators])])

    def idle_seconds(self, candidate: Candidate) -> float:
        """From the last use in the forward to the first in the backward."""
        return float(self.begins[candidate.first] - self.begins[candidate.last + 1])

    def transfer_seconds(self, offloaded: Collection[Candidate]) -> float:
        """What the channel has to do."""
        return sum(self.write.seconds(c.nbytes) + self.read.seconds(c.nbytes) for c in offloaded)

    def heights(self, offloaded: Collection[Candidate]) -> NDArray[np.int64]:
        """Bytes alive while each operator runs, static ones excluded.

        An offloaded value is there to its last use in the forward, and from its first in the backward.
        """
        flow, again = self._with_copies(offloaded)
        gone = {c.value for c in offloaded}
        kept = self.saved - gone
        size = len(flow.operators) - len(offloaded)
        half = flow.forward.stop
        forward = [Step(i, flow.operators[i].writes) for i in range(half)]
        backward = []
        fetches: dict[int, list[int]] = {}
        for candidate in offloaded:
            fetches.setdefault(candidate.first, []).append(flow.values[again[candidate.value]].producer)
        for index in range(half, size):
            backward += [Step(f, flow.operators[f].writes) for f in fetches.get(index, ())]
            backward.append(Step(index, flow.operators[index].writes))
        found = np.zeros(size, dtype=np.int64)
        _note(found, simulate(flow, forward, (), kept | frozenset(flow.outputs)))
        _note(found, simulate(flow, backward, kept, flow.gradients))
        return found

    def peak_bytes(self, offloaded: Sequence[Candidate], transfers: Transfers) -> int:
        """The most bytes alive at once, static ones excluded, handles included."""
        heights = self.heights(offloaded)
        for candidate in offloaded:
            heights[candidate.last + 1 : transfers.awaited[candidate.value] + 1] += candidate.nbytes
            heights[transfers.begun[candidate.value] : candidate.first] += candidate.nbytes
        return int(heights.max(initial=0)) + HANDLE_BYTES * len(offloaded)

    def _with_copies(self, offloaded: Collection[Candidate]) -> tuple[Dataflow, Mapping[int, int]]:
        """The dataflow in which the backward reads fetched copies, and the copy of each value."""
        flow = self.flow
        operators, values = list(flow.operators), list(flow.values)
        again: dict[int, int] = {}
        for candidate in offloaded:
            again[candidate.value] = len(values)
            values.append(Value(candidate.nbytes, len(operators), f"{candidate.name}_fetched"))
            operators.append(_fetch(candidate.name, len(values) - 1))
        for index in {i for c in offloaded for i in self._readers[c.value]}:
            operator = operators[index]
            if operator.backward:
                reads = tuple(again.get(v, v) for v in operator.reads)
                reusable = tuple(again.get(v, v) for v in operator.reusable)
            else:  # the wait reads the value after it
                reads = operator.reads
                reusable = tuple(v for v in operator.reusable if v not in again)
            operators[index] = replace(operator, reads=reads, reusable=reusable)
        return replace(flow, operators=tuple(operators), values=tuple(values)), again

    @cached_property
    def _readers(self) -> Mapping[int, Sequence[int]]:
        found: dict[int, list[int]] = {}
        for index, operator in enumerate(self.flow.operators):
            for value in operator.reads:
                found.setdefault(value, []).append(index)
        return found

    def scheduled(self, offloaded: Sequence[Candidate], room: int) -> Transfers | None:
        """The transfers in `room` bytes, static ones excluded; None where that is not enough."""
        heights = self.heights(offloaded)
        if heights.max(initial=0) > room:
            return None
        awaited, clock = self._writes(offloaded, heights, room)
        begun, seconds = self._reads(offloaded, heights, room, clock)
        return Transfers(awaited, begun, seconds)

    def _writes(
        self, offloaded: Sequence[Candidate], heights: NDArray[np.int64], room: int
    ) -> tuple[dict[int, int], float]:
        """After which operator each write is awaited, and when the forward ends."""
        made = _by(offloaded, [c.made for c in offloaded])
        last = _by(offloaded, [c.last for c in offloaded])
        clock = channel = 0.0
        done: dict[int, float] = {}
        pending: list[Candidate] = []
        awaited: dict[int, int] = {}
        half = self.flow.forward.stop
        for index in range(half + 1):
            pending.sort(key=lambda c: done[c.value])
            held = sum(c.nbytes for c in pending)
            while pending and (
                done[pending[0].value] <= clock or index == half or heights[index] + held > room
            ):
                candidate = pending.pop(0)
                clock = max(clock, done[candidate.value])
                awaited[candidate.value] = index - 1
                held -= candidate.nbytes
            if index == half:
                break
            clock += self.flow.operators[index].seconds
            for candidate in made.get(index, ()):
                channel = max(clock, channel) + self.write.seconds(candidate.nbytes)
                done[candidate.value] = channel
            pending += last.get(index, ())
        return awaited, clock

    def _reads(
        self, offloaded: Sequence[Candidate], heights: NDArray[np.int64], room: int, clock: float
    ) -> tuple[dict[int, int], float]:
        """Before which operator each read is begun, and when the backward ends."""
        wished = self._latest(offloaded)
        waiting = sorted(offloaded, key=lambda c: (c.first, c.value))
        heights, channel = heights.copy(), clock
        done: dict[int, float] = {}
        begun: dict[int, int] = {}
        for index in range(self.flow.forward.stop, len(self.flow.operators)):
            while waiting and wished[waiting[0].value] <= index:
                candidate = waiting[0]
                span = heights[index : candidate.first]
                if span.size and span.max() + candidate.nbytes > room:
                    break
                span += candidate.nbytes
                channel = max(clock, channel) + self.read.seconds(candidate.nbytes)
                done[candidate.value], begun[candidate.value] = channel, index
                waiting.pop(0)
            needed = [done[c.value] for c in offloaded if c.first == index]
            clock = max([clock, *needed]) + self.flow.operators[index].seconds
        return begun, clock

    def _latest(self, offloaded: Sequence[Candidate]) -> dict[int, int]:
        """The last operators before which reads can begin and be done in time."""
        found: dict[int, int] = {}
        free = float("inf")
        for candidate in sorted(offloaded, key=lambda c: (c.first, c.value), reverse=True):
            free = min(free, float(self.begins[candidate.first])) - self.read.seconds(candidate.nbytes)
            place = int(np.searchsorted(self.begins, free, side="right")) - 1
            found[candidate.value] = min(max(place, self.flow.forward.stop), candidate.first)
        return found


def _by(offloaded: Sequence[Candidate], places: Sequence[int]) -> dict[int, list[Candidate]]:
    found: dict[int, list[Candidate]] = {}
    for candidate, place in zip(offloaded, places, strict=True):
        found.setdefault(place, []).append(candidate)
    return found


def _note(heights: NDArray[np.int64], timeline: Timeline) -> None:
    for step, height in zip(timeline.steps, timeline.during, strict=True):
        if step.operator < len(heights):
            heights[step.operator] = height


def _fetch(name: str, value: int) -> Operator:
    return Operator(f"{name}_fetched", (), (value,), (), 0.0, 0, 0, True, True, False, None)
