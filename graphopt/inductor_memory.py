"""Memory under Inductor: what its own schedule holds, and fusions undone where they do not fit.

Inductor decides late what becomes a tensor and what stays inside a kernel, so the peak is read from
its schedule. A fused kernel holds the operands and results of all its parts at once, also of parts that
the plan has far apart; where that raises the peak above the limit, the kernel is taken apart again.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch._inductor import memory
from torch._inductor.codegen.cpp import OuterLoopFusedSchedulerNode
from torch._inductor.ir import FixedLayout, MultiOutput, NonOwningLayout
from torch._inductor.scheduler import BaseSchedulerNode, FusedSchedulerNode, SchedulerNode
from torch._inductor.virtualized import V
from torch.utils._ordered_set import OrderedSet

Nodes = list[BaseSchedulerNode]
Lives = Mapping[str, memory.BufferInfo]  # by the buffer's name


@dataclass(frozen=True)
class Half:
    """The forward or the backward on its way through Inductor: what its peak depends on.

    `room_bytes` is what it may hold beside parameters and inputs, None for any amount. `scratch_bytes`
    are what library kernels hold while they run, by the name of their node. `returned` are the inputs
    that it returns, in the places of its results (None for others); where Inductor returns a copy in
    another layout, it is noted in `copies`, bytes by name, and counts in the half that is given it.
    Of what is saved, `owners` have the views: by name the saved tensor that has all of their storage,
    None where an input of the forward has it.
    """

    room_bytes: int | None
    scratch_bytes: Mapping[str, int]
    returned: Sequence[str | None]
    owners: Mapping[str, str | None]
    copies: dict[str, int]
    note_peak: Callable[[int], None]

    def fitted(self, nodes: Nodes) -> Nodes:
        """The fused nodes of Inductor's scheduler (its `_post_fusion_custom_pass`), within the room.

        Kernels are taken apart as far as that helps. The peak is noted: bytes of what this half is given
        to free, makes and returns, without parameters and inputs.
        """
        schedule = _Schedule(nodes, self)
        while self.room_bytes is not None and schedule.peak_bytes > self.room_bytes:
            crowd = schedule.fused_at_peak()
            if not crowd:
                break
            parts = [p for n in schedule.nodes for p in (_parts(n) if n in crowd else [n])]
            schedule = _Schedule(_in_order(parts), self)
        self.note_peak(schedule.peak_bytes)
        self._note_copies()
        _call_each_alone(schedule.nodes)
        return schedule.nodes

    def _note_copies(self) -> None:
        for name, result in zip(self.returned, V.graph.graph_outputs, strict=True):
            if name is not None and result.get_name() not in V.graph.graph_inputs:
                self.copies[name] = _nbytes(result)


def _call_each_alone(nodes: Nodes) -> None:
    """Of C++ kernels in a row Inductor makes one call, which holds what all of them need."""
    for scheduler, device in {(n.scheduler, n.get_device()) for n in nodes}:
        if device is not None:
            backend: Any = scheduler.get_backend(device)
            backend.ready_to_flush = lambda: True


class _Schedule:
    """Scheduler nodes in the order they will run, and the bytes that are live beside each."""

    def __init__(self, nodes: Nodes, half: Half) -> None:
        self.nodes = nodes
        buffers = _buffers(nodes, half)
        self.held = [b for b in buffers if not _stays_inside(b, nodes)]
        leaving = {b.buffer.get_name() for b in self.held}
        over = {n: o for n, o in _written_over(nodes, buffers).items() if {n, o} <= leaving}
        change = [0] * (len(nodes) + 1)
        for held in self.held:
            if held.buffer.get_name() not in over:
                change[held.start_step] += held.size_alloc
            if held.end_step >= 0 and held.buffer.get_name() not in over.values():
                change[held.end_step + 1] -= held.size_free
        live = accumulate(change[:-1])
        self.live = [b + _scratch(n, half.scratch_bytes) for b, n in zip(live, nodes, strict=True)]

    @property
    def peak_bytes(self) -> int:
        return max(self.live, default=0)

    def fused_at_peak(self) -> set[BaseSchedulerNode]:
        """The fused kernel that runs at the peak; else those that make or await what is live there."""
        at = self.live.index(self.peak_bytes)
        if _is_group(self.nodes[at]):
            return {self.nodes[at]}
        steps = {
            step
            for held in self.held
            if held.start_step <= at and (held.end_step < 0 or at <= held.end_step)
            for step in (held.start_step, held.end_step)
        }
        return {self.nodes[s] for s in steps if s >= 0 and _is_group(self.nodes[s])}


def _buffers(nodes: Nodes, half: Half) -> list[memory.BufferInfo]:
    """Bytes and life of every buffer."""
    ends = {read.name: step for step, n in enumerate(nodes) for read in n.read_writes.reads}
    copied = [
        memory.BufferInfo(memory.FreeableInputBuffer(name), nbytes, nbytes, 0, ends.get(name, 0))
        for name, nbytes in half.copies.items()
        if name in V.graph.graph_inputs
    ]
    fixed = {name for name, owner in half.owners.items() if owner is None}
    given = memory.get_freeable_input_buf(nodes, OrderedSet(V.graph.graph_inputs) - fixed)
    if nodes:
        scheduler = nodes[0].scheduler
        memory.assign_memory_planning_info_for_scheduler_buffers(nodes, scheduler.name_to_buf)
    for name, buffer in given.items():  # Inductor counts a broadcast operand as often as it is read
        buffer.mpi_buffer.size_free = _nbytes(V.graph.graph_inputs[name])
    outputs = OrderedSet(V.graph.get_output_names())
    made = memory.compute_memory_timeline(nodes, given, outputs)[0]
    lives = {b.buffer.get_name(): b for b in made}
    _count_repeated_once(lives)
    _count_views_with(half.owners, lives)
    _count_parts_as_wholes(lives)
    return [*made, *copied]


def _count_views_with(owners: Mapping[str, str | None], lives: Lives) -> None:
    """A saved view has no memory of its own; what owns it stays as long as either is read."""
    for owner in dict.fromkeys(owner for owner in owners.values() if owner is not None):
        names = (owner, *(name for name, other in owners.items() if other == owner))
        group = [lives[name] for name in names if name in lives]
        for life in group[1:]:
            group[0].end_step = _later_end(group[0], life)
            life.size_alloc = life.size_free = 0


def _later_end(one: memory.BufferInfo, other: memory.BufferInfo) -> int:
    """The last step of two lives, -1 where one of them stays."""
    ends = one.end_step, other.end_step
    return -1 if min(ends) < 0 else max(ends)


def _count_repeated_once(lives: Lives) -> None:
    """What repeats along a dimension is stored once; Inductor counts as many elements as it shows."""
    for life in lives.values():
        node: Any = getattr(life.buffer, "node", None)
        if node is None or type(node.layout) is not FixedLayout or not life.size_free:
            continue
        shown = _nbytes(node)
        repeated = max(0, shown - int(node.layout.storage_size()) * int(node.get_dtype().itemsize))
        life.size_free -= repeated
        parent: Any = node.inputs[0] if isinstance(node, MultiOutput) else node
        lives[parent.get_name()].size_alloc -= repeated


def _count_parts_as_wholes(lives: Lives) -> None:
    """What is written into its place in a concatenation has no memory of its own.

    The whole is there from its first part on, and as long as one of them is read.
    """
    for life in lives.values():
        whole = _whole_of(life, lives)
        if whole is not life:
            life.size_alloc = life.size_free = 0
            whole.start_step = min(whole.start_step, life.start_step)
            whole.end_step = _later_end(whole, life)


def _whole_of(life: memory.BufferInfo, lives: Lives) -> memory.BufferInfo:
    layout = getattr(getattr(life.buffer, "node", None), "layout", None)
    if not isinstance(layout, NonOwningLayout):
        return life
    whole = lives.get(layout.view.get_name())
    return life if whole is None else _whole_of(whole, lives)


def _stays_inside(buffer: memory.BufferInfo, nodes: Nodes) -> bool:
    """True for what never leaves the fused kernel that makes it."""
    made_here = buffer.buffer.get_name() not in V.graph.graph_inputs
    fused = isinstance(nodes[buffer.start_step], FusedSchedulerNode)
    return made_here and fused and buffer.start_step == buffer.end_step


def _nbytes(tensor: Any) -> int:
    return int(tensor.get_numel()) * int(tensor.get_dtype().itemsize)


def _written_over(nodes: Nodes, buffers: Iterable[memory.BufferInfo]) -> dict[str, str]:
    """For each buffer that a generated kernel writes over an operand that dies there: that operand."""
    lives = {b.buffer.get_name(): b for b in buffers}
    found: dict[str, str] = {}
    for step, node in enumerate(nodes):
        taken: set[str] = set()
        if isinstance(node, OuterLoopFusedSchedulerNode):  # keeps these in a buffer per thread
            taken |= {
                n for n, life in lives.items() if life.start_step == step and _stays_inside(life, nodes)
            }
        for member in () if node.is_extern() else node.get_nodes():
            for buffer in member.get_outputs():
                size = lives[buffer.get_name()].size_alloc
                for name in dict.fromkeys(read.name for read in member.read_writes.reads):
                    operand, life = _operand(member, name), lives.get(name)
                    dies = operand and life and life.end_step == step and life.size_free == size > 0
                    if dies and name not in taken and _may_replace(operand, buffer, member, node):
                        taken.add(name)
                        found[buffer.get_name()] = name
                        break
    return found


def _operand(node: BaseSchedulerNode, name: str) -> Any:
    """The buffer of this name that a generated kernel may write over, if there is one."""
    return node.scheduler.name_to_donated_buffer.get(name) or node.scheduler.name_to_buf.get(name)


def _may_replace(old: Any, new: Any, reader: BaseSchedulerNode, kernel: BaseSchedulerNode) -> bool:
    """True where Inductor writes `new` over `old` when `reader`, a part of `kernel`, makes it."""
    group = kernel.get_nodes()
    users = [u for u in old.users if u.node in group]
    reads = {r for m in group for r in m.read_writes.reads_and_writes() if r.name == old.get_name()}
    return (
        any(u.node is reader and u.can_inplace for u in users)
        and all(u.node is reader or u.node.get_name() in reader.ancestors for u in users)
        and len(reads) == 1
        and old.node.get_dtype() == new.node.get_dtype()
    )


def _scratch(node: BaseSchedulerNode, scratch_bytes: Mapping[str, int]) -> int:
    """Bytes that a library kernel holds while it runs; generated kernels hold nothing."""
    if not node.is_extern() or node.node is None:
        return 0
    return max((scratch_bytes.get(origin.name, 0) for origin in node.node.get_origins()), default=0)


def _is_group(node: BaseSchedulerNode) -> bool:
    """True for a kernel of several generated loops; what surrounds a template cannot be taken apart."""
    if not isinstance(node, FusedSchedulerNode) or node.is_foreach():
        return False
    return all(isinstance(m, SchedulerNode) and not m.is_template() for m in node.get_nodes())


def _parts(group: Any) -> Nodes:
    """The loops of a group, still together where the plan has them side by side.

    Of a group that is all side by side, every loop alone.
    """
    outer = isinstance(group, OuterLoopFusedSchedulerNode)
    loops = sorted(group.get_outer_nodes() if outer else group.get_nodes(), key=lambda n: n.min_order)
    runs: list[list[Any]] = []
    for loop in loops:
        if runs and loop.min_order == runs[-1][-1].max_order + 1:
            runs[-1].append(loop)
        else:
            runs.append([loop])
    if len(runs) == 1:
        return loops
    kind: Any = OuterLoopFusedSchedulerNode if outer else FusedSchedulerNode
    depth = (group.outer_loop_fusion_depth,) if outer else ()
    return [r[0] if len(r) == 1 else kind(group.scheduler, r, *depth) for r in runs]


def _in_order(nodes: Sequence[BaseSchedulerNode]) -> Nodes:
    """`nodes` as near to the plan's order as what they need from each other allows."""
    scheduler = nodes[0].scheduler
    scheduler.name_to_fused_node.update(_names(nodes))
    return scheduler.topological_sort_schedule(sorted(nodes, key=lambda n: n.min_order))


def _names(nodes: Iterable[BaseSchedulerNode]) -> dict[str, BaseSchedulerNode]:
    return {name: n for n in nodes for name in (n.get_name(), *(m.get_name() for m in n.get_nodes()))}
