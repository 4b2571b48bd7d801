"""Experts behind an all-to-all, in chunks of their capacity: one chunk is sent while another computes.

Tokens [experts, capacity, width] are sent to the ranks that hold their experts, which compute each token
apart from the others, and back. So the capacity can be cut, as in "Tutel: Adaptive Mixture-of-Experts at
Scale" (Hwang et al., MLSys 2023) and FSMoE (arXiv 2501.10714, 2025). In training the gradients of tokens
are sent and computed in the same chunks; those of weights, which sum over the capacity, on the whole.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt import ops
from graphopt.errors import PlanError
from graphopt.program import Program, insert_call
from graphopt.split import late_nodes

aten = ops.aten
_ALL_TO_ALL = "_c10d_functional::all_to_all_single"
_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


class CannotChunk(PlanError):
    """Why the capacity stays whole."""


@dataclass(frozen=True)
class Cut:
    """Where a tensor has the capacity: dimension `dim` is `outer` times `capacity`, which is inside."""

    dim: int
    outer: int
    capacity: int

    def bounds(self, chunk: int, chunks: int) -> tuple[int, int]:
        """Where chunk number `chunk` of the capacity begins and ends.

        >>> Cut(1, 1, 5).bounds(1, 2)
        (2, 5)
        """
        return chunk * self.capacity // chunks, (chunk + 1) * self.capacity // chunks

    def select(self, value: torch.Tensor, chunk: int, chunks: int) -> torch.Tensor:
        """The elements of `value` that belong to a chunk."""
        begin, end = self.bounds(chunk, chunks)
        parts = value.reshape(
            *value.shape[: self.dim], self.outer, self.capacity, *value.shape[self.dim + 1 :]
        )
        return parts.narrow(self.dim + 1, begin, end - begin).flatten(self.dim, self.dim + 1)


@dataclass(frozen=True)
class Region:
    """`sources` are sent by a first all-to-all; `cuts` of what is done up to the last, in order."""

    sources: Mapping[fx.Node, Cut]
    cuts: Mapping[fx.Node, Cut]


def region_of(program: Program, chunks: int) -> Region:
    """What can be done on chunks of the capacity; CannotChunk where there is nothing."""
    sources: dict[fx.Node, Cut] = {}
    known: dict[fx.Node, Cut] = {}
    for node in program.operators():
        found = _cut(node, known)
        if found is None and (source := _sent(node, chunks)) is not None:
            sources[source] = Cut(1, 1, int(source.meta["val"].shape[1]))
            found = _like(node, sources[source])
        if found is not None:
            known[node] = found
    before: set[fx.Node] = set()  # what an all-to-all, or the wait for it, needs
    for node in reversed(list(known)):
        if ops.is_wait(node) or before.intersection(node.users):
            before.add(node)
    cuts = {node: cut for node, cut in known.items() if node in before}
    if not any(runs(node) for node in cuts):
        raise CannotChunk("no all-to-all of [experts, capacity, ...] has something to compute behind it")
    return Region(sources, cuts)


def runs(node: fx.Node) -> bool:
    """True for what computes, and does not only move or look at data."""
    return not (ops.is_view(node.target) or ops.is_collective(node.target))


def _sent(node: fx.Node, chunks: int) -> fx.Node | None:
    """What an all-to-all of equal pieces sends along its first dimension."""
    if ops.schema_name(node.target) != _ALL_TO_ALL:
        return None
    source, *sizes, _ = node.args
    shape = tuple(source.meta["val"].shape)  # type: ignore[union-attr]
    equal = all(len(set(given or ())) <= 1 for given in sizes)  # type: ignore[arg-type]
    fits = len(shape) > 2 and shape[1] >= chunks and all(isinstance(size, int) for size in shape)
    return source if equal and fits and len(node.users) == 1 else None  # type: ignore[return-value]


def _like(node: fx.Node, cut: Cut) -> Cut | None:
    return cut if _fits(node, cut) else None


def _fits(node: fx.Node, cut: Cut) -> bool:
    val = node.meta.get("val")
    return isinstance(val, torch.Tensor) and val.shape[cut.dim] == cut.outer * cut.capacity


def _cut(node: fx.Node, known: Mapping[fx.Node, Cut]) -> Cut | None:
    """How the result of `node` is cut; None where its operands are not, or where that is not known."""
    operands = [known[n] for n in node.all_input_nodes if n in known]
    if not operands or ops.mutates(node.target) or ops.is_random(node):
        return None
    first, rule = operands[0], _RULES.get(node.target)
    if ops.is_wait(node) or (ops.schema_name(node.target) == _ALL_TO_ALL and first.dim > 0):
        return _like(node, first) if len(node.all_input_nodes) == 1 else None
    if rule is not None:
        return rule(node, known)
    return _pointwise(node, known) if ops.is_elementwise(node) else None


def _pointwise(node: fx.Node, known: Mapping[fx.Node, Cut]) -> Cut | None:
    rank = node.meta["val"].dim()
    backs = set()
    for source in node.all_input_nodes:
        cut, shape = known.get(source), source.meta["val"].shape
        if cut is not None:
            backs.add((len(shape) - cut.dim, cut.outer, cut.capacity))
    if len(backs) != 1:
        return None
    back, outer, capacity = backs.pop()
    for source in node.all_input_nodes:
        shape = source.meta["val"].shape
        if source not in known and len(shape) >= back and shape[len(shape) - back] != 1:
            return None
    return Cut(rank - back, outer, capacity)


def _viewed(node: fx.Node, known: Mapping[fx.Node, Cut]) -> Cut | None:
    """Other dimensions over the same elements in the same order."""
    source = node.all_input_nodes[0]
    cut, old, new = known[source], source.meta["val"].shape, node.meta["val"].shape
    before = math.prod(old[: cut.dim]) * cut.outer
    for dim in range(len(new)):
        outer = before // max(1, math.prod(new[:dim]))
        if outer * math.prod(new[:dim]) == before and new[dim] == outer * cut.capacity:
            return Cut(dim, outer, cut.capacity)
    return None


def _moved(order: Callable[[fx.Node, int], Sequence[int]]) -> Callable[..., Cut | None]:
    def rule(node: fx.Node, known: Mapping[fx.Node, Cut]) -> Cut | None:
        cut, rank = known[node.all_input_nodes[0]], node.meta["val"].dim()
        places = [d % rank for d in order(node, rank)]
        return Cut(places.index(cut.dim), cut.outer, cut.capacity)

    return rule


def _transposed(node: fx.Node, rank: int) -> Sequence[int]:
    first, second = (int(d) % rank for d in node.args[1:3])  # type: ignore[arg-type]
    order = list(range(rank))
    order[first], order[second] = order[second], order[first]
    return order


def _products(left: int) -> Callable[..., Cut | None]:
    """Products of the rows of operand `left`, for each expert, with a matrix that has no capacity."""

    def rule(node: fx.Node, known: Mapping[fx.Node, Cut]) -> Cut | None:
        rows, matrix = node.args[left : left + 2]
        cut = known.get(rows)  # type: ignore[arg-type]
        if cut is None or cut.dim != 1 or matrix in known:
            return None
        added = node.args[:left]
        if any(n in known or n.meta["val"].shape[-2] != 1 for n in added):  # type: ignore[union-attr]
            return None
        return cut

    return rule


def _same(node: fx.Node, known: Mapping[fx.Node, Cut]) -> Cut | None:
    return known[node.all_input_nodes[0]]


_RULES: Mapping[Any, Callable[[fx.Node, Mapping[fx.Node, Cut]], Cut | None]] = {
    **dict.fromkeys(_VIEWS, _viewed),
    **dict.fromkeys((aten.clone.default, aten._to_copy.default, aten.detach.default), _same),
    aten.permute.default: _moved(lambda node, _: node.args[1]),  # type: ignore[arg-type,return-value]
    aten.transpose.int: _moved(_transposed),
    aten.bmm.default: _products(0),
    aten.baddbmm.default: _products(1),
}


class CapacityChunks:
    """`program` with its experts on `chunks` chunks of the capacity, joined where others read them.

    `region` is of a copy of `program`; `parts` has the new nodes for each of its nodes, by name.
    """

    def __init__(self, program: Program, chunks: int) -> None:
        self.program, self._chunks = program.copy(), chunks
        self.region = region_of(self.program, chunks)
        self.parts: dict[str, list[fx.Node]] = {}
        self._slices: dict[fx.Node, list[fx.Node]] = {}
        done = list(self.region.cuts)
        for node in done:
            self.parts[node.name] = [self._part(node, chunk) for chunk in range(chunks)]
        late = late_nodes(self.program)
        place = {node: index for index, node in enumerate(self.program.graph.nodes)}
        for node in done:
            self._join(node, late, place)
        for node in reversed(done):
            self.program.graph.erase_node(node)
        self.program.graph.eliminate_dead_code()
        self.program.graph.lint()
        self.program.module.recompile()

    def _call(self, node: fx.Node, target: Any, *args: Any, name: str) -> fx.Node:
        """A call before `node`, which it replaces a part of."""
        with self.program.graph.inserting_before(node):
            return insert_call(self.program.graph, node, target, args, name=name)

    def _part(self, node: fx.Node, chunk: int) -> fx.Node:
        def operand(source: fx.Node) -> fx.Node:
            if source.name in self.parts:
                return self.parts[source.name][chunk]
            is_sent = ops.schema_name(node.target) == _ALL_TO_ALL
            return self._slice(source, node)[chunk] if is_sent else source

        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), operand)
        given: list[Any] = list(args)
        if node.target in _VIEWS:
            cut, sizes = self.region.cuts[node], list(node.meta["val"].shape)
            begin, end = cut.bounds(chunk, self._chunks)
            sizes[cut.dim] = cut.outer * (end - begin)
            given[1] = sizes
        assert callable(node.target)
        with self.program.graph.inserting_before(node):
            name = f"{node.name}_chunk{chunk}"
            try:
                return insert_call(self.program.graph, node, node.target, tuple(given), kwargs, name)
            except RuntimeError as error:
                reason = f"{node.name} does not take chunks: {error}".splitlines()[0]
                raise CannotChunk(reason) from error

    def _slice(self, source: fx.Node, reader: fx.Node) -> list[fx.Node]:
        """The chunks of what is sent, each of its own."""
        if source not in self._slices:
            cut, made = self.region.sources[source], []
            for chunk in range(self._chunks):
                args = (source, cut.dim, *cut.bounds(chunk, self._chunks))
                name = f"{source.name}_chunk{chunk}"
                view = self._call(reader, aten.slice.Tensor, *args, name=name)
                with self.program.graph.inserting_before(reader):
                    form = {"memory_format": torch.contiguous_format}
                    dense = aten.clone.default, (view,), form, f"{name}_dense"
                    made.append(insert_call(self.program.graph, source, *dense))
            self._slices[source] = made
        return self._slices[source]

    def _join(self, node: fx.Node, late: set[fx.Node], place: Mapping[fx.Node, int]) -> None:
        """Give those that read all of `node` its parts, joined; in the backward if only that does."""
        readers = [user for user in node.users if user not in self.region.cuts]
        only_late = node not in late and all(user in late for user in readers)
        if readers:
            first = min(readers, key=place.__getitem__) if only_late else node
            whole = self._joined(node, first, late=only_late)
            for reader in readers:
                reader.replace_input_with(node, whole)

    def _joined(self, node: fx.Node, before: fx.Node, late: bool) -> fx.Node:
        """All of `node`, as it lies in memory; `before` another one, which may be `late`."""
        cut, val = self.region.cuts[node], node.meta["val"]
        shape = list(val.shape)

        def call(target: Any, *args: Any, name: str, **kwargs: Any) -> fx.Node:
            with self.program.graph.inserting_before(before):
                made = insert_call(self.program.graph, node, target, args, kwargs, name)
            if late:
                made.meta["partitioner_tag"] = "is_backward"
            return made

        rows = []
        for chunk, part in enumerate(self.parts[node.name]):
            begin, end = cut.bounds(chunk, self._chunks)
            sizes = [*shape[: cut.dim], cut.outer, end - begin, *shape[cut.dim + 1 :]]
            rows.append(call(aten.reshape.default, part, sizes, name=f"{part.name}_rows"))
        whole = call(aten.cat.default, rows, cut.dim + 1, name=f"{node.name}_joined")
        whole = call(aten.reshape.default, whole, shape, name=f"{node.name}_whole")
        if not val.is_contiguous():
            order = sorted(range(val.dim()), key=lambda dim: (-val.stride(dim), dim))
            back = [order.index(dim) for dim in range(val.dim())]
            form = {"memory_format": torch.contiguous_format}
            whole = call(aten.permute.default, whole, order, name=f"{node.name}_laid")
            whole = call(aten.clone.default, whole, name=f"{node.name}_laid", **form)
            whole = call(aten.permute.default, whole, back, name=f"{node.name}_laid")
        return whole
