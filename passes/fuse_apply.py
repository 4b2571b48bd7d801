"""Regions of a program put in place of their nodes, each as one operator that runs a generated kernel."""

import heapq
from collections import Counter
from collections.abc import Sequence
from operator import getitem
from typing import Any

from torch import fx

from graphopt import ops
from graphopt.errors import PlanError
from graphopt.fused_ops import FUSED
from graphopt.passes.fuse_copies import made_by
from graphopt.passes.fuse_kernel import Kernel, kernel_of, results_of
from graphopt.passes.fuse_values import CannotFuse, is_transparent
from graphopt.passes.pack_saved import marked_late
from graphopt.passes.replay import RECOMPUTE_OF
from graphopt.program import LEAVES, Leaf, Program, storage_nbytes
from graphopt.split import late_nodes

_OF_ONE_NODE = ("val", "tensor_meta", LEAVES, RECOMPUTE_OF)


class _Unit:
    """What runs at one moment: a node, or the kernel of a region."""

    def __init__(self, nodes: tuple[fx.Node, ...], kernel: Kernel | None = None) -> None:
        self.nodes, self.kernel = nodes, kernel
        self.sources: set[_Unit] = set()
        self.readers: set[_Unit] = set()
        self.segment: int | None = None
        self.place = 0.0

    def __lt__(self, other: "_Unit") -> bool:
        return self.place < other.place


def fused_program(program: Program, regions: Sequence[Sequence[str]]) -> Program:
    """`program` with the nodes of each of `regions`, by their names, as one operator.

    A node of several regions is made by the first, and again by the others for themselves. PlanError
    names a node that is not there, is twice in a region, or cannot be in one, and a region that would
    need what is made from it.
    """
    late, every = late_nodes(program), _checked(program, regions)
    outputs = made_by(every)
    return with_kernels(program, [(n, _kernel(n, o, late)) for n, o in zip(every, outputs, strict=True)])


def with_kernels(program: Program, kernels: Sequence[tuple[Sequence[fx.Node], Kernel]]) -> Program:
    """`program` with nodes, in order, in the hands of their kernels; PlanError for a cycle."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    late = late_nodes(program)
    for unit in _in_order(_units(program, kernels)):
        if unit.kernel is not None:
            _insert(graph, unit.nodes, unit.kernel, env, unit.nodes[0] in late)
            continue
        (node,) = unit.nodes
        if is_transparent(node) and node.all_input_nodes[0] not in env:
            continue  # of a value that is no tensor any more
        env[node] = graph.node_copy(node, env.__getitem__)
        env[node].meta = dict(node.meta)
    for node in reversed(graph.nodes):
        if is_transparent(node) and not node.users:
            graph.erase_node(node)
    module = fx.GraphModule(program.module, graph)
    module.meta = dict(program.module.meta)
    return Program(module, program.num_forward_outputs, program.inputs, program.breaks)


def _checked(program: Program, regions: Sequence[Sequence[str]]) -> list[tuple[fx.Node, ...]]:
    """The nodes of each region, in the order of the program."""
    order = {n.name: i for i, n in enumerate(program.graph.nodes)}
    nodes = list(program.graph.nodes)
    for names in regions:
        for name, count in Counter(names).items():
            if name not in order:
                raise PlanError(f"{name!r} is no node of this program")
            if count > 1:
                raise PlanError(f"{name!r} is twice in a region")
    return [tuple(nodes[i] for i in sorted(order[name] for name in names)) for names in regions]


def _kernel(nodes: Sequence[fx.Node], outputs: Sequence[fx.Node], late: set[fx.Node]) -> Kernel:
    if len({n in late for n in nodes}) > 1:
        raise PlanError(f"the region of {nodes[0].name} and {nodes[-1].name} is of forward and backward")
    try:
        return kernel_of(nodes, outputs)
    except CannotFuse as reason:
        raise PlanError(f"the region of {nodes[0].name} is no kernel: {reason}") from reason


def _units(program: Program, kernels: Sequence[tuple[Sequence[fx.Node], Kernel]]) -> dict[fx.Node, _Unit]:
    """The unit of each node, with what it reads, its segment and the place where it would best run."""
    units: dict[fx.Node, _Unit] = {}
    for nodes, kernel in kernels:
        members = tuple(h for n in nodes for h in dict.fromkeys((n, *results_of(n))))
        unit = _Unit(tuple(nodes), kernel)
        for member in members:
            units.setdefault(member, unit)  # of a copy, the one that makes it for others
    for node in program.graph.nodes:
        units.setdefault(node, _Unit((node,)))
    segment, drawn = 0, None
    for place, node in enumerate(program.graph.nodes):
        unit = units[node]
        barrier = node.op == "call_function" and (ops.mutates(node.target) or not ops.is_movable(node))
        segment += barrier
        if unit.kernel is not None and unit.segment not in (None, segment):
            raise PlanError(f"the region of {node.name} would move over an operator that writes")
        unit.place, unit.segment = float(place), segment
        read = node.all_input_nodes if unit.kernel is None else unit.kernel.inputs
        unit.sources |= {units[n] for n in read}
        if node.op == "call_function" and ops.is_random(node):
            unit.sources |= {drawn} if drawn is not None else set()
            drawn = unit
        segment += barrier
    for unit in {*units.values()}:
        for source in unit.sources:
            source.readers.add(unit)
    for unit in {u for u in units.values() if u.kernel is not None}:
        unit.place = min([unit.place, *(r.place - 0.5 for r in unit.readers if r is not unit)])
    return units


def _in_order(units: dict[fx.Node, _Unit]) -> list[_Unit]:
    """Every unit after those that it reads, otherwise as they were; PlanError where that cannot be."""
    every = {*units.values()}
    waiting = {unit: len(unit.sources) for unit in every}
    found: list[_Unit] = []
    for segment in sorted({u.segment for u in every if u.segment is not None}):
        own = {u for u in every if u.segment == segment}
        ready = [u for u in own if not waiting[u]]
        heapq.heapify(ready)
        count = 0
        while ready:
            unit = heapq.heappop(ready)
            found.append(unit)
            count += 1
            for reader in unit.readers:
                waiting[reader] -= 1
                if not waiting[reader] and reader in own:
                    heapq.heappush(ready, reader)
        if count < len(own):
            stuck = next(u for u in sorted(own) if waiting[u] and u.kernel is not None)
            raise PlanError(
                f"the region of {stuck.nodes[0].name} and {stuck.nodes[-1].name} would make a cycle: "
                "it reads what is made from its own results"
            )
    return found


def _insert(
    graph: fx.Graph, nodes: Sequence[fx.Node], kernel: Kernel, env: dict[fx.Node, fx.Node], late: bool
) -> None:
    """The operator of one region, and a projection in the place of each of its results."""
    inputs: Any = [env[n] for n in kernel.inputs]
    name = f"fused_{kernel.outputs[-1].name}"
    made = graph.create_node("call_function", FUSED, (inputs, kernel.fused.to_text()), {}, name)
    meta = {k: v for k, v in nodes[-1].meta.items() if k not in _OF_ONE_NODE}
    values = [n.meta["val"] for n in kernel.outputs]
    sizes = [storage_nbytes(v) for v in values]
    made.meta = {**meta, "val": values, LEAVES: tuple(Leaf(size, None) for size in sizes)}
    if late:
        marked_late(made)
    for number, node in enumerate(kernel.outputs):
        part = graph.create_node("call_function", getitem, (made, number), {}, node.name)
        part.meta = {**node.meta, LEAVES: (Leaf(sizes[number], (0, number)),)}
        if late:
            marked_late(part)
        env[node] = part
