"""Lowering to what runs in eager order: boxed modules that write over dead operands.

An operator of the table in `graphopt.ops` whose operand dies with it and has the layout of the result
writes the result over the operand. The arithmetic is the same, bit for bit; the allocation is gone.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx
from torch.fx.graph import _BoxedCodeGen

from graphopt import ops
from graphopt.cost_models.memory import may_lie_over, may_overwrite
from graphopt.fused_ops import FusedCall, fused_at, is_fused, overwritable
from graphopt.program import LEAVES, Leaf, Storage, leaves, storages_of
from graphopt.short_calls import shorten_calls


def boxed(module: fx.GraphModule) -> Callable[[list[Any]], Sequence[Any]]:
    """`module` as a callable that takes its arguments in a list, and empties it, so that they can die."""
    shorten_calls(module)
    module.graph.set_codegen(_BoxedCodeGen())
    module.recompile()
    forward = module.forward

    def run(arguments: list[Any]) -> Sequence[Any]:
        return forward(arguments)  # type: ignore[no-any-return]

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def overwrite_dead_operands(module: fx.GraphModule) -> int:
    """Rewrite `module` in place; the number of operators that now write over an operand.

    Generated kernels become functions that are called as they are, with nothing in between.
    """
    storages = storages_of(module.graph)
    last = last_uses(module.graph, storages)
    count = 0
    for node in list(module.graph.nodes):
        if is_fused(node):
            storages[_called(module.graph, node, storages, last)] = storages[node]
            count += 1
            continue
        position = _position(node, storages, last)
        if position is not None:
            storages[_rewrite(module.graph, node, position)] = storages[node]
            count += 1
    if count:
        module.recompile()
    return count


def last_uses(graph: fx.Graph, storages: dict[fx.Node, tuple[Storage, ...]]) -> dict[Storage, fx.Node]:
    """For each storage, the last node that reads it, views not counted unless they are read.

    A transfer reads its operands until it has been waited for.
    """
    last: dict[Storage, fx.Node] = {}
    for node in reversed(graph.nodes):
        if ops.is_wait(node):
            for source in ops.operands_in_flight(node):
                for storage in storages[source]:
                    last.setdefault(storage, node)
        for source in node.all_input_nodes:
            is_view = node.op != "output" and set(storages[node]) <= set(storages[source])
            for storage in storages[source]:
                if not is_view:
                    last.setdefault(storage, node)
    return last


def _called(
    graph: fx.Graph,
    node: fx.Node,
    storages: dict[fx.Node, tuple[Storage, ...]],
    last: dict[Storage, fx.Node],
) -> fx.Node:
    """A fused `node` as a call of its kernel, which writes over an operand where one dies."""
    given: Any = node.args[0]
    over = next(
        (
            (source, target)
            for source, target in overwritable(fused_at(node))
            if may_lie_over(node, given[source], target) and _dies(node, given[source], storages, last)
        ),
        None,
    )
    with graph.inserting_before(node):
        new = graph.call_function(FusedCall(fused_at(node), over), tuple(given))
    own = [*leaves(node)]
    if over is not None:
        own[over[1]] = Leaf(own[over[1]].nbytes, (new.all_input_nodes.index(given[over[0]]), 0))
    new.meta = {**node.meta, LEAVES: tuple(own)}
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return new


def _dies(
    node: fx.Node,
    operand: fx.Node,
    storages: dict[fx.Node, tuple[Storage, ...]],
    last: dict[Storage, fx.Node],
) -> bool:
    """Whether `node` is the last to read what lies behind `operand`, and reads it by no other name."""
    storage = storages[operand][0]
    others = [n for n in node.all_input_nodes if n is not operand]
    return (
        storage[0].op not in ("placeholder", "get_attr")
        and last[storage] is node
        and all(storage not in storages[n] for n in others)
    )


def _position(
    node: fx.Node,
    storages: dict[fx.Node, tuple[Storage, ...]],
    last: dict[Storage, fx.Node],
) -> int | None:
    for position in ops.overwrite_positions(node):
        operand = node.args[position]
        if not isinstance(operand, fx.Node) or not may_overwrite(node, operand):
            continue
        if _dies(node, operand, storages, last):
            return position
    return None


def _rewrite(graph: fx.Graph, node: fx.Node, position: int) -> fx.Node:
    target, args, kwargs = ops.overwriting(node, position)
    operand = node.args[position]
    with graph.inserting_before(node):
        new = graph.call_function(target, args, kwargs)
    nbytes = leaves(node)[0].nbytes
    place = new.all_input_nodes.index(operand)  # type: ignore[arg-type]
    new.meta = {**node.meta, LEAVES: (Leaf(nbytes, (place, 0)),)}
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return new
