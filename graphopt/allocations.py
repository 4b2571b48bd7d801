"""When each allocation of a lowered graph is alive: from the operator that makes it to its last reader.

Tensors that lie over each other, as views or since an operator writes over its operand, are one.
"""

from dataclasses import dataclass

import torch
from torch import fx

from graphopt import ops
from graphopt.cost_models.memory import is_dense
from graphopt.fused_ops import FusedCall
from graphopt.program import Storage, leaves, storages_of, tensors_of


@dataclass(frozen=True)
class Allocation:
    """One storage, by the `node` and the `number` of its tensor that made it, or that brought it in.

    `first` and `last` count the nodes of the graph: those that make it and read it last. `members` are
    the tensors in it that are no views: what is made first, and results that operators write over it.
    """

    node: fx.Node
    number: int
    nbytes: int
    first: int
    last: int
    members: tuple[Storage, ...]


def allocations(graph: fx.Graph) -> dict[Storage, Allocation]:
    """The storages behind the tensors of a lowered `graph`, those of its inputs included, in order."""
    storages = storages_of(graph)
    first: dict[Storage, int] = {}
    last: dict[Storage, int] = {}
    members: dict[Storage, list[Storage]] = {}
    for place, node in enumerate(graph.nodes):
        reads = [*node.all_input_nodes, *(ops.operands_in_flight(node) if ops.is_wait(node) else ())]
        for storage in (s for n in reads for s in storages[n]):
            last[storage] = place
        for number, storage in enumerate(storages.get(node, ())):
            first.setdefault(storage, place)
            last[storage] = place
            if storage == (node, number) or writes_over(node, number):
                members.setdefault(storage, []).append((node, number))
    return {
        (node, number): Allocation(
            node,
            number,
            leaves(node)[number].nbytes,
            place,
            last[node, number],
            tuple(members[node, number]),
        )
        for (node, number), place in first.items()
    }


def writes_over(node: fx.Node, number: int) -> bool:
    """True for a result that lowering wrote over an operand."""
    if isinstance(node.target, FusedCall):
        return node.target.over is not None and node.target.over[1] == number
    return leaves(node)[number].alias is not None and ops.mutates(node.target)


def fills_its_storage(node: fx.Node, number: int) -> bool:
    """True for a tensor of plain strides, sizes that are numbers, and no bytes but its own."""
    tensor = tensors_of(node)[number]
    if tensor is None or tensor.layout is not torch.strided or tensor.storage_offset() != 0:
        return False
    if not all(type(size) is int for size in (*tensor.shape, *tensor.stride())):
        return False
    return tensor.numel() * tensor.element_size() == leaves(node)[number].nbytes and is_dense(tensor)
