"""Where the bytes of a step are, instant by instant: a simulated choice, by category."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from graphopt.cost_models.memory import Dataflow
from graphopt.cost_models.schedule import Timeline
from graphopt.passes.chain_solver import Choice
from graphopt.passes.checkpoint_choice import states_needed, step_of

Lifetime = tuple[int, str, int, int]  # value, category, the first step it is alive in and the last
CATEGORIES = ("static", "kept", "recomputed", "gradients", "transients")


@dataclass(frozen=True, eq=False)
class MemoryTimeline:
    """Bytes alive while each step runs: those of the forward, then those of the backward.

    `alive_bytes` is int64[category, step] with a row for each of `CATEGORIES`: parameters, buffers
    and inputs are static; what the forward leaves for the backward is kept; the rest of the forward
    and of the backward, scratch included, is transient. `operators` is int64[step], indices into
    the dataflow's operators. `alive_at_peak` are the (value, category) pairs of the instant `peak`,
    without the static ones, largest first. `lifetimes` say when each value is alive, one that is made
    again more than once; what is static or scratch has none.
    """

    alive_bytes: NDArray[np.int64]
    operators: NDArray[np.int64]
    forward_steps: int
    alive_at_peak: tuple[tuple[int, str], ...]
    lifetimes: tuple[Lifetime, ...]

    @property
    def total_bytes(self) -> NDArray[np.int64]:
        """Bytes alive at each step, int64[step]."""
        total: NDArray[np.int64] = self.alive_bytes.sum(axis=0)
        return total

    @property
    def peak(self) -> int:
        """The step at which most bytes are alive."""
        return int(self.total_bytes.argmax())

    @property
    def peak_bytes(self) -> int:
        """The most bytes alive at once, static ones included."""
        return int(self.total_bytes.max())

    def sampled(self, points: int) -> NDArray[np.int64]:
        """The fullest step of each of `points` stretches of equal length, int64[<= points]."""
        total = self.total_bytes
        edges = np.linspace(0, len(total), min(points, len(total)) + 1).astype(np.int64)
        return np.array([a + total[a:b].argmax() for a, b in pairwise(edges)])


def memory_timeline(
    flow: Dataflow, choice: Choice, again: Collection[str] = frozenset()
) -> MemoryTimeline:
    """The bytes of the step under `choice`, by category.

    Forward operators that run in the backward make recomputed values, and so do the operators of
    the backward named in `again`: those of a program in which a choice was carried out already.
    """
    keep = choice.keep | states_needed(flow, choice)
    step = step_of(flow, choice)
    forward_is_peak = step.forward.peak_bytes >= step.backward.peak_bytes
    gradients = frozenset(flow.gradients)

    def in_forward(value: int) -> str:
        return "kept" if value in keep else "transients"

    def in_backward(value: int) -> str:
        maker = flow.operators[flow.values[value].producer]
        if value in keep:
            return "kept"
        if value in gradients:
            return "gradients"
        return "recomputed" if not maker.backward or maker.name in again else "transients"

    forward = _Walk(flow, step.forward, keep | frozenset(flow.outputs), in_forward)
    forward.run(frozenset(), forward_is_peak)
    backward = _Walk(flow, step.backward, gradients, in_backward)
    backward.run(keep, not forward_is_peak)
    rows = [*forward.rows, *backward.rows] or [(flow.static_bytes, 0, 0, 0, 0)]
    steps = (*step.forward.steps, *step.backward.steps)
    return MemoryTimeline(
        np.array(rows, dtype=np.int64).T,
        np.array([s.operator for s in steps], dtype=np.int64),
        len(forward.rows),
        forward.alive if forward_is_peak else backward.alive,
        _joined(forward.lifetimes, backward.lifetimes, len(forward.rows)),
    )


def _joined(
    forward: Sequence[Lifetime], backward: Sequence[Lifetime], steps: int
) -> tuple[Lifetime, ...]:
    """The lifetimes of both halves; what the forward, of `steps` steps, leaves the backward is one."""
    left = {value: begin for value, category, begin, last in forward if last == steps - 1 >= 0}
    found = [life for life in forward if life[3] < steps - 1 or life[1] != "kept"]
    for value, category, first, last in backward:
        begin = left.get(value) if category == "kept" and first == 0 else None
        found.append((value, category, first + steps if begin is None else begin, last + steps))
    return tuple(found)


class _Walk:
    """One half of the step, walked in the order of its simulation."""

    def __init__(
        self,
        flow: Dataflow,
        timeline: Timeline,
        end: Collection[int],
        category_of: Callable[[int], str],
    ) -> None:
        self.flow = flow
        self.timeline = timeline
        self.end = end
        self.category_of = category_of
        self.rows: list[tuple[int, ...]] = []
        self.alive: tuple[tuple[int, str], ...] = ()
        self.lifetimes: list[Lifetime] = []

    def run(self, start: Collection[int], holds_peak: bool) -> None:
        """Fill `rows` and `lifetimes`, and `alive` at the fullest step where this half `holds_peak`."""
        during = self.timeline.during
        peak = during.index(max(during)) if holds_peak and during else -1
        values, unread = self.flow.values, self._unread()
        alive = set(start)
        begun = dict.fromkeys(start, 0)
        live = dict.fromkeys(CATEGORIES, 0)
        live["static"] = self.flow.static_bytes
        for value in alive:
            live[self.category_of(value)] += values[value].nbytes
        for index, step in enumerate(self.timeline.steps):
            for value in step.makes:
                live[self.category_of(value)] += values[value].nbytes
            over = self.timeline.reused[index]
            now = dict(live)
            if over is not None:
                now[self.category_of(over)] -= values[over].nbytes
            now["transients"] += self._scratch_bytes(index)
            self.rows.append(tuple(now.values()))
            alive.update(step.makes)
            begun.update(dict.fromkeys(step.makes, index))
            if index == peak:
                self.alive = self._largest(alive - {over})
            for value in (*self.timeline.last_read[index], *unread[index]):
                live[self.category_of(value)] -= values[value].nbytes
                alive.discard(value)
                self._end(value, begun, index - (value == over))
        for value in sorted(begun):
            self._end(value, begun, len(self.rows) - 1)

    def _end(self, value: int, begun: dict[int, int], last: int) -> None:
        """Note that `value` was alive until the step `last`."""
        first = begun.pop(value, None)
        if first is not None and first <= last:
            self.lifetimes.append((value, self.category_of(value), first, last))

    def _scratch_bytes(self, index: int) -> int:
        """What the kernel of a step holds for itself, and results made again for nothing."""
        step = self.timeline.steps[index]
        operator = self.flow.operators[step.operator]
        spare = (
            [w for w in operator.writes if w not in step.makes]
            if self.timeline.reused[index] is None
            else []
        )
        return operator.workspace_bytes + sum(self.flow.values[v].nbytes for v in spare)

    def _unread(self) -> list[tuple[int, ...]]:
        """For each step, the values it makes that no later step reads."""
        needed = set(self.end)
        found = []
        for step in reversed(self.timeline.steps):
            found.append(tuple(v for v in step.makes if v not in needed))
            needed.difference_update(step.makes)
            needed.update(self.flow.operators[step.operator].reads)
        return found[::-1]

    def _largest(self, alive: Collection[int | None]) -> tuple[tuple[int, str], ...]:
        known = [v for v in alive if v is not None]
        known.sort(key=lambda v: (-self.flow.values[v].nbytes, v))
        return tuple((v, self.category_of(v)) for v in known)
