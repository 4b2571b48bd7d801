"""Regions of a step that compute tokens apart from each other, wide inside and narrow at the border.

A region begins at a linear layer that widens, or where the heads of an attention multiply queries with
keys: to it, a token is one head of one text. It takes in all that is wide, in the forward and in the
backward, and then more of what is around as long as no more bytes cross its border: a norm before,
the addition of a residual behind. Where something wide cannot be cut, the layer is left alone.
"""

import math
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch import fx

from graphopt import ops
from graphopt.passes.batch_rules import NotByRows
from graphopt.passes.token_rules import (
    Dims,
    TokenRule,
    aten,
    inferred_rule,
    shape_of,
    token_rule,
)
from graphopt.program import Program, Storage, leaves, storages_of
from graphopt.split import late_nodes

WIDE = 1.5  # times the elements of the layer's operand: what counts as wide
GAIN = 1.5  # times the bytes at its border that a region of the forward holds inside, at least
SLICE = 20  # the most operators that are taken in to make what another reads
REACH = 100  # the most steps that a border moves in one direction


@dataclass(frozen=True)
class Region:
    """Operators of forward and backward, in program order, and how each is cut.

    `name` is that of the linear layer at which the region begins, `tokens` what it is cut into.
    """

    name: str
    tokens: int
    rules: Mapping[fx.Node, TokenRule]


@dataclass(frozen=True)
class Regions:
    """The regions of a program, which share no operator, and why other layers are left alone."""

    regions: tuple[Region, ...]
    remarks: tuple[str, ...]


def regions_of(program: Program) -> Regions:
    """Every region of `program`, in its order."""
    surroundings = _Surroundings(program)
    found, remarks = [], []
    for node in program.operators():
        if surroundings.is_late(node) or node in surroundings.taken or not _widens(node):
            continue
        try:
            region = _Growing(surroundings, node).region()
        except NotByRows as reason:
            remarks.append(f"{node.name} is left alone: {reason}")
            continue
        if region is not None:
            surroundings.taken.update(region.rules)
            found.append(region)
    return Regions(tuple(found), tuple(remarks))


def _widens(node: fx.Node) -> bool:
    """True for a linear layer from tokens to more elements for each, and for an attention's scores."""
    if node.target is aten.bmm.default:
        most = max(math.prod(shape_of(n)) for n in node.all_input_nodes)
        return math.prod(shape_of(node)) >= WIDE * most and shape_of(node)[0] > 1
    if node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
        return False
    source, weight = node.args[-2:]
    assert isinstance(source, fx.Node) and isinstance(weight, fx.Node)
    while len(weight.all_input_nodes) == 1:  # a transpose, a cast
        weight = weight.all_input_nodes[0]
    if weight.op not in ("placeholder", "get_attr") or len(shape_of(source)) != 2:
        return False
    return math.prod(shape_of(node)) >= WIDE * math.prod(shape_of(source)) and shape_of(source)[0] > 1


class _Surroundings:
    """What regions are found in: the program, the storages of its nodes, and what regions have taken."""

    def __init__(self, program: Program) -> None:
        self.place = {n: i for i, n in enumerate(program.graph.nodes)}
        self.nodes = list(program.graph.nodes)
        self.late = late_nodes(program)
        self.early = _needed(program)
        self.storages = storages_of(program.graph)
        self.taken: set[fx.Node] = set()
        writers = [n for n in program.operators() if ops.mutates(n.target)]
        self.written = {s for n in writers for i in n.all_input_nodes for s in self.storages[i]}

    def is_late(self, node: fx.Node) -> bool:
        """True for nodes of the backward."""
        return node in self.late

    def check_free(self, node: fx.Node) -> None:
        """Raise NotByRows for a node that no region can take in."""
        if node.op != "call_function":
            raise NotByRows("comes from outside of the graph or leaves it")
        if node in self.taken or not self.written.isdisjoint(self.storages[node]):
            raise NotByRows("is written to" if node not in self.taken else "is in another region")

    def nbytes(self, storages: Collection[Storage]) -> int:
        """The bytes of these storages."""
        return sum(leaves(node)[index].nbytes for node, index in storages)


def _needed(program: Program) -> set[fx.Node]:
    """What the outputs of the forward need, and what returns them."""
    stack = [o for o in program.forward_outputs if isinstance(o, fx.Node)]
    found = {program.graph.output_node()}
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


