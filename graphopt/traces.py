"""The predicted step for other viewers: a Chrome trace, and a memory snapshot as torch writes it.

The trace has a process for each captured graph, with lanes for forward, backward, what is recomputed, and
each kind of transfer, and the bytes alive by category. The snapshot has the allocations and releases of
the step in their order, each with the line of the model that makes the tensor, in the form of
`torch.cuda.memory._snapshot()` (torch/cuda/_memory_viz.py reads it, and https://pytorch.org/memory_viz).
"""

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from graphopt.cost_models.memory import NO_PRODUCER
from graphopt.cost_models.overlap_run import Run, run_order
from graphopt.cost_models.program_tasks import NodeSeconds, task_graphs
from graphopt.cost_models.run_timeline import Reading, Span, chrome_trace
from graphopt.cost_models.schedule import Timeline
from graphopt.cost_models.task_graph import COMPUTE
from graphopt.errors import GraphoptError
from graphopt.graph_report import Side, costs_of
from graphopt.origin import Origin, origin_of
from graphopt.passes.checkpoint_choice import states_needed, step_of
from graphopt.passes.overlap_plan import OverlapPlan
from graphopt.report import Report
from graphopt.runtime import GraphRecord
from graphopt.timeline import CATEGORIES

_ALIGNED = 512  # bytes: where CUDA's allocator lets blocks begin; addresses are made up, sizes are not
_BASE = 1 << 40


def trace_of(report: Report) -> str:
    """JSON for `chrome://tracing` or Perfetto; GraphoptError for a report without a graph."""
    if not report.records:
        raise GraphoptError(f"{report.name} has no graph yet: the first call captures the model")
    spans: dict[str, Sequence[Span]] = {}
    counters: dict[str, Sequence[Reading]] = {}
    for number, record in enumerate(report.records, start=1):
        name = report.name if len(report.records) == 1 else f"{report.name}, graph {number}"
        runs = report.mesh.runs if report.mesh is not None else _runs(record)
        side = Side.after(record)
        spans[name] = tuple(_spans(runs, side.again))
        counters[name] = tuple(_readings(runs, side))
    return chrome_trace(spans, counters)


def _runs(record: GraphRecord) -> list[Run]:
    """Forward and backward of the planned graph, transfers as long as a plan of theirs says."""
    costs = costs_of(record, record.after)
    seconds = {name: cost.seconds for name, cost in costs.nodes.items()}
    for step in record.steps:
        if isinstance(step.plan, OverlapPlan):
            seconds |= {row[0]: row[3] for row in step.plan.transfers}
    graphs = task_graphs(record.after, NodeSeconds(seconds, costs.workspace_bytes))
    return [run_order(graph, range(len(graph.tasks))) for graph in graphs]


def _begins(runs: Sequence[Run]) -> list[float]:
    found = [0.0]
    for run in runs[:-1]:
        found.append(found[-1] + run.seconds)
    return found


def _spans(runs: Sequence[Run], again: frozenset[str]) -> Iterator[Span]:
    """Every task that takes time, on the lane of what it is for."""
    for half, begin, run in zip(("forward", "backward"), _begins(runs), runs, strict=False):
        for index in run.order:
            task = run.graph.tasks[index]
            lane = task.channel
            if lane == COMPUTE:
                lane = "recomputed" if task.name in again else half
            if run.end[index] > run.begin[index]:
                yield task.name, lane, begin + float(run.begin[index]), begin + float(run.end[index])


def _readings(runs: Sequence[Run], side: Side) -> Iterator[Reading]:
    """Bytes by category when each operator begins."""
    at: dict[str, float] = {}
    for begin, run in zip(_begins(runs), runs, strict=True):
        at |= {t.name: begin + float(s) for t, s in zip(run.graph.tasks, run.begin, strict=True)}
    timeline = side.timeline
    for step, operator in enumerate(timeline.operators.tolist()):
        moment = at.get(side.flow.operators[operator].name)
        if moment is not None:
            yield moment, dict(zip(CATEGORIES, timeline.alive_bytes[:, step].tolist(), strict=True))


# --- the snapshot ------------------------------------------------------------------------------


def snapshot_of(report: Report) -> bytes:
    """A pickle that `torch.cuda._memory_viz` reads: the graphs one behind the other, one device each."""
    if not report.records:
        raise GraphoptError(f"{report.name} has no graph yet: the first call captures the model")
    devices = [_Allocations(Side.after(record)) for record in report.records]
    for number, device in enumerate(devices):
        device.run()
        device.segment["device"] = number
    found = {
        "segments": [device.segment for device in devices],
        "device_traces": [device.events for device in devices],
        "allocator_settings": {},
        "external_annotations": [],
    }
    return pickle.dumps(found)


@dataclass(frozen=True)
class _Block:
    """A tensor in memory; `size` bytes at `address`."""

    address: int
    size: int
    frames: tuple[dict[str, Any], ...]


