"""Gradients that never arrive: a joint graph without the work that only zero gradients would do.

A model that returns its loss beside other tensors is traced as if a gradient came back for each of
them. Where only the loss is differentiated, autograd would fill the others with zeros as large as
the tensors, and add them. `without_gradients` removes those terms.
"""

from typing import Any

from torch import fx

from graphopt import ops
from graphopt.program import LEAVES, Leaf, Program, Role, storage_nbytes, tensors_of


def unlikely_tangents(program: Program) -> frozenset[str]:
    """Tangents of outputs that are no scalar, in a program that also returns a scalar.

    These are the outputs beside a loss. The caller must keep a backward for the case that a
    gradient does arrive.
    """
    scalars: list[str] = []
    others: list[str] = []
    for node in program.graph.nodes:
        if program.roles.get(node.name) is Role.TANGENT:
            tensor = tensors_of(node)[0]
            (scalars if tensor is not None and tensor.numel() == 1 else others).append(node.name)
    return frozenset(others) if scalars else frozenset()


def without_gradients(program: Program, tangents: frozenset[str]) -> Program:
    """The program for the case that no gradient arrives for the outputs of `tangents`.

    The tangents stay inputs of the graph, without users.
    """
    result = program.copy()
    zero: set[fx.Node] = {n for n in result.graph.nodes if n.name in tangents}
    for node in result.operators():
        if zero.isdisjoint(node.all_input_nodes):
            continue
        if _is_zero(node, zero):
            zero.add(node)
        else:
            _drop_zero_terms(result, node, zero)
    output = result.graph.output_node()
    results: Any = output.args[0]  # a gradient that is zero is none at all, as in eager mode
    if not zero.isdisjoint(output.all_input_nodes):
        output.args = (tuple(None if r in zero else r for r in results),)
    result.graph.eliminate_dead_code()
    return result


def _is_zero(node: fx.Node, zero: set[fx.Node]) -> bool:
    inputs = node.all_input_nodes
    rule = ops.zero_if(node.target)
    if rule == "any":
        return True
    if rule == "first":
        return node.args[0] in zero
    if rule == "all" or ops.is_view(node.target):
        return all(n in zero for n in inputs)
    return False


def _drop_zero_terms(program: Program, node: fx.Node, zero: set[fx.Node]) -> None:
    """Take the zero operands out of `node`: x + 0 becomes x, any other zero is filled in."""
    left = [a for a in node.args[:2] if a not in zero]
    same = len(left) == 1 and isinstance(left[0], fx.Node) and _same_layout(left[0], node)
    if node.target is ops.aten.add.Tensor and same and (left[0] is node.args[0] or not node.kwargs):
        node.replace_all_uses_with(left[0])  # type: ignore[arg-type]
        program.graph.erase_node(node)
        return
    for source in node.all_input_nodes:
        if source in zero:
            node.replace_input_with(source, _zeros(program, source, before=node))


def _same_layout(left: fx.Node, right: fx.Node) -> bool:
    a, b = tensors_of(left)[0], tensors_of(right)[0]
    if a is None or b is None:
        return False
    return (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def _zeros(program: Program, like: fx.Node, before: fx.Node) -> fx.Node:
    tensor = tensors_of(like)[0]
    assert tensor is not None
    with program.graph.inserting_before(before):
        node = program.graph.call_function(
            ops.aten.full.default,
            (list(tensor.shape), 0),
            {"dtype": tensor.dtype, "device": tensor.device, "pin_memory": False},
        )
    with tensor.fake_mode:  # type: ignore[attr-defined]
        node.meta["val"] = ops.aten.full.default(*node.args, **node.kwargs)
    node.meta["partitioner_tag"] = "is_backward"
    node.meta[LEAVES] = (Leaf(storage_nbytes(node.meta["val"]), None),)
    return node
