"""Carrying out a choice of patches: the prefix of a forward, once for each patch of its last map.

Each patch computes exactly the elements that it needs, from a slice of the image: zeros (or, for a
max pool, minus infinity) stand only where the image ends. The patches run one after another, and each
is copied into the buffer that takes the place of the prefix's last map.
"""

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from operator import getitem
from typing import Any

import torch
from torch import fx

from graphopt.passes.lean_forms import use_lean_forms
from graphopt.passes.local_windows import COLUMNS, ROWS, Interval, LocalRule
from graphopt.passes.patch_region import Region, grid_of
from graphopt.program import Program, insert_call

aten = torch.ops.aten
Windows = Mapping[fx.Node, Interval]


def with_patches(
    program: Program,
    region: Region,
    rows: Sequence[int],
    columns: Sequence[int],
    *,
    some: Collection[tuple[int, int]] | None = None,
) -> tuple[Program, list[fx.Node]]:
    """`program` with `region` computed patch by patch, and the nodes that are new in it.

    `rows` and `columns` are the places where the last map is cut, from 0 to its size. With
    `some` only the patches at these places of the grid are there, to see what memory they take.
    """
    result = program.copy()
    named = {n.name: n for n in result.graph.nodes}
    copied = Region(
        named[region.image.name],
        named[region.end.name],
        {named[n.name]: rule for n, rule in region.rules.items()},
    )
    writer = _Writer(result.graph, copied)
    writer.write(rows, columns, some)
    rewritten = use_lean_forms(result.graph)
    gone = set(rewritten.instead_of.values())
    return result, [*(n for n in writer.new if n.name not in gone), *rewritten.new]


class _Writer:
    def __init__(self, graph: fx.Graph, region: Region) -> None:
        self.graph = graph
        self.region = region
        self.new: list[fx.Node] = []
        self.suffix = ""
        self.alike: dict[object, list[dict[str, Any]]] = {}  # facts of a patch, by its sizes
        self.known: list[dict[str, Any]] = []

    def write(
        self,
        rows: Sequence[int],
        columns: Sequence[int],
        some: Collection[tuple[int, int]] | None,
    ) -> None:
        """Put the patches, the buffer and the copies into it in the place of the region."""
        end = self.region.end
        by_row = [self.region.windows(cut, ROWS) for cut in pairwise(rows)]
        by_column = [self.region.windows(cut, COLUMNS) for cut in pairwise(columns)]
        self.suffix = "_patches"
        with self.graph.inserting_before(end):
            buffer = self._buffer(end)
            for i, row in enumerate(by_row):
                for j, column in enumerate(by_column):
                    if some is not None and (i, j) not in some:
                        continue
                    assert row is not None and column is not None
                    key = self.region.shape_of(row, ROWS), self.region.shape_of(column, COLUMNS)
                    self.suffix = f"_patch_{i}_{j}"
                    self.known = self.alike.get(key, [])[::-1]
                    first = len(self.new)
                    self._patch(buffer, row, column)
                    self.alike.setdefault(key, [n.meta for n in self.new[first:]])
        end.replace_all_uses_with(buffer)
        for node in reversed(list(self.region.rules)):
            self.graph.erase_node(node)

    def _buffer(self, end: fx.Node) -> fx.Node:
        tensor = end.meta["val"]
        kind = {"dtype": tensor.dtype, "device": tensor.device}
        layout = (list(tensor.shape), list(tensor.stride()))
        return self._call(end, aten.empty_strided.default, layout, kind)

    def _patch(self, buffer: fx.Node, rows: Windows, columns: Windows) -> None:
        """The nodes that compute one patch and copy it into the buffer."""
        region, end = self.region, self.region.end
        image = self._cut_out(region.image, region.image, rows, columns)
        made = {region.image: image}
        for node, rule in region.rules.items():
            operands = {n: n for n in node.all_input_nodes}
            own = [0, 0]
            for source in region.operands(node):
                operands[source] = made[source]
                if node.target is not getitem:
                    operands[source], own = self._window(node, rule, source, made, rows, columns)
            if rule.pads:
                made[node] = operands[region.operands(node)[0]]
                continue
            arguments = rule.call(node, own) if rule.call else node.args
            args, kwargs = fx.node.map_arg((arguments, node.kwargs), operands.__getitem__)
            made[node] = self._call(node, node.target, args, kwargs)
        place = self._cut_out(buffer, end, rows, columns)
        self._call(end, aten.copy_.default, (place, made[end]), name=f"{end.name}_copy")

    def _cut_out(self, node: fx.Node, like: fx.Node, rows: Windows, columns: Windows) -> fx.Node:
        """The window of `like` in `node`, which is whole."""
        height, width = grid_of(like)
        part = self._slice(node, ROWS, rows[like], (0, height))
        return self._slice(part, COLUMNS, columns[like], (0, width))

    def _window(
        self,
        node: fx.Node,
        rule: LocalRule,
        source: fx.Node,
        made: Mapping[fx.Node, fx.Node],
        rows: Windows,
        columns: Windows,
    ) -> tuple[fx.Node, list[int]]:
        """What `node` reads of `source`, padded where the operator's own padding does not do."""
        window = made[source]
        own, missing = [], []
        for dimension, reach, windows in ((ROWS, rule.rows, rows), (COLUMNS, rule.columns, columns)):
            size = grid_of(source)[dimension - ROWS]
            first, last = reach.source(windows[node])
            inside = max(first, 0), min(last, size)
            window = self._slice(window, dimension, inside, windows[source])
            before, after = inside[0] - first, last - inside[1]
            count = windows[node][1] - windows[node][0]
            padding = reach.own_padding(inside[1] - inside[0], before, after, count)
            padding = None if rule.call is None else padding
            own.append(0 if padding is None else padding)
            missing.append((before, after) if padding is None else (0, 0))
        amounts = [*missing[1], *missing[0]]
        if any(amounts):
            arguments = (window, amounts, rule.fill)
            window = self._call(node, aten.constant_pad_nd.default, arguments, name="padded")
        return window, own

    def _slice(self, node: fx.Node, dimension: int, wanted: Interval, held: Interval) -> fx.Node:
        """`wanted` of `node`, which holds the elements `held` of a dimension."""
        if wanted == held:
            return node
        first, last = wanted[0] - held[0], wanted[1] - held[0]
        arguments = (node, dimension, first, last)
        return self._call(node, aten.slice.Tensor, arguments, name="window")

    def _call(
        self,
        like: fx.Node,
        target: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None = None,
        name: str = "",
    ) -> fx.Node:
        """A new node with its facts, which has its origin from the node `like`."""
        name = (name or like.name) + self.suffix
        if self.known:  # a patch of these sizes was there before
            made = self.graph.create_node("call_function", target, args, dict(kwargs or {}), name)
            made.meta = dict(self.known.pop())
        else:
            made = insert_call(self.graph, like, target, args, kwargs, name)
        self.new.append(made)
        return made
