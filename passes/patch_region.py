"""The spatially local prefix of a network: where it may end, and the windows its operators need."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import fx

from graphopt.passes.local_windows import (
    COLUMNS,
    ROWS,
    Interval,
    LocalRule,
    NotLocal,
    Reach,
    local_rule,
    map_shape,
)
from graphopt.program import Program, Role, tensors_of

CANDIDATES_PER_GRID = 4  # ends of the prefix that are tried at one resolution


@dataclass(frozen=True)
class Region:
    """A prefix: everything local between the input `image` and the feature map `end`.

    `rules` holds the nodes of the prefix in program order, `end` last; nothing outside reads any of
    them but `end`.
    """

    image: fx.Node
    end: fx.Node
    rules: Mapping[fx.Node, LocalRule]

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of `end`."""
        return grid_of(self.end)

    def windows(self, wanted: Interval, dimension: int) -> dict[fx.Node, Interval] | None:
        """The interval of `dimension` that each node computes, for the interval `wanted` of `end`.

        That of the image is what is read of it. None where an operator would see only padding.
        """
        needed: dict[fx.Node, Interval] = {self.end: wanted}
        for node, reach, sources in self._links[dimension]:
            first, last = reach.source(needed[node])
            for source, size in sources:
                window = max(first, 0), min(last, size)
                if window[0] >= window[1]:
                    return None
                before = needed.get(source, window)
                needed[source] = min(before[0], window[0]), max(before[1], window[1])
        return needed

    @cached_property
    def _links(self) -> dict[int, list[tuple[fx.Node, Reach, list[tuple[fx.Node, int]]]]]:
        """By dimension, from the end on: each node, its reach, what it reads and of which size."""
        return {
            dimension: [
                (n, rule.reach(dimension), [(s, grid_of(s)[dimension - ROWS]) for s in self.operands(n)])
                for n, rule in reversed(list(self.rules.items()))
            ]
            for dimension in (ROWS, COLUMNS)
        }

    def shape_of(self, windows: Mapping[fx.Node, Interval], dimension: int) -> tuple[int, ...]:
        """What tells the computations on `windows` apart but for their place in the image."""
        found = [last - first for first, last in windows.values()]
        for node, reach, sources in self._links[dimension]:
            first, last = reach.source(windows[node])
            for source, size in sources:
                found += [max(first, 0) - windows[source][0], max(-first, 0), max(last - size, 0)]
        return tuple(found)

    def distinct(self, cuts: Sequence[int], dimension: int) -> list[int]:
        """The first of all patches along `dimension` that are alike but for their place."""
        first: dict[object, int] = {}
        for index, cut in enumerate(pairwise(cuts)):
            windows = self.windows(cut, dimension)
            first.setdefault(windows and self.shape_of(windows, dimension), index)
        return list(first.values())

    def operands(self, node: fx.Node) -> list[fx.Node]:
        """The feature maps that `node` reads."""
        return [n for n in node.all_input_nodes if n in self.rules or n is self.image]


def grid_of(node: fx.Node) -> tuple[int, int]:
    """Rows and columns of a feature map."""
    shape = map_shape(node)
    assert shape is not None
    return shape[2], shape[3]


@dataclass(frozen=True)
class Prefix:
    """All regions of a program, the earliest end first, and what stopped the prefix (or "")."""

    regions: tuple[Region, ...]
    remark: str

    @staticmethod
    def of(program: Program) -> "Prefix":
        """Follow the images of `program` as far as every operator on them is spatially local."""
        finder = _Finder(program)
        finder.follow()
        regions = finder.regions()
        remark = finder.remark
        if not regions and not remark:
            remark = "no feature map of the prefix is all that the rest of the network reads of it"
        return Prefix(tuple(regions), remark)

    def region(self, end: str) -> Region | None:
        """The region that ends at the node with this name."""
        return next((r for r in self.regions if r.end.name == end), None)

    def candidates(self) -> list[Region]:
        """At each resolution the ends with the smallest maps: first, last and between, and the last."""
        by_grid: dict[tuple[int, int], list[Region]] = {}
        for region in self.regions:
            by_grid.setdefault(region.size, []).append(region)
        found: list[Region] = []
        for same in by_grid.values():
            least = min(_channels(r.end) for r in same)
            small = [r for r in same if _channels(r.end) == least]
            step = max(1, (len(small) - 1) / (CANDIDATES_PER_GRID - 2))
            places = {round(i * step) for i in range(CANDIDATES_PER_GRID)}
            chosen = [r for i, r in enumerate(small) if i in places or r is small[-1]]
            found += chosen if same[-1] in chosen else [*chosen, same[-1]]
        return found


def _channels(node: fx.Node) -> int:
    shape = map_shape(node)
    assert shape is not None
    return shape[1]


class _Finder:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.rules: dict[fx.Node, LocalRule] = {}
        self.images = {n for n in program.graph.nodes if _is_image(program, n)}
        self.origin: dict[fx.Node, fx.Node | None] = {n: n for n in self.images}
        self.not_local: set[fx.Node] = set()
        self.remark = "" if self.images else "no input is an image [batch, channels, rows, columns]"

    def follow(self) -> None:
        """Give a rule to every local operator on an image."""
        for node in self.program.operators():
            sources = node.all_input_nodes
            maps = [n for n in sources if n in self.rules or n in self.images]
            if any(n in self.not_local for n in sources):
                self.not_local.add(node)
            elif maps:
                try:
                    self.rules[node] = local_rule(node, maps)
                    origins = {self.origin[n] for n in maps}
                    self.origin[node] = origins.pop() if len(origins) == 1 else None
                except NotLocal as reason:
                    self.not_local.add(node)
                    self.remark = self.remark or f"{node.name} ({node.target}) {reason}"

    def regions(self) -> list[Region]:
        """The ends that are all that the rest reads of what lies before them."""
        order = {node: i for i, node in enumerate(self.program.graph.nodes)}
        found = []
        for end in self.rules:
            image = self.origin[end]
            if image is None or not isinstance(end.meta["val"], torch.Tensor):
                continue
            inside = self._before(end)
            if all(user in inside for node in inside if node is not end for user in node.users):
                rules = {n: self.rules[n] for n in sorted(inside, key=order.__getitem__)}
                found.append(Region(image, end, rules))
        return found

    def _before(self, end: fx.Node) -> set[fx.Node]:
        inside = {end}
        stack = [end]
        while stack:
            for source in stack.pop().all_input_nodes:
                if source in self.rules and source not in inside:
                    inside.add(source)
                    stack.append(source)
        return inside


def _is_image(program: Program, node: fx.Node) -> bool:
    tensor = tensors_of(node)[0] if program.roles.get(node.name) is Role.INPUT else None
    return tensor is not None and tensor.is_floating_point() and map_shape(node) is not None
