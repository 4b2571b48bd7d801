"""A program with its losses over a vocabulary on streamed operators, forward and backward together.

`streamed` finds the projections that a loss reads, lets `graphopt.passes.loss_rules` rewrite what
follows them, and keeps those whose whole way from projection to loss and back was understood.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import fx

from graphopt.passes.loss_builder import NOTHING, Builder
from graphopt.passes.loss_reductions import mix_node
from graphopt.passes.loss_rules import RULES
from graphopt.passes.loss_values import Head, Raw
from graphopt.program import Program, Role, set_value
from graphopt.split import late_nodes
from graphopt.stream_ops import EXPECTED, ops

aten = torch.ops.aten
RETURNS = ("logits", "lazy", "loss")
_READS = {aten._log_softmax.default, aten.logsumexp.default, aten.amax.default}
_LINEAR = {aten.mm.default, aten.addmm.default}
_PRODUCTS = {*_LINEAR, aten.bmm.default}
_TARGETS, _MIX, _SUMMED, _IGNORE = 3, 4, 7, 8  # positions among the arguments


@dataclass(frozen=True)
class Streamed:
    """A rewritten program, the heads in it, and why other projections were left alone, by name."""

    program: Program
    heads: tuple[Head, ...]
    remarks: tuple[str, ...]


def streamed(program: Program, only: Collection[str] | None = None, returns: str = "logits") -> Streamed:
    """`program` with every loss on streamed operators that can be, or those of the heads `only`.

    `returns` is one of RETURNS: what becomes of logits among the outputs.
    """
    left: dict[fx.Node, str] = {}
    found = heads_of(program)
    while True:
        wanted = [n for n in found if n not in left and (only is None or n.name in only)]
        heads = {node: _head(node) for node in wanted}
        builder = Builder(program, heads, RULES)
        builder.run()
        result = _finished(program, builder, returns)
        wrong = {node: _reason(head) for node, head in heads.items() if not _is_whole(program, head)}
        if not wrong:
            break
        left |= wrong
    left |= dict(_unreached(program, found))
    remarks = tuple(f"{node.name} is left alone: {reason}" for node, reason in left.items())
    return Streamed(result, tuple(heads.values()), remarks)


def heads_of(program: Program) -> list[fx.Node]:
    """The matrix products of the forward whose columns a loss reads, in order."""
    late = late_nodes(program)
    products = (n for n in program.operators() if n.target in _LINEAR)
    return [n for n in products if n not in late and not n.kwargs and _reaches_a_loss(n, late)]


def _reaches_a_loss(node: fx.Node, late: Collection[fx.Node]) -> bool:
    columns = _columns(node)
    stack, seen = [node], {node}
    while stack:
        for user in stack.pop().users:
            if user in seen or user in late:
                continue
            if user.target in _READS and _over_last(user):
                return True
            if _columns(user) == columns and user.target not in _PRODUCTS:
                seen.add(user)
                stack.append(user)
    return False


def _unreached(program: Program, found: Collection[fx.Node]) -> Iterator[tuple[fx.Node, str]]:
    """Other products before a log-softmax, and the first operator between that is not followed.

    Where there is no product before it in this graph, the log-softmax itself.
    """
    for node in program.operators():
        if node.target not in _READS:
            continue
        stopped = last = node
        while last.all_input_nodes and last.target not in _LINEAR:
            before = last.all_input_nodes[0]
            if last.target not in RULES or _columns(last) != _columns(before):
                stopped = last
            last = before
        if last.target in _LINEAR and last not in found:
            yield last, f"{stopped.name} ({stopped.target}) is not followed to {node.name}"
        if node.target is aten._log_softmax.default and program.roles.get(last.name) is Role.INPUT:
            yield node, f"{last.name} is an input, made before this graph or a graph break"


def _columns(node: fx.Node) -> int | None:
    """The length of the last dimension of a tensor."""
    value = node.meta.get("val")
    return int(value.shape[-1]) if isinstance(value, torch.Tensor) and value.dim() else None


def _over_last(node: fx.Node) -> bool:
    size = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    dims = node.args[1] if len(node.args) > 1 else None
    listed = list(dims) if isinstance(dims, (list, tuple)) else [dims]
    return listed in ([-1], [size - 1])


def _head(node: fx.Node) -> Head:
    *bias, x, weight = node.args
    assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
    (rows, hidden), columns = x.meta["val"].shape, weight.meta["val"].shape[1]
    given = bias[0] if bias else None
    assert given is None or isinstance(given, fx.Node)
    return Head(node, x, weight, given, int(rows), int(columns), int(hidden))


def _is_whole(program: Program, head: Head) -> bool:
    """True where the loss, and in a joint program its gradient, is made by the new operators."""
    assert head.statistics is not None
    if head.gradients is not None:
        return bool(head.gradients.users)
    return not program.is_joint and bool(head.statistics.users)


def _reason(head: Head) -> str:
    if head.remarks:
        return head.remarks[0]
    return "no gradient of it was found" if head.form else "no loss reads it"


def _finished(program: Program, builder: Builder, returns: str) -> Program:
    """The new program: outputs, the arguments that were not known before, and an order that holds."""
    old = program.graph.output_node()
    results = [builder.new[o] if isinstance(o, fx.Node) else o for o in program.outputs]
    if returns != "logits":
        for place, item in enumerate(program.forward_outputs):
            results[place] = _absent(builder, item, returns == "lazy") or results[place]
    for head in builder.heads.values():
        _fill_in(builder, head)
    output = builder.graph.output(tuple(results))
    output.meta = dict(old.meta)
    put_in_order(builder.graph)
    builder.graph.eliminate_dead_code()
    for head in builder.heads.values():
        _drop_unread(builder, head)
    builder.graph.lint()
    module = fx.GraphModule(program.module, builder.graph)
    return Program(module, program.num_forward_outputs, program.inputs, program.breaks)


def _absent(b: Builder, item: object, lazy: bool) -> fx.Node | None:
    """What is returned in place of the logits `item` (original); None where that are no logits."""
    known = b.known.get(item) if isinstance(item, fx.Node) else None
    if not isinstance(known, Raw) or known.slices or known.head.statistics is None:
        return None
    assert isinstance(item, fx.Node)
    head, value = known.head, item.meta["val"]
    b.like = head.linear
    bias = None if known.bias is None else b.new[known.bias]
    inner, cap = (known.inner, known.outer) if known.capped else (known.inner * known.outer, 0.0)
    operands = (b.new[head.x], head.statistics.args[1], bias, inner, cap)  # type: ignore[union-attr]
    return b.call(ops.absent_logits.default, *operands, list(value.shape), value.dtype, lazy)


def _fill_in(b: Builder, head: Head) -> None:
    assert head.statistics is not None
    b.like = head.linear
    targets = None if head.index is None else b.new[head.index]
    if targets is not None and targets.meta["val"].dim() != 1:
        targets = b.call(aten.reshape.default, targets, [-1])
    mix = None if head.mix is None else mix_node(b, head.mix)
    ignore = NOTHING if head.ignore is None else head.ignore
    for node in (head.statistics, head.gradients):
        if node is not None:
            arguments = list(node.args)
            arguments[_TARGETS], arguments[_MIX] = targets, mix
            arguments[_SUMMED], arguments[_IGNORE] = head.summed, ignore
            arguments[EXPECTED] = head.expected
            node.args = tuple(arguments)


def _drop_unread(b: Builder, head: Head) -> None:
    """Make only those gradients that are read."""
    node = head.gradients
    if node is None or not node.users:
        return
    read = {user.args[1] for user in node.users}
    wanted = [i in read for i in range(3)]
    node.args = (*node.args[:-1], wanted)
    old = node.meta["val"]
    with old[0].fake_mode:
        set_value(node, tuple(t if w else t.new_empty((0,)) for t, w in zip(old, wanted, strict=True)))


def put_in_order(graph: fx.Graph) -> None:
    """Move every node behind what it reads, and change the order no further than that."""
    order: list[fx.Node] = []
    done: set[fx.Node] = set()
    for first in list(graph.nodes):
        stack = [first]
        while stack:
            node = stack[-1]
            missing = [n for n in node.all_input_nodes if n not in done]
            if missing:
                stack.extend(reversed(missing))
                continue
            stack.pop()
            if node not in done:
                done.add(node)
                order.append(node)
    for before, node in pairwise(order):
        before.append(node)