class _Growing:
    """One region while it is found."""

    def __init__(self, surroundings: _Surroundings, seed: fx.Node) -> None:
        self.around, self.seed = surroundings, seed
        source = seed.args[-2]
        assert isinstance(source, fx.Node)
        self.tokens = shape_of(source)[0]
        self.narrow = WIDE * math.prod(shape_of(source))
        self.rules: dict[fx.Node, TokenRule] = {}
        self.dims: dict[fx.Node, Dims | None] = {}

    def region(self) -> Region | None:
        """The region at the layer, None where it is not wider inside than at its border.

        Raises NotByRows with the reason where something wide cannot be cut.
        """
        self._add(self.seed, token_rule(self.seed, (0,)))
        self._take_wide(late=False)
        self._check_order(late=False)
        self._widen(late=False)
        border = self._border(late=False)
        inside = {s for n in self.rules for s in self.around.storages[n]} - border
        if self.around.nbytes(inside) < GAIN * self.around.nbytes(border):
            return None
        for node in [n for n in self.rules if self._is_wide(n)]:
            self._take_readers(node, late=True)
        self._take_wide(late=True)
        self._check_order(late=True)
        if any(self.around.is_late(n) for n in self.rules):
            self._widen(late=True)
        ordered = sorted(self.rules, key=self.around.place.__getitem__)
        return Region(self.seed.name, self.tokens, {n: self.rules[n] for n in ordered})

    def _is_wide(self, node: fx.Node) -> bool:
        return math.prod(shape_of(node)) > self.narrow and self.dims.get(node, ()) is not None

    # --- taking in -------------------------------------------------------------------------------

    def _add(self, node: fx.Node, rule: TokenRule) -> list[fx.Node]:
        """Take in `node` and, where it has several results, what takes them; or its maker."""
        self.around.check_free(node)
        added = [node]
        self.rules[node], self.dims[node] = rule, rule.dims
        try:
            for source, dims in rule.operands.items():
                if node.target is operator.getitem and source not in self.rules:
                    added += self._add(source, token_rule(source, dims))
            if len(self.around.storages[node]) > 1:
                for user in node.users:
                    if user not in self.rules:
                        added += self._add(user, inferred_rule(user, self.dims, self.tokens))
        except NotByRows:
            self._remove(added)
            raise
        return added

    def _remove(self, nodes: Collection[fx.Node]) -> None:
        for node in nodes:
            self.rules.pop(node, None)
            self.dims.pop(node, None)

    def _take_wide(self, late: bool) -> None:
        """Take in what is wide and made for, or from, what is there."""
        done: set[fx.Node] = set()
        while todo := [n for n in self.rules if n not in done and self.around.is_late(n) is late]:
            for node in todo:
                done.add(node)
                for source, dims in self.rules[node].operands.items():
                    if source not in self.rules and self._is_wide(source):
                        if self.around.is_late(source) is not late:
                            raise NotByRows(f"{node.name} reads {source.name}, which is made elsewhere")
                        self._take(source, lambda n, d=dims: token_rule(n, d))  # type: ignore[misc]
                if self._is_wide(node):
                    self._take_readers(node, late)

    def _take_readers(self, node: fx.Node, late: bool) -> None:
        for user in node.users:
            if user not in self.rules and (self.around.is_late(user) is late or user.op == "output"):
                self._take(user, lambda n: inferred_rule(n, self.dims, self.tokens))

    def _take(self, node: fx.Node, rule: Callable[[fx.Node], TokenRule]) -> None:
        try:
            self.around.check_free(node)
            self._add(node, rule(node))
        except NotByRows as reason:
            raise NotByRows(f"{node.name} ({node.target}) {reason}") from None

    # --- moving the border -----------------------------------------------------------------------

    def _widen(self, late: bool) -> None:
        for step in 2 * (self._next_source, self._next_reader):
            self._move(late, step)

    def _move(self, late: bool, step: Callable[[bool, set[fx.Node]], list[fx.Node]]) -> None:
        """Take in nodes in one direction, as far as the border is least; of equals, the farthest."""
        refused: set[fx.Node] = set()
        least, pending = self.around.nbytes(self._border(late)), []
        for _ in range(REACH):
            before = {s for rule in self.rules.values() for s in rule.operands}
            added = step(late, refused)
            if not added:
                break
            pending += [*added, *self._complete(added, before, late)]
            now = self.around.nbytes(self._border(late))
            if now <= least:
                least, pending = now, []
        self._remove(pending)

    def _next_source(self, late: bool, refused: set[fx.Node]) -> list[fx.Node]:
        wanted = {
            source: dims
            for rule in self.rules.values()
            for source, dims in rule.operands.items()
            if source not in self.rules
        }
        return self._first(
            sorted(wanted, key=self.around.place.__getitem__, reverse=True),
            late,
            refused,
            lambda n: token_rule(n, wanted[n]),
        )

    def _complete(
        self, added: Collection[fx.Node], before: Collection[fx.Node], late: bool
    ) -> list[fx.Node]:
        """Take in what else `added` reads, where it is made of what the region has or read `before`."""
        more: list[fx.Node] = []
        for node in added:
            for source, dims in self.rules[node].operands.items():
                if source in self.rules or source in before or self.around.is_late(source) is not late:
                    continue
                new: list[fx.Node] = []
                try:
                    slice_ = self._slice(source, dims, before, late)
                    for member, rule in reversed(slice_.items()):
                        new += self._add(member, rule) if member not in self.rules else []
                    self._check_order(late)
                except NotByRows:
                    self._remove(new)
                    continue
                more += new
        return more

    def _slice(
        self, node: fx.Node, dims: Dims, before: Collection[fx.Node], late: bool
    ) -> dict[fx.Node, TokenRule]:
        """What makes `node` from what the region has or read `before`; NotByRows where more is needed."""
        found: dict[fx.Node, TokenRule] = {}
        stack = [(node, dims)]
        while stack:
            current, place = stack.pop()
            if current in self.rules or current in before:
                continue
            self.around.check_free(current)
            if self.around.is_late(current) is not late or self._is_wide(current) or len(found) == SLICE:
                raise NotByRows("is made of more")
            found[current] = token_rule(current, place)
            stack.extend(found[current].operands.items())
        return found

    def _next_reader(self, late: bool, refused: set[fx.Node]) -> list[fx.Node]:
        mine = [n for n, rule in self.rules.items() if rule.dims is not None]
        readers = {u for n in mine for u in n.users if u not in self.rules}
        return self._first(
            sorted(readers, key=self.around.place.__getitem__),
            late,
            refused,
            lambda n: inferred_rule(n, self.dims, self.tokens),
        )

    def _first(
        self,
        nodes: list[fx.Node],
        late: bool,
        refused: set[fx.Node],
        rule: Callable[[fx.Node], TokenRule],
    ) -> list[fx.Node]:
        """Take in the first of `nodes` that can be, and what comes with it."""
        for node in nodes:
            if node in refused or self.around.is_late(node) is not late or self._is_wide(node):
                continue
            try:
                self.around.check_free(node)
                added = self._add(node, rule(node))
            except NotByRows:
                refused.add(node)
                continue
            try:
                self._check_order(late)
            except NotByRows:
                self._remove(added)
                refused.add(node)
                continue
            return added
        return []

    def _check_order(self, late: bool) -> None:
        """Raise NotByRows where an operator outside has to run between those of one half of the step."""
        mine = [self.around.place[n] for n in self.rules if self.around.is_late(n) is late]
        if not mine:
            return
        behind: set[fx.Node] = set()
        for node in self.around.nodes[min(mine) : max(mine) + 1]:
            if self.around.is_late(node) is not late:
                continue
            sources = node.all_input_nodes
            if node not in self.rules:
                if ops.mutates(node.target) or ops.is_random(node):
                    raise NotByRows(
                        f"{node.name} between its operators is random or writes to an operand"
                    )
                if any(
                    n in behind or (n in self.rules and self.around.is_late(n) is late) for n in sources
                ):
                    behind.add(node)
            elif any(n in behind for n in sources):
                raise NotByRows(f"{node.name} needs what is not cut")

    def _border(self, late: bool) -> set[Storage]:
        """The storages with tokens that cross the border of the forward, or of all of the region."""
        found: set[Storage] = set()
        for node, rule in self.rules.items():
            if self.around.is_late(node) and not late:
                continue
            for source in rule.operands:
                if source not in self.rules:
                    found.update(self.around.storages[source])
            if rule.dims is not None and any(self._is_outside(u, late) for u in node.users):
                found.update(self.around.storages[node])
        return found

    def _is_outside(self, user: fx.Node, late: bool) -> bool:
        return user not in self.rules and (late or user in self.around.early)
