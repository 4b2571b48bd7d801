"""A program with regions of operators on parts of their tokens, one part behind the other."""

import operator
from collections.abc import Sequence
from typing import Any

from torch import fx

from graphopt.cost_models.memory import BLOCK
from graphopt.passes.batch_rules import NotByRows
from graphopt.passes.token_regions import Region
from graphopt.passes.token_rules import Dims, aten, shape_of
from graphopt.program import Program, insert_call, leaves
from graphopt.split import late_nodes


class CannotJoin(NotByRows):
    """The region called `name` has an operator that does not take parts, or whose parts do not join."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


def in_parts(program: Program, regions: Sequence[Region], parts: int) -> Program:
    """`program` with every one of `regions` in `parts` parts of its tokens. Raises CannotJoin.

    The forward makes part after part and keeps nothing of them but what is read outside of the region.
    The backward makes of each part, the last one first, what it needs of the forward again, then the
    gradients of that part; sums over the tokens are added up. What no region cuts reads the parts joined.
    """
    return _TokenParts(program, regions, parts).program


class _TokenParts:
    def __init__(self, program: Program, regions: Sequence[Region], parts: int) -> None:
        self._count, self._late = parts, late_nodes(program)
        self._region = {node: region for region in regions for node in region.rules}
        self._graph = fx.Graph()
        self._copies: dict[fx.Node, fx.Node] = {}
        self._parts: dict[tuple[fx.Node, bool], dict[int, fx.Node]] = {}
        self._begun: set[tuple[str, bool]] = set()
        self._joined: dict[tuple[fx.Node, bool], fx.Node] = {}
        self._slices: dict[tuple[fx.Node, Dims, int, bool], fx.Node] = {}
        for node in program.graph.nodes:
            if node.op == "output":
                self._add_output(program, node)
            else:
                self._make(node)
        self._graph.eliminate_dead_code()
        self._graph.lint()
        module = fx.GraphModule(program.module, self._graph)
        module.meta = dict(program.module.meta)
        self.program = Program(module, program.num_forward_outputs, program.inputs, program.breaks)

    def _add_output(self, program: Program, node: fx.Node) -> None:
        count = program.num_forward_outputs
        results = [
            self._whole(o, late=place >= count) if isinstance(o, fx.Node) else o
            for place, o in enumerate(program.outputs)
        ]
        output = self._graph.output(tuple(results))
        output.meta = dict(node.meta)

    def _make(self, node: fx.Node) -> None:
        """Add `node`, or all parts of its region in its half of the step, after what it reads."""
        region, late = self._region.get(node), node in self._late
        if node in self._copies or (node, late) in self._parts:
            return
        if region is None:
            for source in node.all_input_nodes:
                self._make(source)
            self._copies[node] = self._copy(node, late)
            return
        mine = [n for n in region.rules if (n in self._late) is late]
        if late:
            mine = [*self._read_again(region, mine), *mine]
        if (region.name, late) in self._begun:
            raise CannotJoin(region.name, "what it reads depends on what it makes, through another block")
        self._begun.add((region.name, late))
        for source in dict.fromkeys(s for n in mine for s in n.all_input_nodes):
            if source not in mine:
                self._make(source)
        self._parts.update(((n, late), {}) for n in mine)
        count = self._parts_of(region)
        for index in reversed(range(count)) if late else range(count):
            for member in mine:
                self._add_part(region, member, index, late)

    def _read_again(self, region: Region, late: list[fx.Node]) -> list[fx.Node]:
        """The operators of the forward whose parts those `late` need, directly or through others."""
        stack, found = list(late), set()
        while stack:
            for source in stack.pop().all_input_nodes:
                if source in region.rules and source not in self._late and source not in found:
                    found.add(source)
                    stack.append(source)
        return [n for n in region.rules if n in found]

    def _copy(self, node: fx.Node, late: bool) -> fx.Node:
        made = self._graph.node_copy(node, lambda n: self._whole(n, late))
        made.meta = dict(node.meta)
        return made

    def _add_part(self, region: Region, node: fx.Node, index: int, late: bool) -> None:
        rule = region.rules[node]

        def operand(source: fx.Node) -> fx.Node:
            dims = rule.operands.get(source)
            if dims is None:
                return self._whole(source, late)
            return self._cut(region, source, dims, index, late)

        mapped: Any = fx.node.map_arg((node.args, dict(node.kwargs)), operand)
        args, kwargs = mapped
        if rule.sizes is not None:
            assert rule.dims is not None
            given = list(args[rule.sizes])
            first, last = self._ends(region, index)
            given[rule.dims[0] : rule.dims[-1] + 1] = [*(1 for _ in rule.dims[1:]), last - first]
            args = (*args[: rule.sizes], given, *args[rule.sizes + 1 :])
        before = self._copies.get(node)
        try:
            if before is not None and node.target is aten.mm.default:
                made = self._call(node, aten.addmm.default, (before, *args), index, late)
            else:
                made = self._call(node, node.target, args, index, late, kwargs)
                if before is not None:
                    made = self._call(node, aten.add.Tensor, (before, made), index, late)
        except RuntimeError as error:
            reason = f"does not take parts: {error}".splitlines()[0]
            raise CannotJoin(region.name, f"{node.name} {reason}") from error
        self._parts[node, late][index] = made
        if rule.dims is None:
            self._copies[node] = made

    def _call(
        self,
        node: fx.Node,
        target: Any,
        args: tuple[Any, ...],
        index: int,
        late: bool,
        kwargs: Any = None,
    ) -> fx.Node:
        again = "_again" if late and node not in self._late else ""
        made = insert_call(self._graph, node, target, args, kwargs, f"{node.name}_part{index}{again}")
        made.meta[BLOCK] = self._region[node].name
        return _on_side(made, late)

    def _parts_of(self, region: Region) -> int:
        return min(self._count, region.tokens)

    def _ends(self, region: Region, index: int) -> tuple[int, int]:
        """The first token of a part, and that behind its last."""
        count = self._parts_of(region)
        return index * region.tokens // count, (index + 1) * region.tokens // count

    def _cut(self, region: Region, source: fx.Node, dims: Dims, index: int, late: bool) -> fx.Node:
        """A part of `source`, which was computed so or is a slice of what is whole."""
        if self._region.get(source) is region:
            return self._parts[source, late][index]
        key = (source, dims, index, late)
        if key not in self._slices:
            whole, shape = self._whole(source, late), shape_of(source)
            tokens = [*(1 for _ in dims[1:]), region.tokens]
            flat = self._viewed(whole, (*shape[: dims[0]], *tokens, *shape[dims[-1] + 1 :]), late)
            args = (flat, dims[-1], *self._ends(region, index))
            name = f"{source.name}_part{index}"
            made = insert_call(self._graph, whole, aten.slice.Tensor, args, name=name)
            self._slices[key] = _on_side(made, late)
        return self._slices[key]

    def _viewed(self, node: fx.Node, shape: tuple[int, ...], late: bool) -> fx.Node:
        if node.meta["val"].shape == shape:
            return node
        name = f"{node.name}_tokens"
        made = insert_call(self._graph, node, aten.view.default, (node, list(shape)), name=name)
        return _on_side(made, late)

    def _whole(self, node: fx.Node, late: bool) -> fx.Node:
        """All of `node` for a reader in the forward, or `late` in the backward."""
        if node in self._copies:
            return self._copies[node]
        found = self._joined.get((node, False)) or self._joined.get((node, late))
        if found is None:
            found = self._joined[node, late] = self._join(node, late)
        return found

    def _join(self, node: fx.Node, late: bool) -> fx.Node:
        """What is a view, as that view of what is whole; all else as its parts together."""
        region, own = self._region[node], leaves(node)
        made_here = node.target is operator.getitem and not _is_view(node.all_input_nodes[0])
        if _is_view(node) and not made_here:
            return _on_side(self._copy(node, late), late)
        dims = region.rules[node].dims
        if dims is None or len(own) != 1:
            raise CannotJoin(region.name, f"{node.name} is read as a whole, and cannot be joined")
        parts = [self._parts[node, node in self._late][index] for index in range(self._parts_of(region))]
        name = f"{node.name}_whole"
        made = insert_call(self._graph, parts[0], aten.cat.default, (parts, dims[-1]), name=name)
        made = self._viewed(_on_side(made, late), shape_of(node), late)
        if made.meta["val"].stride() != node.meta["val"].stride():
            raise CannotJoin(region.name, f"{node.name} does not lie in memory as its parts joined")
        return made


def _is_view(node: fx.Node) -> bool:
    return all(leaf.alias is not None for leaf in leaves(node))


def _on_side(node: fx.Node, late: bool) -> fx.Node:
    if late:
        node.meta["partitioner_tag"] = "is_backward"
    return node
