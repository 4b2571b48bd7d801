"""Slices of a gradient that are waited for: copied, so that the rest of the gradient can go.

The gradient of a concatenation is one tensor, and each operand's is a slice of it. Where one of them is
read long after the others, as behind the skip connection of a U-Net, the whole tensor would stay for it.
"""

from collections.abc import Iterator

import torch
from torch import fx

from graphopt.program import Program, Storage, insert_call, leaves, storages_of, tensors_of
from graphopt.split import late_nodes

aten = torch.ops.aten
SHARE = 0.5  # of the tensor: the largest slice that is copied
APART = 8  # operators between the last reader of the rest and the first of the slice, at least


def compact_waiting_slices(program: Program) -> None:
    """Copy, in the backward of `program`, small slices of tensors that nothing else reads so late.

    Where a copy would change how later results lie in memory, none is made.
    """
    found = list(_waiting(program))
    for node in found:
        readers = list(node.users)
        with program.graph.inserting_after(node):
            copy = insert_call(program.graph, node, aten.clone.default, (node,), name=f"{node.name}_copy")
        for reader in readers:
            reader.replace_input_with(node, copy)


def _waiting(program: Program) -> Iterator[fx.Node]:
    nodes, late = list(program.graph.nodes), late_nodes(program)
    place, storages = {n: i for i, n in enumerate(nodes)}, storages_of(program.graph)
    reads: dict[Storage, set[fx.Node]] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            for storage in storages[source]:
                if node.op == "output" or storage not in storages[node]:
                    reads.setdefault(storage, set()).add(node)
    for node in nodes:
        if node.target is not aten.slice.Tensor or node not in late or not _is_small_part(node):
            continue
        storage = storages[node][0]
        if storage[0] not in late or storage[0].op != "call_function":
            continue
        mine = _readers(node, storage, storages)
        others = reads[storage] - mine
        if (
            mine
            and others
            and max(map(place.__getitem__, others)) + APART <= min(map(place.__getitem__, mine))
        ):
            yield node


def _readers(
    node: fx.Node, storage: Storage, storages: dict[fx.Node, tuple[Storage, ...]]
) -> set[fx.Node]:
    """What reads `node`, directly or as a view."""
    found: set[fx.Node] = set()
    for user in node.users:
        is_view = user.op != "output" and storage in storages[user]
        found |= _readers(user, storage, storages) if is_view else {user}
    return found


def _is_small_part(node: fx.Node) -> bool:
    """True where a copy takes far less than what it frees, and has its elements in the same order."""
    part = tensors_of(node)[0]
    if part is None or not all(type(size) is int for size in part.shape):
        return False
    order = sorted(range(part.dim()), key=part.stride, reverse=True)
    is_small = part.numel() * part.element_size() <= SHARE * leaves(node)[0].nbytes
    return is_small and order == list(range(part.dim()))
