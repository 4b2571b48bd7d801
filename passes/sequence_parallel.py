"""Sums over the ranks that every rank keeps a share of the tokens of, with the norms behind them.

An all-reduce is a reduce-scatter and an all-gather. Between the two, what treats tokens apart (the
residual addition, the norm) needs to be done for a rank's own tokens only, and the residual stream stays
in parts from one block to the next: sequence parallelism (Korthikanti et al., "Reducing activation
recomputation in large transformer models", MLSys 2023, section 4.2.2). As many bytes are sent as before.

A rank's share of what is no such sum, as the input of the first residual addition, is cut out of it: the
ranks of the group have the same inputs and the same weights of norms, as tensor parallelism has them.
What is itself on its way to a sum differs between them, and what is made of it stays whole.

In training the same is done behind the sums of the backward. Gradients of norms and biases sum over all
tokens: either gathered ones, the same bits as before, or, with `partial`, over each rank's own and then
over the ranks, equal up to rounding.
"""

import operator
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from graphopt import ops
from graphopt.errors import PlanError
from graphopt.passes.batch_rules import Batch, NotByRows, RowRule, row_rule
from graphopt.program import Program, insert_call, tensors_of
from graphopt.ranks import rank_of, size_of
from graphopt.split import late_nodes

aten, c10d = ops.aten, "_c10d_functional"
_BY_TOKENS = frozenset(
    {
        aten._to_copy.default,
        aten.mean.dim,
        aten.sum.dim_IntList,
        aten.native_layer_norm.default,
        aten._fused_rms_norm.default,
    }
)
_WITH_SUMS = (aten.native_layer_norm_backward.default, aten._fused_rms_norm_backward.default)


class CannotShard(PlanError):
    """Why no sum is left in parts; the same on all ranks."""


@dataclass(frozen=True)
class Shares:
    """What is done on shares of the tokens.

    `sums` has, for the wait of each all-reduce that is scattered, the dimension of the tokens; `rules`
    say how each operator behind them is cut. What sums over the tokens, and is added up over the ranks,
    is in `partial`.
    """

    ranks: int
    group: str
    sums: Mapping[fx.Node, int]
    rules: Mapping[fx.Node, RowRule]
    partial: Mapping[fx.Node, RowRule]

    @property
    def batch(self) -> Batch:
        """The tokens as a batch with a part for each rank."""
        return Batch(self.ranks, self.ranks)


def shares_of(program: Program, names: Collection[str] | None = None, *, partial: bool = False) -> Shares:
    """Follow the sums of the all-reduces `names` (None: of all that can be scattered) in `program`.

    With `partial`, sums over the tokens are begun on a rank's own. CannotShard where a name is none of
    these, or nothing behind them treats tokens apart.
    """
    starts = [n for n in program.operators() if names is None or n.name in names]
    sums = {wait: dim for n in starts for wait, dim in _scattered(n)}
    groups = {ops.transfer_of(wait.all_input_nodes[0]).group for wait in sums}  # type: ignore[union-attr]
    if len(groups) != 1:
        raise CannotShard("it has no sums over one group of ranks that divide by their number")
    group = str(groups.pop())
    rules, totals = _behind(program, sums, size_of(group), partial)
    used = {wait: dim for wait, dim in sums.items() if any(user in rules for user in wait.users)}
    if names is not None and (wrong := sorted(set(names) - {w.all_input_nodes[0].name for w in used})):
        raise CannotShard(f"{wrong[0]} is no sum that tokens can be left in parts of")
    if not any(ops.is_elementwise(n) or n.target in _BY_TOKENS for n in rules):
        raise CannotShard("nothing behind its sums treats tokens apart")
    return Shares(size_of(group), group, used, rules, totals)


def _scattered(start: fx.Node) -> Iterator[tuple[fx.Node, int]]:
    """The wait for an all-reduce, and the dimension along which its sum can be scattered, if any."""
    waits = [user for user in start.users if ops.is_wait(user)]
    if ops.schema_name(start.target) != f"{c10d}::all_reduce" or start.args[1] != "sum":
        return
    if len(waits) != 1 or len(start.users) != 1:
        return
    ranks, shape = size_of(str(start.args[2])), tuple(start.meta["val"].shape)
    if len(shape) > 1 and ranks > 1 and start.meta["val"].is_contiguous():
        dim = 1 if shape[0] == 1 and len(shape) > 2 else 0
        if shape[dim] % ranks == 0:
            yield waits[0], dim


