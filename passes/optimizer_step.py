"""One step of an offloaded optimizer, and where its state is."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from graphopt.cost_models.optimizer_tasks import (
    BACK,
    DONE,
    FETCH,
    HOST,
    MOVE,
    PUT,
    RESIDENT,
    SEND,
    UPDATE,
    WORK,
    Step,
)
from graphopt.passes.host_memory import Host, Transfer, Work
from graphopt.passes.layer_file import PAGE
from graphopt.passes.optimizer_layout import Layout, Piece, Trained
from graphopt.passes.optimizer_plan import OffloadOptimizerPlan
from graphopt.passes.optimizer_rules import Rule, Update, in_chunks
from graphopt.passes.transfer_thread import Request

Group = dict[str, Any]

_NEEDS = {UPDATE: FETCH, DONE: PUT, BACK: WORK, MOVE: BACK}  # what is waited for
_TAKES, _GIVES = (FETCH, BACK), (DONE, MOVE)  # memory
_WINDOW = 32  # tasks among which the next is looked for
_LOOK_S = 0.05  # after so long a wait all are looked at again, whether or not one is done


class StateStore:
    """The state of all subgroups, each in its record: of host memory, or of the device where it stays."""

    def __init__(
        self,
        plan: OffloadOptimizerPlan,
        records: Sequence[Layout],
        device: torch.device,
        host: Host,
    ) -> None:
        self.plan, self.records = plan, records
        self.begins: dict[int, int] = {}
        self.resident: dict[int, Tensor] = {}
        end = 0
        for number, (record, place) in enumerate(zip(records, plan.places, strict=True)):
            nbytes = record.subgroup.state_bytes
            if place == RESIDENT:
                self.resident[number] = torch.zeros(nbytes, dtype=torch.uint8, device=device)
            else:
                self.begins[number] = end
                end += -(-(record.host_bytes if place == HOST else nbytes) // PAGE) * PAGE
        self.memory, self.worker = host.memory(end, device), host.worker()

    def record(self, number: int) -> Tensor:
        """The bytes of a subgroup where they are, uint8[bytes]."""
        if number in self.resident:
            return self.resident[number]
        begin = self.begins[number]
        return self.memory.bytes[begin : begin + self.records[number].host_bytes]

    def tensors(self, parameter: int) -> Iterator[tuple[Piece, tuple[Tensor, ...]]]:
        """The pieces of a parameter, with their state where it is."""
        for number, record in enumerate(self.records):
            for piece in record.pieces:
                if piece.cut[0] == parameter:
                    memory = self.record(number)
                    yield piece, tuple(part.of(memory) for part in piece.states)

    def close(self) -> None:
        """Ends the threads."""
        self.worker.close()
        self.memory.close()


class UpdateStep:
    """One step: what the plan's order says, one after the other, on what has a gradient."""

    def __init__(
        self,
        store: StateStore,
        rule: Rule,
        parameters: Sequence[Trained],
        groups: Sequence[Group],
        counts: Sequence[int],
        gradients: Mapping[int, Tensor],
    ) -> None:
        self.store, self.rule, self.parameters = store, rule, parameters
        self.groups, self.counts, self.gradients = groups, counts, gradients
        plan, device = store.plan, parameters[0].tensor.device
        self.device = device
        self.used: dict[int, Tensor] = {}
        self.under_way: dict[tuple[str, int], Transfer | Work] = {}
        self.latest: dict[bool, Transfer] = {}  # in either direction, the one to the device under True
        self.bell = threading.Event()  # something that was under way is done
        on_device = any(place != HOST for place in plan.places)
        self.scratch = _bytes(plan.scratch_bytes if on_device else 0, device)
        host_bytes = plan.scratch_bytes if device.type == "cuda" else plan.host_scratch_bytes
        self.host_scratch = _bytes(host_bytes if HOST in plan.places else 0, torch.device("cpu"))
        self.active = [
            [piece for piece in record.pieces if piece.cut[0] in gradients] for record in store.records
        ]

    def run(self) -> None:
        """All that the plan says."""
        pending = [(kind, n) for kind, n in self.store.plan.order if self.active[n]]
        actions: dict[str, Callable[[int], None]] = {
            FETCH: self.fetch,
            UPDATE: self.update,
            PUT: self.put,
            DONE: self.done,
            SEND: self.send,
            WORK: self.work,
            BACK: self.back,
            MOVE: self.move,
        }
        while pending:
            self.bell.clear()
            at = self.next_of(pending)
            if at < 0:
                self.bell.wait(_LOOK_S)
                continue
            kind, number = pending.pop(at)
            actions[kind](number)
            begun = self.under_way.get((kind, number))
            if isinstance(begun, Request):
                begun.bell = self.bell

    def next_of(self, pending: Sequence[Step]) -> int:
        """Where the first is of those that can be done without standing still, or -1.

        What takes memory stays behind all that takes or gives back memory before it, so that there is
        never more than planned. A transfer goes before others only where its channel is idle.
        """
        passed: set[int] = set()
        is_memory_due = False
        for at, (kind, number) in enumerate(pending[:_WINDOW]):
            is_free = number not in passed and not (kind in _TAKES and is_memory_due)
            if is_free and self.is_ready(kind, number) and (at == 0 or self.is_idle(kind)):
                return at
            passed.add(number)
            is_memory_due |= kind in _TAKES or kind in _GIVES
        return -1

    def is_ready(self, kind: str, number: int) -> bool:
        """Whether what the task needs is there, or only has to be before it on a stream."""
        needed = self.under_way.get((_NEEDS.get(kind, ""), number))
        return needed is None or needed.is_ready

    def is_idle(self, kind: str) -> bool:
        """Whether nothing is under way on the channel of a transfer."""
        last = self.latest.get(kind in _TAKES)
        return kind not in (FETCH, BACK, PUT, SEND) or last is None or last.is_ready

    def abandon(self) -> None:
        """Until nothing uses what is here any more, and the gradients."""
        for transfer in self.under_way.values():
            with suppress(BaseException):
                transfer.wait() if isinstance(transfer, Work) else transfer.synchronize()

    def fetch(self, number: int) -> None:
        """Start to bring the state of a subgroup here."""
        self.used[number] = _bytes(self.nbytes(number), self.device)
        parts = [(self.used[number], self.store.begins[number])]
        self.under_way[FETCH, number] = self.latest[True] = self.store.memory.fetch(parts)

    def update(self, number: int) -> None:
        """Update a subgroup here."""
        if number in self.used:
            self.under_way.pop((FETCH, number)).wait()
        memory = self.used[number] if number in self.used else self.store.resident[number]
        for piece in self.active[number]:
            value, gradient = self.of_device(piece)
            tensors = [value, gradient, *(part.of(memory) for part in piece.states)]
            self.change(self.rule.update, piece, tensors, self.scratch)

    def put(self, number: int) -> None:
        """Start to bring the state of a subgroup back."""
        parts = [(self.used[number], self.store.begins[number])]
        self.under_way[PUT, number] = self.latest[False] = self.store.memory.put(parts)

    def done(self, number: int) -> None:
        """Wait for that; the state goes."""
        self.under_way.pop((PUT, number)).wait()
        del self.used[number]

    def send(self, number: int) -> None:
        """Start to bring what the host needs for an update there."""
        begin, parts = self.store.begins[number], []
        for piece in self.active[number]:
            value, gradient = self.of_device(piece)
            parts.append((gradient, begin + piece.gradient.offset))
            if self.rule.needs_value(self.group(piece)):
                parts.append((value, begin + piece.value.offset))
        self.under_way[SEND, number] = self.latest[False] = self.store.memory.put(parts)

    def work(self, number: int) -> None:
        """Ask the host for an update, when that is there."""
        sent, memory = self.under_way.pop((SEND, number)), self.store.record(number)

        def run() -> None:
            sent.synchronize()  # type: ignore[union-attr]
            self.store.worker.throttle.begin(time.perf_counter())
            for piece in self.active[number]:
                parts = (piece.value, piece.gradient, *piece.states)
                tensors = [part.of(memory) for part in parts]
                self.change(self.rule.direct, piece, tensors, self.host_scratch)
                self.store.worker.throttle.take(piece.cut[2] - piece.cut[1])

        self.under_way[WORK, number] = self.store.worker.ask(run)

    def back(self, number: int) -> None:
        """When the host is done, start to bring back what the parameters are moved by."""
        self.under_way.pop((WORK, number)).wait()
        subgroup = self.store.records[number].subgroup
        self.used[number] = _bytes(subgroup.parameter_bytes, self.device)
        parts = [(self.used[number], self.store.begins[number] + subgroup.state_bytes)]
        self.under_way[BACK, number] = self.latest[True] = self.store.memory.fetch(parts)

    def move(self, number: int) -> None:
        """Move the parameters, when it is there."""
        self.under_way.pop((BACK, number)).wait()
        landing = self.used.pop(number)
        for piece in self.active[number]:
            part = replace(piece.gradient, offset=piece.gradient.offset - self.nbytes(number))
            self.rule.move(self.group(piece), self.of_device(piece)[0], part.of(landing))

    def nbytes(self, number: int) -> int:
        """Of the state of a subgroup."""
        return self.store.records[number].subgroup.state_bytes

    def group(self, piece: Piece) -> Group:
        """The options of a piece."""
        return self.groups[self.parameters[piece.cut[0]].group]

    def of_device(self, piece: Piece) -> tuple[Tensor, Tensor]:
        """A piece of a parameter, and of its gradient."""
        number, begin, end = piece.cut
        one = self.parameters[number]
        return one.piece(one.tensor, begin, end), one.piece(self.gradients[number], begin, end)

    def change(self, update: Update, piece: Piece, tensors: Sequence[Tensor], scratch: Tensor) -> None:
        """Update a piece: value, gradient and state."""
        group, count = self.group(piece), self.counts[piece.cut[0]]
        for (value, gradient, *states), spare in in_chunks(scratch, tensors):
            update(group, count, value, gradient, states, spare)


def _bytes(nbytes: int, device: torch.device) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=device)
