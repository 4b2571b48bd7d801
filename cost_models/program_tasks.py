"""The task graphs of a program: of its forward, and of the backward behind it.

A functional collective and its `wait_tensor` become a transfer on the channel of its process group, and
a task of no time that waits for it; copies between host and device that are started and waited for become
the same, and so do values that are offloaded to a file and fetched back. Random operators stay in their
order; those that are replayed from a saved state move like others. What may have an effect that is not
known, such as a custom operator, is a barrier: all that came before stays before, all that came after
stays after.
"""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx
from torch._prims.rng_prims import run_and_save_rng_state, run_with_rng_state

from graphopt import ops
from graphopt.cost_models.memory import reusable_operands
from graphopt.cost_models.task_graph import COMPUTE, DEVICE_TO_HOST, HOST_TO_DEVICE, Task, TaskGraph
from graphopt.program import Program, Role, Storage, leaves, storages_of
from graphopt.split import late_nodes, saved_nodes

_COPIES = {"device_to_host": DEVICE_TO_HOST, "host_to_device": HOST_TO_DEVICE}


@dataclass(frozen=True)
class NodeSeconds:
    """What the nodes of a program take, by name: seconds, and scratch in bytes.

    `contention` is that of `TaskGraph`, by channel.
    """

    seconds: Mapping[str, float]
    scratch_bytes: Mapping[str, int] = field(default_factory=dict)
    contention: Mapping[str, float] = field(default_factory=dict)


def channel_of(node: fx.Node) -> str:
    """Where `node` runs: `compute`, `group NAME`, or one way between host and device."""
    transfer = ops.transfer_of(node)
    if transfer is None or not _is_waited_for(node):
        return COMPUTE
    if transfer.group is None:
        return _COPIES[transfer.kind]
    group = transfer.group
    name = getattr(group, "group_name", None) or getattr(group, "name", group)
    return f"group {name}"


def task_graphs(program: Program, costs: NodeSeconds) -> tuple[TaskGraph, ...]:
    """The graph of the forward and, where there is one, of the backward; a task is called as its node.

    What a node unpacks from a transfer's results is a part of the transfer: see `unpacked`.
    """
    storages = storages_of(program.graph)
    outside = {n for n in program.graph.nodes if n.op in ("get_attr", "placeholder") or n.op == "output"}
    late = late_nodes(program)
    halves = [[n for n in program.operators() if (n in late) is side] for side in (False, True)]
    saved = _storages_of(saved_nodes(program) if halves[1] else (), storages, outside)
    kept = _storages_of(program.forward_outputs, storages, outside) | saved
    returned = _storages_of(program.gradients, storages, outside)
    static = sum(
        leaf.nbytes
        for n in outside
        if n.op != "output" and program.roles.get(n.name) is not Role.TANGENT
        for leaf in leaves(n)
    )
    graphs = [_Half(costs, storages, {}, kept, static).build(halves[0])]
    if halves[1]:
        graphs.append(_Half(costs, storages, saved, returned, static).build(halves[1]))
    return tuple(graphs)


def unpacked(node: fx.Node) -> list[fx.Node]:
    """The nodes that take single tensors out of the results of the transfer that `node` starts."""
    return [user for user in node.users if user.target is operator.getitem]


def _is_waited_for(start: fx.Node) -> bool:
    """True where the results are read by waits only, and each of them by one at least."""
    items = unpacked(start)
    results = items or [start]
    readers = [user for result in results for user in result.users]
    alone = not items or len(items) == len(start.users)
    return alone and bool(readers) and all(r.users for r in results) and all(map(ops.is_wait, readers))


def _is_movable(node: fx.Node) -> bool:
    """True for what computes nothing but its results, operators on a saved random state among them."""
    return node.target in (run_and_save_rng_state, run_with_rng_state) or ops.is_movable(node)


def _storages_of(
    outputs: Iterable[object], storages: Mapping[fx.Node, tuple[Storage, ...]], outside: set[fx.Node]
) -> dict[Storage, None]:
    found = (s for o in outputs if isinstance(o, fx.Node) for s in storages[o])
    return {s: None for s in found if s[0] not in outside}