def _behind(
    program: Program, sums: Mapping[fx.Node, int], ranks: int, partial: bool
) -> tuple[dict[fx.Node, RowRule], dict[fx.Node, RowRule]]:
    """What can be done on shares of the tokens, and what sums over them if that may be `partial`.

    Without views that only others need.
    """
    known = {wait: RowRule((dim,)) for wait, dim in sums.items()}
    rules: dict[fx.Node, RowRule] = {}
    totals: dict[fx.Node, RowRule] = {}
    differing = _differing(program)
    for node in program.operators():
        by_tokens = ops.is_elementwise(node) or node.target in _BY_TOKENS
        by_tokens = by_tokens or (partial and node.target in _WITH_SUMS)
        if not (by_tokens or _is_passive(node)) or known.keys().isdisjoint(node.all_input_nodes):
            continue
        if node in differing:
            continue
        try:
            rule = row_rule(node, known, Batch(ranks, ranks))
        except NotByRows:
            if partial and (total := _total(node, known)) is not None:
                totals[node] = total
            continue
        rules[node] = known[node] = rule
    for node in reversed(list(rules)):
        used = any(user in rules or user in totals for user in node.users)
        if ops.is_view(node.target) and not used:
            del rules[node]
    return rules, totals


def _total(node: fx.Node, known: Mapping[fx.Node, RowRule]) -> RowRule | None:
    """The rule of a sum over the tokens; None where `node` is none."""
    source: Any = node.args[0]
    if node.target is operator.getitem:
        return RowRule((None,)) if source.target in _WITH_SUMS and source in known else None
    if node.target is not aten.sum.dim_IntList or not node.meta["val"].is_floating_point():
        return None
    (dim,) = known[source].dims
    return None if dim is None else RowRule((None,), {source: dim})


def _differing(program: Program) -> set[fx.Node]:
    """What is not the same on all ranks: that which comes to a sum without another product.

    And what is computed of it, up to the next sum or gather.
    """
    found: set[fx.Node] = set()
    for node in reversed(list(program.operators())):
        is_sum = _kind(node) in ("all_reduce", "reduce_scatter")
        if is_sum or (node in found and (ops.is_elementwise(node) or _is_passive(node))):
            found.update(node.all_input_nodes)
    for node in program.operators():
        kind = _kind(node)
        apart = kind in ("reduce_scatter", "all_to_all")
        if apart or (not kind and not found.isdisjoint(node.all_input_nodes)):
            found.add(node)
    return found


def _kind(node: fx.Node) -> str:
    transfer = ops.transfer_of(node)
    return "" if transfer is None else transfer.kind


def _is_passive(node: fx.Node) -> bool:
    """True for what computes nothing: views, and a result taken from several."""
    return ops.is_view(node.target) or node.target is operator.getitem


