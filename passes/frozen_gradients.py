"""A joint graph without the gradients of some inputs: the backward is pruned to what is still wanted.

Work of which nobody needs a result goes: products for weight gradients, everything below the lowest
wanted gradient, and, inside operators that make several gradients at once, those left unread. An
operand that is then taken for its shape alone is not kept from the forward either.
"""

from collections.abc import Collection, Sequence
from operator import getitem
from typing import Any

import torch
from torch import fx

from graphopt.program import Program, Role, insert_call, set_value, storages_of, tensors_of
from graphopt.split import late_nodes

aten = torch.ops.aten

# Operators that make several gradients, and the position of the mask that says which are wanted.
MASKS: dict[Any, int] = {
    aten.convolution_backward.default: 10,
    aten.native_batch_norm_backward.default: 9,
    aten.native_layer_norm_backward.default: 7,
    aten.native_group_norm_backward.default: 9,
}
INPUT = 1  # position of the forward's input among the arguments of those


def reads_input(node: fx.Node, mask: Collection[bool]) -> bool:
    """True where a node of `MASKS` reads the numbers of its input for the gradients of `mask`.

    The gradient of the input is a product with the weights alone, in a convolution and in a norm
    whose statistics are constants.
    """
    constant = node.target is aten.native_batch_norm_backward.default and node.args[7] is False
    if node.target is aten.convolution_backward.default or constant:
        return bool(list(mask)[1])
    return True


def bias_alone(node: fx.Node, mask: Sequence[bool]) -> bool:
    """True where a convolution is asked for the gradient of its bias without that of its weight.

    That is a sum over the incoming gradient; oneDNN would make the weight's, too, and return it.
    """
    return node.target is aten.convolution_backward.default and not mask[1] and mask[2]


def gradient_of(program: Program) -> dict[str, fx.Node]:
    """The node of each gradient that `program` returns, by the name of the graph input it is for."""
    if not program.is_joint:
        return {}
    inputs = [i.name for i in program.inputs if i.role is not Role.TANGENT]
    pairs = zip(inputs, program.gradients, strict=True)
    return {name: node for name, node in pairs if isinstance(node, fx.Node)}


def without_gradients_of(program: Program, frozen: Collection[str]) -> tuple[Program, list[fx.Node]]:
    """`program` that returns None for the gradients of the graph inputs `frozen`; the new nodes."""
    result = program.copy()
    output = result.graph.output_node()
    count = result.num_forward_outputs
    inputs = [i.name for i in result.inputs if i.role is not Role.TANGENT]
    kept = [
        None if name in frozen else gradient
        for name, gradient in zip(inputs, result.gradients, strict=True)
    ]
    output.args = ((*result.outputs[:count], *kept),)
    new: list[fx.Node] = []
    result.graph.eliminate_dead_code()
    for node in reversed(list(result.graph.nodes)):
        if node.op == "call_function" and node.target in MASKS and node.users:
            new += _narrow(result.graph, node)
            result.graph.eliminate_dead_code()
    for node in _not_reading(result):
        new += _take_shape_only(result.graph, node)
    result.graph.eliminate_dead_code()
    alive = set(result.graph.nodes)
    return result, [n for n in new if n in alive]


def _narrow(graph: fx.Graph, node: fx.Node) -> list[fx.Node]:
    """Let `node` make only the gradients that are read."""
    place = MASKS[node.target]
    wanted = {user.args[1] for user in node.users if user.target is getitem}
    before: Any = node.args[place]
    mask = [bool(made) and index in wanted for index, made in enumerate(before)]
    if mask == list(before):
        return []
    new = []
    if bias_alone(node, mask):
        new.append(_sum_for_bias(graph, node))
        mask[2] = False
    if any(mask):
        args = (*node.args[:place], mask, *node.args[place + 1 :])
        new.append(_replaced(graph, node, args, f"{node.name}_part"))
    return new


def _sum_for_bias(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The gradient of the bias of a convolution, which takes the place of what `node` makes."""
    gradient: Any = node.args[0]
    dimensions = [i for i in range(gradient.meta["val"].dim()) if i != 1]
    args = (gradient, dimensions)
    with graph.inserting_before(node):
        made = insert_call(graph, node, aten.sum.dim_IntList, args, name=f"{node.name}_bias")
    for user in [u for u in node.users if u.args[1] == 2]:
        user.replace_all_uses_with(made)
        graph.erase_node(user)
    return made


def _not_reading(program: Program) -> list[fx.Node]:
    """The nodes of `MASKS` that read only the shape of their input, which the backward reads nowhere."""
    late = late_nodes(program)
    storages = storages_of(program.graph)
    masked = [n for n in program.graph.nodes if n.op == "call_function" and n.target in MASKS]
    blind = {n: n.args[INPUT] for n in masked if not reads_input(n, n.args[MASKS[n.target]])}
    read = {
        storage
        for node in late
        for source in node.all_input_nodes
        if source is not blind.get(node)
        for storage in storages[source]
    }
    return [
        node
        for node, source in blind.items()
        if all(
            s not in read and s[0].op == "call_function" and s[0] not in late for s in storages[source]
        )
    ]


def _take_shape_only(graph: fx.Graph, node: fx.Node) -> list[fx.Node]:
    """Give `node` an empty tensor in the place of its input."""
    source: Any = node.args[INPUT]
    tensor: Any = tensors_of(source)[0]
    layout = (list(tensor.shape), list(tensor.stride()))
    kind = {"dtype": tensor.dtype, "device": tensor.device}
    with graph.inserting_before(node):
        name = f"{node.name}_shape"
        empty = insert_call(graph, node, aten.empty_strided.default, layout, kind, name)
    empty.meta["partitioner_tag"] = "is_backward"  # nothing that it reads says so
    args = (node.args[0], empty, *node.args[2:])
    return [empty, _replaced(graph, node, args, f"{node.name}_alone")]


def _replaced(graph: fx.Graph, node: fx.Node, args: tuple[Any, ...], name: str) -> fx.Node:
    """The node that stands in the place of `node`, called with `args`; its results are taken anew."""
    target: Any = node.target
    with graph.inserting_before(node):
        made = insert_call(graph, node, target, args, name=name)
    node.replace_all_uses_with(made)
    for user in made.users:
        set_value(user, made.meta["val"][user.args[1]])
    graph.erase_node(node)
    return made