class _Allocations:
    """Walks both halves of a step and notes what the allocator would see."""

    def __init__(self, side: Side) -> None:
        self.side, self.flow = side, side.flow
        self.events: list[dict[str, Any]] = []
        self.blocks: dict[int, _Block] = {}
        self.free: dict[int, list[int]] = {}  # addresses by size
        self.top = _BASE
        self.time = 0
        self.segment: dict[str, Any] = {}

    def run(self) -> None:
        """Fill `events` and `segment`."""
        flow, choice = self.flow, self.side.choice
        keep = choice.keep | states_needed(flow, choice)
        step = step_of(flow, choice)
        known = 0
        for value, fact in enumerate(flow.values):
            if fact.producer == NO_PRODUCER:
                known += fact.nbytes
                self._make(value, fact.label)
        if flow.static_bytes > known:
            self._alloc(flow.static_bytes - known, "held outside of this graph")
        static = set(self.blocks)
        self._half(step.forward, keep | frozenset(flow.outputs))
        for value in set(self.blocks) - static - set(keep):  # outputs that the caller drops
            self._release(value)
        self._half(step.backward, frozenset(flow.gradients))
        self._end()

    def _half(self, timeline: Timeline, end: frozenset[int]) -> None:
        """One half, in the order of its simulation."""
        needed = set(end)
        unread: list[list[int]] = []
        for step in reversed(timeline.steps):
            unread.append([v for v in step.makes if v not in needed])
            needed.difference_update(step.makes)
            needed.update(self.flow.operators[step.operator].reads)
        for index, (step, idle) in enumerate(zip(timeline.steps, unread[::-1], strict=True)):
            operator, over = self.flow.operators[step.operator], timeline.reused[index]
            label = operator.name
            if over is not None:
                if over in self.blocks:
                    self.blocks[step.makes[0]] = self.blocks.pop(over)
            else:
                for value in operator.writes:
                    if value not in step.makes:
                        self._make(-1 - value, label)
                for value in step.makes:
                    self._make(value, label)
            if operator.workspace_bytes:
                self._drop(self._alloc(operator.workspace_bytes, f"scratch of {label}"))
            for value in operator.writes:
                self._release(-1 - value)
            for value in (*timeline.last_read[index], *idle):
                self._release(value)

    def _make(self, value: int, label: str) -> None:
        """Allocate a value, or, by a negative number, a second one of it that nobody wants."""
        nbytes = self.flow.values[value if value >= 0 else -1 - value].nbytes
        if nbytes:
            self.blocks[value] = self._alloc(nbytes, label)

    def _alloc(self, nbytes: int, label: str) -> _Block:
        places = self.free.get(nbytes)
        address = places.pop() if places else self.top
        if address == self.top:
            self.top += max(_ALIGNED, -(-nbytes // _ALIGNED) * _ALIGNED)
        block = _Block(address, nbytes, self._frames(label))
        self._event("alloc", block)
        return block

    def _release(self, value: int) -> None:
        block = self.blocks.pop(value, None)
        if block is not None:
            self._drop(block)

    def _drop(self, block: _Block) -> None:
        self._event("free_requested", block)
        self._event("free_completed", block)
        self.free.setdefault(block.size, []).append(block.address)

    def _event(self, action: str, block: _Block) -> None:
        self.time += 1
        place = {"addr": block.address, "size": block.size, "stream": 0, "time_us": self.time}
        self.events.append({"action": action, **place, "frames": list(block.frames)})

    def _frames(self, label: str) -> tuple[dict[str, Any], ...]:
        """The line of the model behind a tensor, below the operator that makes it."""
        node = self.side.nodes.get(label)
        origin = Origin("", "", "") if node is None else origin_of(node)
        file, _, line = origin.place.rpartition(":")
        found = [{"filename": "", "line": 0, "name": label}]
        if file:
            found.append({"filename": file, "line": int(line), "name": origin.module or origin.code})
        return tuple(found)

    def _end(self) -> None:
        """The one segment, with the blocks that are left and the gaps between them."""
        blocks: list[dict[str, Any]] = []
        at = _BASE
        for block in sorted(self.blocks.values(), key=lambda b: b.address):
            if block.address > at:
                blocks.append(_gap(at, block.address - at))
            state = {"address": block.address, "size": block.size, "requested_size": block.size}
            blocks.append({**state, "state": "active_allocated", "frames": list(block.frames)})
            at = block.address + block.size
        if self.top > at:
            blocks.append(_gap(at, self.top - at))
        held = sum(b.size for b in self.blocks.values())
        sizes = {"total_size": self.top - _BASE, "allocated_size": held, "active_size": held}
        self.segment = {
            "address": _BASE,
            **sizes,
            "requested_size": held,
            "stream": 0,
            "segment_type": "large",
            "frames": [],
            "blocks": blocks,
        }


def _gap(address: int, nbytes: int) -> dict[str, Any]:
    return {"address": address, "size": nbytes, "state": "inactive", "requested_size": 0, "frames": []}