class TokenShares:
    """`program` with `shares` done on the share of this rank; `parts` has the new node for each of them.

    Where others read such a value, it is gathered, in the backward if that alone reads it. CannotShard
    where one of them is not one tensor.
    """

    def __init__(self, program: Program, names: Collection[str], *, partial: bool = False) -> None:
        self.program = program.copy()
        self.shares = shares_of(self.program, names, partial=partial)
        self._rank = rank_of(self.shares.group)
        self._graph, self._late = self.program.graph, late_nodes(self.program)
        self._place = {node: index for index, node in enumerate(self._graph.nodes)}
        self._new: dict[fx.Node, fx.Node] = {}
        self._slices: dict[tuple[fx.Node, int], fx.Node] = {}
        done = [*self.shares.sums, *self.shares.rules]
        for node in list(self._graph.nodes):
            if node in self.shares.sums:
                self._new[node] = self._scatter(node)
            elif node in self.shares.rules:
                self._new[node] = self._part(node, self.shares.rules[node])
            elif node in self.shares.partial:
                self._add_up(node)
        for node in done:
            self._gather(node)
        for node in sorted([*done, *self.shares.partial], key=self._place.__getitem__, reverse=True):
            start = node.all_input_nodes[0]
            self._graph.erase_node(node)
            if node in self.shares.sums:
                self._graph.erase_node(start)
        self._graph.eliminate_dead_code()
        self._graph.lint()
        self.program.module.recompile()
        self.parts = {old.name: new for old, new in self._new.items() if old in self.shares.rules}

    def _call(self, after: fx.Node, target: Any, *args: Any, name: str) -> fx.Node:
        with self._graph.inserting_after(after):
            return insert_call(self._graph, after, target, args, name=name)

    def _add_up(self, node: fx.Node) -> None:
        """The sum over the tokens of all ranks, from that over the tokens of this one."""
        operators: Any = _collectives()
        own = self._part(node, self.shares.partial[node])
        call = operators.all_reduce.default
        begun = self._call(own, call, own, "sum", self.shares.group, name=f"{node.name}_partial")
        ended = self._call(begun, operators.wait_tensor.default, begun, name=f"{node.name}_total")
        node.replace_all_uses_with(ended)

    def _scatter(self, wait: fx.Node) -> fx.Node:
        """The share of a sum that this rank adds up."""
        start, dim, name = wait.all_input_nodes[0], self.shares.sums[wait], wait.name
        source, shape = start.all_input_nodes[0], list(start.meta["val"].shape)
        operators: Any = _collectives()
        flat = self._call(wait, aten.view.default, source, shape[dim:], name=f"{source.name}_rows")
        call = operators.reduce_scatter_tensor.default
        args = (flat, "sum", self.shares.ranks, self.shares.group)
        begun = self._call(flat, call, *args, name=f"{start.name}_scattered")
        ended = self._call(begun, operators.wait_tensor.default, begun, name=f"{name}_scattered")
        shape[dim] //= self.shares.ranks
        return self._call(ended, aten.view.default, ended, shape, name=f"{name}_share")

    def _part(self, node: fx.Node, rule: RowRule) -> fx.Node:
        def operand(source: fx.Node) -> fx.Node:
            if source in self._new:
                return self._new[source]
            dim = rule.operands.get(source)
            return source if dim is None else self._slice(source, dim, node)

        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), operand)
        given: list[Any] = list(args)
        if rule.sizes is not None:
            (dim,) = rule.dims
            sizes = list(given[rule.sizes])
            sizes[dim] = node.meta["val"].shape[dim] // self.shares.ranks  # type: ignore[index]
            given[rule.sizes] = sizes
        assert callable(node.target)
        with self._graph.inserting_before(node):
            name = f"{node.name}_share"
            return insert_call(self._graph, node, node.target, tuple(given), kwargs, name)

    def _slice(self, source: fx.Node, dim: int, reader: fx.Node) -> fx.Node:
        """The share of this rank of what is whole, before its first `reader`."""
        if (source, dim) not in self._slices:
            size = source.meta["val"].shape[dim] // self.shares.ranks
            args = (source, dim, self._rank * size, (self._rank + 1) * size)
            with self._graph.inserting_before(reader):
                made = insert_call(
                    self._graph, source, aten.slice.Tensor, args, name=f"{source.name}_share"
                )
            self._slices[source, dim] = made
        return self._slices[source, dim]

    def _gather(self, node: fx.Node) -> None:
        """Give those that read all of `node` the shares of all ranks, joined."""
        new, shares = self._new[node], self.shares
        readers = [n for n in node.users if n not in shares.rules and n not in shares.partial]
        if not readers:
            return
        if len(tensors_of(node)) != 1:
            raise CannotShard(f"{node.name} is read as a whole, and has several results")
        if not node.meta["val"].is_contiguous():
            raise CannotShard(f"{node.name} is read as a whole, and lies in memory as no shares do")
        dim = shares.sums[node] if node in shares.sums else shares.rules[node].dims[0]
        shape = list(new.meta["val"].shape)
        if dim is None or any(size != 1 for size in shape[:dim]):
            raise CannotShard(f"{node.name} is read as a whole, and its shares do not join to that")
        only_late = node not in self._late and all(reader in self._late for reader in readers)
        # in the backward before the first reader of it, else at once
        place = min(readers, key=self._place.__getitem__) if only_late else new.next
        operators: Any = _collectives()

        def call(target: Any, *args: Any, name: str) -> fx.Node:
            with self._graph.inserting_before(place):
                made = insert_call(self._graph, new, target, args, name=f"{node.name}_{name}")
            if only_late:
                made.meta["partitioner_tag"] = "is_backward"
            return made

        dense = new
        if not new.meta["val"].is_contiguous():
            dense = call(aten.clone.default, new, name="dense")
        flat = call(aten.view.default, dense, shape[dim:], name="rows")
        gather = operators.all_gather_into_tensor.default
        begun = call(gather, flat, shares.ranks, shares.group, name="gathered")
        ended = call(operators.wait_tensor.default, begun, name="joined")
        whole = call(aten.view.default, ended, list(node.meta["val"].shape), name="whole")
        for reader in readers:
            reader.replace_input_with(node, whole)


def _collectives() -> Any:
    import torch

    return torch.ops._c10d_functional
