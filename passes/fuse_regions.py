"""Which nodes of a program become one kernel: groups that grow by the bytes they save.

Every operator with a formula begins as a group of its own. First those are joined of which one reads what
the other makes, then those that read the same tensors; of a group's neighbours the one that saves most
bytes, as long as the result is one kernel and no operator outside of it would have to run between its
parts. An order of groups is kept all along: a joined group gets a
place after all that it reads and before all that read it, and nothing else moves. So no cycle can arise.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from operator import getitem
from typing import Any

from torch import fx

from graphopt import ops
from graphopt.cost_models.memory import BLOCK
from graphopt.cost_models.values import touched_bytes
from graphopt.passes.fuse_kernel import Kernel, check_alone, kernel_of, outputs_of, results_of
from graphopt.passes.fuse_rules import RULES
from graphopt.passes.fuse_values import CannotFuse, is_transparent, root_of, source_of
from graphopt.program import Program, tensors_of
from graphopt.split import late_nodes

MAX_NODES = 96  # of one kernel
_NEAR = 12  # groups that read the same tensor and are tried, the next in order


@dataclass(eq=False)
class Group:
    """Nodes that run together, in order, and their place in the order of all groups."""

    nodes: tuple[fx.Node, ...]
    place: Fraction
    phase: tuple[Any, ...]
    kernel: Kernel | None = None
    fusible: bool = False

    @cached_property
    def nbytes(self) -> int:
        """Bytes that the group moves."""
        return traffic(self.nodes)


@dataclass(frozen=True)
class Missed:
    """A fusion that was not done: at which node, and which condition of which rule did not hold."""

    node: str
    rule: str
    condition: str

    def __str__(self) -> str:
        return f"{self.node}: {self.rule}: {self.condition}"


@dataclass
class _Search:
    """Groups of a program, who reads whom, and what was refused."""

    program: Program
    order: dict[fx.Node, int]
    group_of: dict[fx.Node, Group] = field(default_factory=dict)
    sources: dict[fx.Node, set[fx.Node]] = field(default_factory=dict)
    readers: dict[fx.Node, set[fx.Node]] = field(default_factory=dict)
    refused: set[frozenset[Group]] = field(default_factory=set)
    missed: dict[tuple[str, str], Missed] = field(default_factory=dict)


def regions_of(program: Program) -> tuple[list[tuple[tuple[fx.Node, ...], Kernel]], list[Missed]]:
    """The nodes of each kernel of `program`, in order, with the kernel; and the fusions missed."""
    search = _Search(program, {n: i for i, n in enumerate(program.graph.nodes)})
    _begin(search)
    units = list(search.group_of)
    for near in (False, True):
        changed = True
        while changed:
            changed = False
            for node in units:
                while _grown(search, search.group_of[node], near):
                    changed = True
    groups = {id(g): g for g in search.group_of.values() if g.kernel is not None}
    ordered = sorted(groups.values(), key=lambda g: g.place)
    return [(g.nodes, g.kernel) for g in ordered if g.kernel is not None], _remarks(search)


def maker_of(node: fx.Node) -> fx.Node:
    """The operator that made what `node` holds, views and projections looked through."""
    while node.target is getitem or is_transparent(node):
        node = node.all_input_nodes[0] if node.target is getitem else source_of(node)
    return node


def _begin(search: _Search) -> None:
    late, barriers = late_nodes(search.program), 0
    for node, number in search.order.items():
        if maker_of(node) is not node and node.op != "output":
            continue
        group = Group((node,), Fraction(number), (node in late, node.meta.get(BLOCK), barriers))
        if node.op == "call_function" and (ops.mutates(node.target) or not ops.is_movable(node)):
            barriers += 1
            group.phase = (-barriers,)
        elif node.op == "call_function":
            group.fusible = _is_fusible(search, node)
        search.group_of[node] = group
        search.sources[node] = {maker_of(source) for source in node.all_input_nodes}
        search.readers[node] = set()
        for source in search.sources[node]:
            search.readers[source].add(node)


def _is_fusible(search: _Search, node: fx.Node) -> bool:
    try:
        check_alone(node)
    except CannotFuse as reason:
        if node.target in RULES or ops.is_elementwise(node):
            search.missed[node.name, reason.rule] = Missed(node.name, reason.rule, reason.condition)
        return False
    return True


# --- growth ------------------------------------------------------------------------------------


def _grown(search: _Search, group: Group, near: bool) -> bool:
    """Join `group` with the neighbour that saves most, if there is one; `near` as for `_neighbours`."""
    if not group.fusible:
        return False
    candidates = []
    for other in _neighbours(search, group, near):
        if frozenset((group, other)) in search.refused:
            continue
        nodes = tuple(sorted((*group.nodes, *other.nodes), key=search.order.__getitem__))
        gain = group.nbytes + other.nbytes - traffic(nodes)
        if gain > 0:
            candidates.append((gain, -float(other.place), other, nodes))
    for _, _, other, nodes in sorted(candidates, key=lambda c: c[:2], reverse=True):
        joined = _joined(search, group, other, nodes)
        if joined is not None:
            search.group_of.update(dict.fromkeys(joined.nodes, joined))
            return True
    return False


def _neighbours(search: _Search, group: Group, near: bool) -> list[Group]:
    """Fusible groups of the same phase that make what `group` reads, or read what it makes.

    With `near` also the next in order that read the same.
    """
    found: dict[int, Group] = {}
    for node in group.nodes:
        others = [*search.sources[node], *search.readers[node]]
        for source in search.sources[node] if near else ():
            shared = [r for r in search.readers[source] if search.group_of[r] is not group]
            shared.sort(key=lambda r: abs(search.group_of[r].place - group.place))
            others += shared[:_NEAR]
        for other in others:
            candidate = search.group_of[other]
            if candidate.fusible and candidate is not group and candidate.phase == group.phase:
                found[id(candidate)] = candidate
    return list(found.values())


def _joined(search: _Search, a: Group, b: Group, nodes: tuple[fx.Node, ...]) -> Group | None:
    """The two groups as one, or None, with a remark."""
    first, last = sorted((a, b), key=lambda g: g.place)
    try:
        if len(nodes) > MAX_NODES:
            raise CannotFuse("size", f"a kernel would have {len(nodes)} operators")
        place = _common_place(search, first, last)
        kernel = kernel_of(nodes)
    except CannotFuse as reason:
        search.refused.add(frozenset((a, b)))
        node = last.nodes[0].name
        key = (node, first.nodes[-1].name)
        search.missed.setdefault(
            key, Missed(node, reason.rule, f"with {first.nodes[-1].name}: {reason.condition}")
        )
        return None
    return Group(nodes, place, a.phase, kernel, True)


def _common_place(search: _Search, first: Group, last: Group) -> Fraction:
    """After all that the two read, before all that read them; CannotFuse names what is in between."""
    inside = {*first.nodes, *last.nodes}
    before = {s for n in inside for s in search.sources[n]} - inside
    after = {r for n in inside for r in search.readers[n]} - inside
    groups = search.group_of
    source = max(before, key=lambda n: (groups[n].place, search.order[n]), default=None)
    reader = min(after, key=lambda n: (groups[n].place, search.order[n]), default=None)
    low = groups[source].place if source is not None else Fraction(-1)
    high = groups[reader].place if reader is not None else last.place + 1
    if low >= high:
        raise CannotFuse("order", f"{reader} reads one part before {source} is made for the other")
    return last.place if last.place < high else (low + high) / 2


def traffic(nodes: Iterable[fx.Node]) -> int:
    """Bytes that `nodes` read and write as one kernel."""
    nodes = tuple(nodes)
    inside = {h for n in nodes for h in results_of(n)} | {*nodes}
    read: dict[fx.Node, int] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            if maker_of(source) in inside:
                continue
            root, tensor = root_of(source), source.meta["val"]
            read[root] = min(read.get(root, 0) + touched_bytes(tensor), _nbytes(root))
    return sum(read.values()) + sum(_nbytes(n) for n in outputs_of(nodes))


def _nbytes(node: fx.Node) -> int:
    return sum(touched_bytes(t) for t in tensors_of(node) if t is not None)


def _remarks(search: _Search) -> list[Missed]:
    """What was refused and stayed apart."""
    by_name = {n.name: n for n in search.group_of}
    found = []
    for (name, other), missed in search.missed.items():
        partner = by_name.get(other)
        if partner is None or search.group_of[partner] is not search.group_of[by_name[name]]:
            found.append(missed)
    return found
