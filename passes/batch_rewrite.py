"""A program whose operators run on parts of the batch: the parts, and where they are joined again."""

import operator
from collections.abc import Mapping
from typing import Any

from torch import fx

from graphopt import ops
from graphopt.passes.batch_rules import Batch, NotByRows, RowRule, aten
from graphopt.passes.causal_parts import arguments_of_part, keys_of, mask_calls, padding
from graphopt.program import Program, insert_call
from graphopt.split import late_nodes


class CannotCut(NotByRows):
    """An operator, by its `name`, that does not take parts of its operands."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


class BatchParts:
    """`program` with the operators `rules` on parts of the batch.

    `program` is the result, `parts` its nodes for each operator that was cut, by the operator's name.
    An operator that is not cut reads the parts joined: views are made anew from what they look at, all
    else is concatenated, in the backward where that alone reads it. Raises CannotCut.
    """

    def __init__(self, program: Program, rules: Mapping[fx.Node, RowRule], batch: Batch) -> None:
        self._rules, self._batch, self._late = rules, batch, late_nodes(program)
        self._graph = fx.Graph()
        self._copies: dict[fx.Node, fx.Node] = {}
        self._made: dict[tuple[fx.Node, bool], fx.Node] = {}
        self._slices: dict[tuple[fx.Node, int, int, bool], fx.Node] = {}
        self._keys: dict[tuple[fx.Node, int, bool], fx.Node] = {}
        self._masks: dict[tuple[Any, ...], fx.Node] = {}
        self._parts: dict[fx.Node, list[fx.Node]] = {}
        self._returned = {o for o in program.forward_outputs if isinstance(o, fx.Node)}
        for node in program.graph.nodes:
            self._add(node)
        self._graph.eliminate_dead_code()
        self._graph.lint()
        alive = set(self._graph.nodes)
        self.parts = {n.name: parts for n, parts in self._parts.items() if alive.issuperset(parts)}
        module = fx.GraphModule(program.module, self._graph)
        module.meta = dict(program.module.meta)
        self.program = Program(module, program.num_forward_outputs, program.inputs, program.breaks)

    def _add(self, node: fx.Node) -> None:
        late = node in self._late or node.op == "output"
        if node in self._rules:
            self._parts[node] = [self._part(node, index) for index in range(self._batch.parts)]
            if node in self._returned:
                self._whole(node, late=False)
        else:
            self._copies[node] = self._copy(node, late)

    def _copy(self, node: fx.Node, late: bool) -> fx.Node:
        made = self._graph.node_copy(node, lambda n: self._whole(n, late))
        made.meta = dict(node.meta)
        return made

    def _part(self, node: fx.Node, index: int) -> fx.Node:
        rule, late = self._rules[node], node in self._late

        def operand(source: fx.Node) -> fx.Node:
            if node.target is operator.getitem:
                return self._parts[source][index]
            dim = rule.operands.get(source)
            return self._whole(source, late) if dim is None else self._cut(source, dim, index, late)

        given: Any = fx.node.map_arg((node.args, dict(node.kwargs)), operand)
        args, kwargs, target = list(given[0]), given[1], node.target
        if rule.sizes is not None:
            args[rule.sizes] = self._sizes(node, rule, args[rule.sizes], index)
        if rule.mask is not None:
            args[rule.mask] = wanted(args[rule.mask], rule, cut=True)
        if rule.upto:
            for place in rule.upto:
                args[place] = self._upto(node.args[place], rule, index, late)
            args, kwargs = arguments_of_part(args, kwargs, self._mask(node, rule, index, args))
        assert callable(target)
        try:
            name = f"{node.name}_part{index}"
            return insert_call(self._graph, node, target, tuple(args), kwargs, name)
        except RuntimeError as error:
            raise CannotCut(node.name, f"does not take parts: {error}".splitlines()[0]) from error

    def _sizes(self, node: fx.Node, rule: RowRule, given: Any, index: int) -> list[int]:
        (dim,) = rule.dims
        assert dim is not None
        sizes, cuts = list(given), self._batch.cuts(node.meta["val"].shape[dim])
        sizes[dim] = cuts[index + 1] - cuts[index]
        return sizes

    def _cut(self, source: fx.Node, dim: int, index: int, late: bool) -> fx.Node:
        """A part of `source`, which was computed so or is a slice of what is whole."""
        if source in self._parts:
            return self._parts[source][index]
        key = (source, dim, index, late)
        if key not in self._slices:
            cuts = self._batch.cuts(source.meta["val"].shape[dim])
            args = (self._whole(source, late), dim, cuts[index], cuts[index + 1])
            name = f"{source.name}_part{index}"
            made = insert_call(self._graph, self._copies[source], aten.slice.Tensor, args, name=name)
            self._slices[key] = _on_side(made, late)
        return self._slices[key]

    def _upto(self, source: Any, rule: RowRule, index: int, late: bool) -> fx.Node:
        """The rows of `source` up to the last of a part, and zeros as `keys_of` says."""
        if index == self._batch.parts - 1:
            return self._whole(source, late)
        key = (source, index, late)
        if key not in self._keys:
            self._keys[key] = self._first_rows(source, rule.operands[source], index, late)
        return self._keys[key]

    def _first_rows(self, source: fx.Node, dim: int, index: int, late: bool) -> fx.Node:
        """The parts of `source` up to number `index`, joined, with zeros behind them."""

        def call(target: Any, *args: Any) -> fx.Node:
            name = f"{source.name}_upto{index}"
            return _on_side(insert_call(self._graph, source, target, args, name=name), late)

        shape = source.meta["val"].shape
        end, zeros = keys_of(self._batch, index, shape[dim])
        parts = self._parts[source][: index + 1] if source in self._parts else []
        if not parts:
            made = call(aten.slice.Tensor, self._whole(source, late), dim, 0, end)
        else:
            made = parts[0] if len(parts) == 1 else call(aten.cat.default, parts, dim)
        if zeros:
            made = call(aten.constant_pad_nd.default, made, padding(len(shape), dim, zeros))
        return made

    def _mask(self, node: fx.Node, rule: RowRule, index: int, args: Any) -> fx.Node | None:
        """The mask of a part of causal attention; None for the first, which needs none."""
        if index == 0:
            return None
        queries, keys = (args[i].meta["val"] for i in (0, rule.upto[0]))
        dim = rule.operands[node.args[0]]  # type: ignore[index]
        first = self._batch.cuts(node.args[0].meta["val"].shape[dim])[index]  # type: ignore[union-attr]
        facts = queries.shape[dim], keys.shape[dim], first
        key = (*facts, queries.dtype, queries.device)
        if key not in self._masks:
            before: tuple[fx.Node, ...] = ()
            for target, given, named in mask_calls(*facts, queries):
                name = f"hidden_part{index}"
                made = insert_call(self._graph, node, target, (*before, *given), named, name)
                before = (made,)
            (self._masks[key],) = before
        return self._masks[key]

    def _whole(self, node: fx.Node, late: bool) -> fx.Node:
        """All of `node` for a reader in the forward, or `late` in the backward."""
        if node in self._copies:
            return self._copies[node]
        found = self._made.get((node, False)) or self._made.get((node, late))
        if found is None:
            found = self._made[node, late] = _on_side(self._joined(node, late), late)
        return found

    def _joined(self, node: fx.Node, late: bool) -> fx.Node:
        rule = self._rules[node]
        if rule.mask is not None or ops.is_view(node.target):
            made = self._copy(node, late)
            if rule.mask is not None:
                made.update_arg(rule.mask, wanted(node.args[rule.mask], rule, cut=False))
            return made
        if ops.transfer_of(node) is not None or len(rule.dims) > 1:
            raise CannotCut(node.name, "is read as a whole, and cannot be joined")
        val, dim, parts = node.meta["val"], rule.dims[0], self._parts[node]
        assert dim is not None
        if val.is_contiguous():
            made = self._call(node, aten.cat.default, parts, dim)
        else:  # joined as it lies in memory
            order = sorted(range(val.dim()), key=lambda d: (-val.stride(d), d))
            back = [order.index(d) for d in range(val.dim())]
            laid = [self._call(node, aten.permute.default, part, order) for part in parts]
            made = self._call(node, aten.cat.default, laid, order.index(dim))
            made = self._call(node, aten.permute.default, made, back)
        if _layout(made.meta["val"]) != _layout(val):
            raise CannotCut(node.name, f"has the layout {val.stride()}, which its parts do not join to")
        return made

    def _call(self, node: fx.Node, target: Any, *args: Any) -> fx.Node:
        return insert_call(self._graph, self._parts[node][0], target, args, name=f"{node.name}_whole")


def wanted(mask: Any, rule: RowRule, *, cut: bool) -> list[bool]:
    """Which results a call makes: on a part those that are `cut`, on the whole batch the others."""
    return [bool(want) and (dim is not None) is cut for want, dim in zip(mask, rule.dims, strict=True)]


def _on_side(node: fx.Node, late: bool) -> fx.Node:
    if late:
        node.meta["partitioner_tag"] = "is_backward"
    return node


def _layout(tensor: Any) -> list[tuple[int, int]]:
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return [(size, stride if size > 1 else 0) for size, stride in pairs]