class _Half:
    """Makes the tasks of the forward or of the backward."""

    def __init__(
        self,
        costs: NodeSeconds,
        storages: Mapping[fx.Node, tuple[Storage, ...]],
        alive: Mapping[Storage, None],
        kept: Mapping[Storage, None],
        static_bytes: int,
    ) -> None:
        self.costs, self.storages, self.static_bytes = costs, storages, static_bytes
        self.kept = kept
        self.buffers = {storage: index for index, storage in enumerate(alive)}
        self.alive = tuple(range(len(alive)))
        self.tasks: list[Task] = []
        self.task_of: dict[fx.Node, int] = {}
        self.readers: dict[int, list[int]] = {}
        self.barrier: int | None = None
        self.random: int | None = None

    def build(self, nodes: Sequence[fx.Node]) -> TaskGraph:
        for node in nodes:
            if node in self.task_of:  # unpacked from a transfer
                continue
            channel = channel_of(node)
            self._add(node, channel)
            if channel != COMPUTE:
                self.task_of.update(dict.fromkeys(unpacked(node), self.task_of[node]))
        return TaskGraph(
            tuple(self.tasks),
            tuple(leaves(node)[index].nbytes for node, index in self.buffers),
            self.alive,
            tuple(self.buffers[s] for s in self.kept if s in self.buffers),
            self.static_bytes,
            dict(self.costs.contention),
        )

    def _add(self, node: fx.Node, channel: str) -> None:
        number = len(self.tasks)
        made = [node, *unpacked(node)] if channel != COMPUTE else [node]
        own = dict.fromkeys(s for n in made for s in self.storages[n] if s[0] in made)
        new = [storage for storage in own if storage not in self.buffers]
        self.buffers.update(zip(new, range(len(self.buffers), len(self.buffers) + len(new)), strict=True))
        reads = self._buffers_behind(node.all_input_nodes)
        after = {self.task_of[n] for n in node.all_input_nodes if n in self.task_of}
        if ops.is_wait(node):
            reads |= self._buffers_behind(ops.operands_in_flight(node))
            after |= {task for buffer in self._freed_by(node) for task in self.readers.get(buffer, ())}
        after |= self._order(node, channel)
        for buffer in reads:
            self.readers.setdefault(buffer, []).append(number)
        self.task_of[node] = number
        self.tasks.append(
            Task(
                node.name,
                channel,
                self.costs.seconds.get(node.name, 0.0),
                tuple(sorted(after)),
                tuple(sorted(reads)),
                tuple(self.buffers[storage] for storage in new),
                self.costs.scratch_bytes.get(node.name, 0),
                self._over(node) if channel == COMPUTE else (),
            )
        )

    def _over(self, node: fx.Node) -> tuple[int, ...]:
        """The buffers that `node` may write over; autograd holds those that are there before."""
        found = []
        for operand in reusable_operands(node):
            storage = self.storages[operand][0]
            others = (n for n in node.all_input_nodes if n is not operand)
            own = all(storage not in self.storages[n] for n in others)
            buffer = self.buffers.get(storage)
            if own and buffer is not None and buffer not in self.alive:
                found.append(buffer)
        return tuple(found)

    def _buffers_behind(self, nodes: Iterable[fx.Node]) -> set[int]:
        found = (self.buffers.get(s) for n in nodes for s in self.storages[n])
        return {buffer for buffer in found if buffer is not None}

    def _freed_by(self, wait: fx.Node) -> set[int]:
        """Buffers that a wait frees when it is over: nobody may read them later than now."""
        return self._buffers_behind(wait.all_input_nodes[1:])

    def _order(self, node: fx.Node, channel: str) -> set[int]:
        """Tasks that `node` stays behind without reading them."""
        number = len(self.tasks)
        after = set() if self.barrier is None else {self.barrier}
        if channel == COMPUTE and not ops.is_wait(node) and not _is_movable(node):
            after |= set(range(self.barrier or 0, number))
            self.barrier = number
        if node.target is run_and_save_rng_state or ops.is_random(node):
            after |= set() if self.random is None else {self.random}
            self.random = number
        return after
