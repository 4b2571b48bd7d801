"""The copy of a program in which the rules of a streamed loss put their operators.

The nodes are copied in order. Where a rule knows what a node holds, its users may not need the node any
more, and what nobody needs is dropped at the end; so an operator that no rule knows costs memory and
never correctness. New nodes carry the facts of the node they were made for.
"""

import math
from collections.abc import Callable, Mapping
from operator import getitem as _getitem
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from graphopt.ops import is_random, may_recompute
from graphopt.passes.loss_values import PEAK, Head, Known, KnownRow, Raw, Row, Value
from graphopt.program import LEAVES, Program, set_value
from graphopt.stream_ops import NUMBERS, ops

aten = torch.ops.aten
NOTHING = -(2**62)  # an ignore index that no target has
_LAYOUT = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.detach.default,
    aten.alias.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
}

Found = Known | fx.Node | tuple[Known | None, fx.Node]
Rule = Callable[["Builder", fx.Node], Found | None]


class Builder:
    """A new graph, and for each node of the old one its copy (`new`) and what is `known` of it."""

    def __init__(
        self, program: Program, heads: Mapping[fx.Node, Head], rules: Mapping[Any, Rule]
    ) -> None:
        self.program = program
        self.heads = heads
        self.rules = rules
        self.graph = fx.Graph()
        self.new: dict[fx.Node, fx.Node] = {}
        self.known: dict[fx.Node, Known] = {}
        self.parts: dict[fx.Node, tuple[fx.Node, ...]] = {}  # results of a node that was replaced
        self.flattened: dict[fx.Node, fx.Node] = {}
        self.mixes: dict[tuple[fx.Node, ...], fx.Node] = {}
        self.weights: dict[Any, tuple[fx.Node, fx.Node]] = {}  # of the rows of a fused loss
        self.like: fx.Node
        self.fake_mode = fake_mode_of(program.graph)

    def run(self) -> None:
        """Copy every node, with what the rules make of it."""
        for node in self.program.graph.nodes:
            if node.op == "output":
                break
            self.like = node
            self._visit(node)

    def _visit(self, node: fx.Node) -> None:
        rule = self.rules.get(node.target) if node.op == "call_function" else None
        found = None
        if rule is not None and (self._reads_known(node) or self.is_wide(node)):
            found = rule(self, node)
        if found is None and node not in self.heads:
            self._note(node)
        known, new = found if isinstance(found, tuple) else (found, None)
        if isinstance(known, fx.Node):
            known, new = None, known
        if node in self.parts:
            self.new[node] = self.parts[node][0]
            return
        if new is None:
            new = self.graph.node_copy(node, lambda n: self.new[n])
            new.meta = dict(node.meta)
        self.new[node] = new
        if node in self.heads:
            self._begin(self.heads[node])
        elif known is not None:
            self.known[node] = known

    def _reads_known(self, node: fx.Node) -> bool:
        return any(n in self.known or n in self.parts for n in node.all_input_nodes)

    def is_wide(self, node: fx.Node) -> bool:
        """True for a tensor (.., V) with as many rows as a head."""
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            return False
        return self.head_like(value) is not None

    def head_like(self, value: torch.Tensor) -> Head | None:
        """A head whose logits have as many rows and columns as `value`."""
        rows, columns = value.numel() // max(1, value.shape[-1]), value.shape[-1]
        begun = (h for h in self.heads.values() if h.statistics is not None)
        return next((h for h in begun if (rows_of(h), h.vocabulary) == (rows, columns)), None)

    def _note(self, node: fx.Node) -> None:
        """Remember that a node reads the scores of a head in a way that no rule knows."""
        for source in node.all_input_nodes:
            known = self.known.get(source)
            if isinstance(known, (Raw, Value)) and known.head is not None:
                known.head.remarks.append(f"{node.name} ({node.target}) reads them")

    # --- making nodes --------------------------------------------------------------------------

    def call(self, target: Any, *args: Any, name: str | None = None, **kwargs: Any) -> fx.Node:
        """A new node, whose facts are found by running it on fake tensors."""
        node = self.graph.create_node("call_function", target, args, kwargs, name or self._name(target))
        read = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.fake_mode:
            value = target(*read[0], **read[1])
        skipped = ("val", "tensor_meta", LEAVES, "desc", "original_aten", "from_node")
        node.meta = {k: v for k, v in self.like.meta.items() if k not in skipped}
        set_value(node, value)
        return node

    def _name(self, target: Any) -> str:
        return f"stream_{getattr(target, '_opname', getattr(target, '__name__', 'node'))}"

    def items(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """The results of a node with several."""
        return tuple(self.call(_getitem, node, i) for i in range(len(node.meta["val"])))

    def turned(self, node: fx.Node) -> fx.Node:
        """The transpose of a matrix."""
        return self.call(aten.permute.default, node, [1, 0])

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """`node` in another dtype, if it has not that one."""
        if node.meta["val"].dtype is dtype:
            return node
        return self.call(torch.ops.prims.convert_element_type.default, node, dtype)

    def number(self, number: float, like: torch.Tensor) -> fx.Node:
        """A tensor of one number, of the shape of `like`."""
        options: dict[str, Any] = {"dtype": like.dtype, "device": like.device, "pin_memory": False}
        return self.call(aten.full.default, list(like.shape), number, **options)

    def where(self, mask: fx.Node, node: fx.Node) -> fx.Node:
        """`node` where the mask holds, else zero."""
        return self.call(aten.where.self, mask, node, self.number(0, node.meta["val"].new_empty(())))

    # --- heads ---------------------------------------------------------------------------------

    def _begin(self, head: Head) -> None:
        """The place of the statistics of `head`; their arguments are filled in at the end."""
        turned = self.turned(self.new[head.weight])
        operands = (self.new[head.x], turned, None, None, None, 1.0, 0.0, False, NOTHING, False, False)
        head.statistics = self.call(ops.streamed_statistics.default, *operands, head.vocabulary)
        self.known[head.linear] = Raw(head, head.bias)

    def numbers(self, head: Head) -> tuple[fx.Node, ...]:
        """log-sum-exp, picked logit, sum of logits, by the mix, by the softmax: (N,) each."""
        assert head.form is not None and head.statistics is not None
        if not head.numbers:
            here, self.like = self.like, head.linear
            head.numbers = self.items(head.statistics)
            self.like = here
        return head.numbers

    # --- rows ----------------------------------------------------------------------------------

    def row(self, head: Head, row: Row) -> fx.Node:
        """A node (N,) of the new graph that holds `row`."""
        assert PEAK not in row.terms
        total: fx.Node | None = None
        like = self.numbers(head)[0]
        for atom, factor in row.terms.items():
            if not isinstance(atom, fx.Node):
                continue
            term = atom if factor == 1 else self.call(aten.mul.Tensor, atom, factor)
            total = term if total is None else self.call(aten.add.Tensor, total, term)
        constant = row.terms.get(None, 0.0)
        if total is None:
            return self.number(constant, like.meta["val"])
        return total if not constant else self.call(aten.add.Tensor, total, constant)

    def product(self, head: Head, a: Row, b: Row) -> Row:
        """The product of two rows."""
        for one, other in ((a, b), (b, a)):
            if one.constant is not None:
                return other.times(one.constant)
        return Row({self.call(aten.mul.Tensor, self.row(head, a), self.row(head, b)): 1.0})

    def row_of(self, head: Head, item: Any) -> Row | None:
        """`item` as a row of `head`, which broadcasts over the vocabulary; None where it is none.

        `item` is a number or an original node of shape (), (.., 1).
        """
        if isinstance(item, (int, float)):
            return Row({None: float(item)}) if item else Row({})
        if not isinstance(item, fx.Node):
            return None
        known = self.known.get(item)
        if isinstance(known, KnownRow):
            return None if known.exponential else known.row
        value = item.meta.get("val")
        if not isinstance(value, torch.Tensor) or (value.dim() and value.shape[-1] != 1):
            return None
        if value.numel() not in (1, rows_of(head)) or not value.dtype.is_floating_point:
            return None
        return Row({self.flat(head, self.new[item]): 1.0})

    def flat(self, head: Head, node: fx.Node) -> fx.Node:
        """A node of the new graph with one number or one for each row, as (N,); floats in float64."""
        if node not in self.flattened:
            count, value = rows_of(head), node.meta["val"]
            found = node
            if tuple(value.shape) != (value.numel(),):
                found = self.call(aten.reshape.default, found, [value.numel()])
            dtype = self.numbers(head)[0].meta["val"].dtype
            if value.dtype.is_floating_point and value.dtype is not dtype:
                found = self.cast(found, dtype)
            if value.numel() != count:
                found = self.call(aten.expand.default, found, [count])
            self.flattened[node] = found
        return self.flattened[node]

    def shaped(self, node: fx.Node, row: fx.Node) -> fx.Node:
        """A row (N,) or a number of the new graph in the shape and dtype of the original `node`."""
        value, found = node.meta["val"], row
        if tuple(value.shape) != tuple(row.meta["val"].shape):
            found = self.call(aten.view.default, found, list(value.shape))
        if value.dtype is not row.meta["val"].dtype:
            found = self.cast(found, value.dtype)
        return found

    def mask_of(self, head: Head, item: Any) -> fx.Node | None:
        """A boolean tensor with one element for each row, as (N,) in the new graph."""
        value = item.meta.get("val") if isinstance(item, fx.Node) else None
        if not isinstance(value, torch.Tensor) or value.dtype is not torch.bool:
            return None
        if value.numel() != rows_of(head) or value.dim() == 0 or value.shape[-1] != 1:
            return None
        return self.flat(head, self.new[item])

    # --- what a head is given ------------------------------------------------------------------

    def adopt(self, raw: Raw) -> bool:
        """Take `raw` for the form in which its head is read; False where it is another one already."""
        head = raw.head
        if head.form is None:
            head.form = raw
            self._take(head, raw)
        return head.form == raw

    def _take(self, head: Head, form: Raw) -> None:
        """Give the statistics of `head` the rows of x that the loss reads, and the bias."""
        here, self.like = self.like, head.linear
        x = self.new[head.x]
        hidden = x.meta["val"].shape[-1]
        for item in form.slices:
            x = self.call(aten.view.default, x, [*item.lead, hidden])
            end = 2**63 - 1 if item.end is None else item.end
            x = self.call(aten.slice.Tensor, x, item.dim, item.start or 0, end, item.step)
        if form.slices:
            x = self.call(aten.reshape.default, x, [-1, hidden])
        self.like = here
        node = head.statistics
        assert node is not None
        bias = None if form.bias is None else self.new[form.bias]
        inner, cap = (form.inner, form.outer) if form.capped else (form.inner * form.outer, 0.0)
        node.args = (x, node.args[1], bias, None, None, inner, cap, *node.args[7:])
        old = node.meta["val"][0]
        with old.fake_mode:
            set_value(node, tuple(old.new_empty(rows_of(head)) for _ in range(NUMBERS)))

    def adopt_index(self, head: Head, index: fx.Node, ignore: int | None = None) -> bool:
        """Take the (original) `index` for the targets of `head`; False where they are others."""
        root = stripped(index)
        value = root.meta.get("val")
        if head.index is None and isinstance(value, torch.Tensor) and value.numel() == rows_of(head):
            head.index = root
        if head.index is None or not same_computation(head.index, root):
            return False
        if ignore is not None and head.ignore not in (None, ignore):
            return False
        head.ignore = head.ignore if ignore is None else ignore
        return True

    def adopt_mix(self, head: Head, mix: tuple[fx.Node, ...]) -> bool:
        """Take the product of `mix` (original nodes) for the mix of `head`."""
        if head.mix is None:
            head.mix = mix
        return head.mix == mix


def rows_of(head: Head) -> int:
    """The number of rows that the loss of `head` reads."""
    if head.form is None or not head.form.slices:
        return head.rows
    last = head.form.slices[-1]
    length = len(range(last.lead[last.dim])[last.start : last.end : last.step])
    return math.prod(last.lead) // last.lead[last.dim] * length


def same_computation(a: Any, b: Any) -> bool:
    """True where both hold the same numbers: one node, or one pure operator on the same."""
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
            return all(same_computation(x, y) for x, y in zip(a, b, strict=True))
        return type(a) is type(b) and bool(a == b)
    a, b = stripped(a), stripped(b)
    if a is b:
        return True
    if a.target is not b.target or a.op != "call_function" or not may_recompute(a) or is_random(a):
        return False
    return a.kwargs == b.kwargs and same_computation(a.args, b.args)


def stripped(node: fx.Node) -> fx.Node:
    """The node behind views of the same elements."""
    while node.target in _LAYOUT or node.target is aten.clone.default:
        node = node.all_input_nodes[0]
    return node


def transposed_root(node: fx.Node) -> tuple[fx.Node, bool]:
    """The matrix behind transposes, and whether it is transposed."""
    turned = False
    while True:
        if node.target is aten.t.default or (
            node.target is aten.permute.default and list(node.args[1]) == [1, 0]  # type: ignore[arg-type]
        ):
            turned = not turned
        elif node.target not in (aten.detach.default, aten.alias.default):
            return node, turned
        node = node.all_input_nodes[0]


def fake_mode_of(graph: fx.Graph) -> Any:
    """The mode that the values of `graph` were traced in."""
    values = (v for n in graph.nodes for v in pytree.tree_leaves(n.meta.get("val")))
    return next(v.fake_mode for v in values if isinstance(v, FakeTensor))
