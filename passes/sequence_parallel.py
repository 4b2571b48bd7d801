"""Sums over the ranks that every rank keeps a share of the tokens of, with the norms behind them.

An all-reduce is a reduce-scatter and an all-gather. Between the two, what treats tokens apart (the
residual addition, the norm) needs to be done for a rank's own tokens only, and the residual stream stays
in parts from one block to the next: sequence parallelism (Korthikanti et al., "Reducing activation
recomputation in large transformer models", MLSys 2023, section 4.2.2). As many bytes are sent as before.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from graphopt import ops
from graphopt.errors import PlanError
from graphopt.passes.batch_rules import Batch, NotByRows, RowRule, row_rule
from graphopt.program import Program, insert_call, tensors_of
from graphopt.ranks import rank_of, size_of

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


class CannotShard(PlanError):
    """Why no sum is left in parts; the same on all ranks."""


@dataclass(frozen=True)
class Shares:
    """What is done on shares of the tokens.

    `sums` has, for the wait of each all-reduce that is scattered, the dimension of the tokens; `rules`
    say how each operator behind them is cut.
    """

    ranks: int
    group: str
    sums: Mapping[fx.Node, int]
    rules: Mapping[fx.Node, RowRule]

    @property
    def batch(self) -> Batch:
        """The tokens as a batch with a part for each rank."""
        return Batch(self.ranks, self.ranks)


def shares_of(program: Program, names: Collection[str] | None = None) -> Shares:
    """Follow the sums of the all-reduces `names` (None: of all that can be scattered) in `program`.

    CannotShard where a name is none of these, or nothing behind them treats tokens apart.
    """
    if program.is_joint:
        raise CannotShard("the program has a backward")
    starts = [n for n in program.operators() if names is None or n.name in names]
    sums = {wait: dim for n in starts for wait, dim in _scattered(n)}
    groups = {ops.transfer_of(wait.all_input_nodes[0]).group for wait in sums}  # type: ignore[union-attr]
    if len(groups) != 1:
        raise CannotShard("it has no sums over one group of ranks that divide by their number")
    group = str(groups.pop())
    rules = _behind(program, sums, size_of(group))
    used = {wait: dim for wait, dim in sums.items() if any(user in rules for user in wait.users)}
    if names is not None and (wrong := sorted(set(names) - {w.all_input_nodes[0].name for w in used})):
        raise CannotShard(f"{wrong[0]} is no sum that tokens can be left in parts of")
    if not any(ops.is_elementwise(n) or n.target in _BY_TOKENS for n in rules):
        raise CannotShard("nothing behind its sums treats tokens apart")
    return Shares(size_of(group), group, used, rules)


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


def _behind(program: Program, sums: Mapping[fx.Node, int], ranks: int) -> dict[fx.Node, RowRule]:
    """What can be done on shares of the tokens, without views that only others need."""
    known = {wait: RowRule((dim,)) for wait, dim in sums.items()}
    rules: dict[fx.Node, RowRule] = {}
    for node in program.operators():
        by_tokens = ops.is_elementwise(node) or node.target in _BY_TOKENS
        if not (by_tokens or _is_passive(node)) or known.keys().isdisjoint(node.all_input_nodes):
            continue
        try:
            rules[node] = known[node] = row_rule(node, known, Batch(ranks, ranks))
        except NotByRows:
            continue
    for node in reversed(list(rules)):
        if ops.is_view(node.target) and not any(user in rules for user in node.users):
            del rules[node]
    return rules


def _is_passive(node: fx.Node) -> bool:
    """True for what computes nothing: views, and a result taken from several."""
    return ops.is_view(node.target) or getattr(node.target, "__name__", "") == "getitem"


class TokenShares:
    """`program` with `shares` done on the share of this rank; `parts` has the new node for each of them.

    Where others read such a value, it is gathered. CannotShard where one of them is not one tensor.
    """

    def __init__(self, program: Program, names: Collection[str]) -> None:
        self.program = program.copy()
        self.shares = shares_of(self.program, names)
        self._rank = rank_of(self.shares.group)
        self._graph = self.program.graph
        self._new: dict[fx.Node, fx.Node] = {}
        self._slices: dict[tuple[fx.Node, int], fx.Node] = {}
        done = [*self.shares.sums, *self.shares.rules]
        for node in list(self._graph.nodes):
            if node in self.shares.sums:
                self._new[node] = self._scatter(node)
            elif node in self.shares.rules:
                self._new[node] = self._part(node)
        for node in done:
            self._gather(node)
        for node in sorted(done, key=list(self._graph.nodes).index, reverse=True):
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

    def _part(self, node: fx.Node) -> fx.Node:
        rule = self.shares.rules[node]

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
        new, rules = self._new[node], self.shares.rules
        readers = [user for user in node.users if user not in rules]
        if not readers:
            return
        if len(tensors_of(node)) != 1:
            raise CannotShard(f"{node.name} is read as a whole, and has several results")
        dim = self.shares.sums[node] if node in self.shares.sums else rules[node].dims[0]
        shape = list(new.meta["val"].shape)
        if dim is None or any(size != 1 for size in shape[:dim]):
            raise CannotShard(f"{node.name} is read as a whole, and its shares do not join to that")
        operators: Any = _collectives()
        dense = self._call(new, aten.clone.default, new, name=f"{node.name}_dense")
        if new.meta["val"].is_contiguous():
            self._graph.erase_node(dense)
            dense = new
        flat = self._call(dense, aten.view.default, dense, shape[dim:], name=f"{node.name}_rows")
        call, args = (
            operators.all_gather_into_tensor.default,
            (flat, self.shares.ranks, self.shares.group),
        )
        begun = self._call(flat, call, *args, name=f"{node.name}_gathered")
        ended = self._call(begun, operators.wait_tensor.default, begun, name=f"{node.name}_joined")
        sizes = list(node.meta["val"].shape)
        whole = self._call(ended, aten.view.default, ended, sizes, name=f"{node.name}_whole")
        for reader in readers:
            reader.replace_input_with(node, whole)


def _collectives() -> Any:
    import torch

    return torch.ops._c10d_functional
