"""What every captured program is freed of before passes see it: copies, masks, needs without use.

A dropout of probability zero, for one, is captured as a copy of its input. In a program that writes to
none of its values, a copy with the layout of its source is the source.
"""

from torch import fx

from graphopt import ops
from graphopt.compact_slices import compact_waiting_slices
from graphopt.constant_masks import without_constant_masks
from graphopt.program import Program, leaves, storages_of, tensors_of
from graphopt.separate_gradients import separate_convolution_gradients


def cleaned(program: Program, compiler: str = "eager") -> Program:
    """`program` without copies that have their source's layout, constant masks, and unread arguments.

    Where it runs operator by operator, gradients of convolutions are made one after the other, and slices
    of gradients that wait are copied.

    A copy stays where it or its source is an input or an output of the graph: there it keeps two
    tensors of the caller apart.
    """
    result = program.copy()
    without_constant_masks(result.graph)
    if compiler == "eager":
        separate_convolution_gradients(result.graph)
    for node in result.operators():
        ops.drop_unread_arguments(node)
    storage = storages_of(result.graph)
    fixed = {s for o in result.outputs if isinstance(o, fx.Node) for s in storage[o]}
    fixed |= {s for n in result.graph.nodes if n.op in ("placeholder", "get_attr") for s in storage[n]}
    fixed |= {
        s
        for n in result.operators()
        if ops.mutates(n.target)
        for i in n.all_input_nodes
        for s in storage[i]
    }
    for node in list(result.operators()):
        if _is_copy(node):
            source = node.all_input_nodes[0]
            if fixed.isdisjoint((*storage[node], *storage[source])):
                node.replace_all_uses_with(source)
                result.graph.erase_node(node)
    result.graph.eliminate_dead_code()
    if compiler == "eager":
        compact_waiting_slices(result)
    return result


def _is_copy(node: fx.Node) -> bool:
    if node.target is not ops.aten.clone.default:
        return False
    copy, source = tensors_of(node)[0], tensors_of(node.all_input_nodes[0])[0]
    if copy is None or source is None:
        return False
    whole = source.numel() * source.element_size() == leaves(node.all_input_nodes[0])[0].nbytes
    return whole and copy.shape == source.shape and copy.stride() == source.stride()
