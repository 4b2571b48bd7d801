"""What of a program can lie in an arena: the allocations of a step, as its halves are lowered to run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from graphopt.allocations import Allocation, allocations, fills_its_storage
from graphopt.lower import overwrite_dead_operands
from graphopt.out_forms import can_write_into
from graphopt.program import Program, Storage, storages_of, tensors_of
from graphopt.split import backward_module, forward_module, saved_nodes

_NAME = "graphopt_name"  # in the facts of a node of a lowered half: its name in the program
Named = tuple[str, int]  # a tensor: the name of its node in the program, and its number there


@dataclass(frozen=True)
class Temporary:
    """A storage that a step makes: its name, its bytes, and the moments between which it is needed.

    Moments count the nodes of the lowered forward, and those of the backward behind it. `members` are the
    tensors of the program that are made in it. `reason` says why it cannot lie in an arena, if so.
    """

    name: Named
    nbytes: int
    first: int
    last: int
    members: tuple[Named, ...]
    device: torch.device | None
    reason: str | None


def temporaries_of(program: Program) -> list[Temporary]:
    """What a step of `program` allocates, in order. What it returns is needed to the end.

    What the forward saves is needed until the backward has read it: nobody asks for the backward twice.
    """
    if not program.is_joint:
        whole = program.copy().module
        made = _lowered(whole)
        return _temporaries(made, 0, {}, _behind(whole.graph, whole.graph.output_node().all_input_nodes))
    saved = saved_nodes(program)
    forward = forward_module(program, saved)
    backward = backward_module(program, [n.name for n in saved])
    in_forward, in_backward = _lowered(forward), _lowered(backward)
    results: Sequence[object] = forward.graph.output_node().args[0]  # type: ignore[assignment]
    outputs = [o for o in results[: program.num_forward_outputs] if isinstance(o, fx.Node)]
    returned = _behind(forward.graph, outputs)
    gradients = _behind(backward.graph, backward.graph.output_node().all_input_nodes)
    by_name = {node.meta[_NAME]: node for node in forward.graph.nodes if _NAME in node.meta}
    storages, begin = storages_of(forward.graph), len(forward.graph.nodes)
    later: dict[Storage, int] = {}
    for storage, allocation in in_backward.items():
        source = by_name.get(allocation.node.meta.get(_NAME))
        if allocation.node.op == "placeholder" and source is not None:
            behind = storages[source][allocation.number]
            later[behind] = max(later.get(behind, 0), begin + allocation.last)
            returned |= {behind} if storage in gradients else set()
    return [
        *_temporaries(in_forward, 0, later, returned),
        *_temporaries(in_backward, begin, {}, gradients),
    ]


def _lowered(module: fx.GraphModule) -> dict[Storage, Allocation]:
    """What `module`, which is rewritten, allocates; its nodes know their names in the program."""
    for node in module.graph.nodes:
        node.meta[_NAME] = node.name
    overwrite_dead_operands(module)
    return allocations(module.graph)


def _behind(graph: fx.Graph, nodes: Sequence[fx.Node]) -> set[Storage]:
    storages = storages_of(graph)
    return {s for n in nodes for s in storages[n]}


def _temporaries(
    made: Mapping[Storage, Allocation], begin: int, later: Mapping[Storage, int], returned: set[Storage]
) -> list[Temporary]:
    """Those of one half, whose first moment is `begin`; `later` has the ends of what is saved."""
    found = []
    for storage, a in made.items():
        if a.node.op in ("placeholder", "get_attr"):
            continue
        tensor = tensors_of(a.node)[a.number]
        found.append(
            Temporary(
                (a.node.meta[_NAME], a.number),
                a.nbytes,
                begin + a.first,
                max(begin + a.last, later.get(storage, 0)),
                tuple((n.meta[_NAME], i) for n, i in a.members),
                None if tensor is None else tensor.device,
                _reason(a, storage in returned),
            )
        )
    return found


def _reason(a: Allocation, is_returned: bool) -> str | None:
    if is_returned:
        return "it is returned"
    if not can_write_into(a.node):
        return "its operator allocates what it returns"
    if not fills_its_storage(a.node, a.number):
        return "it does not fill its memory from the first byte on"
    return None


def device_of(temporaries: Sequence[Temporary]) -> torch.device | None:
    """The device that most bytes are allocated on."""
    total: dict[torch.device, int] = {}
    for t in temporaries:
        if t.device is not None:
            total[t.device] = total.get(t.device, 0) + t.nbytes
    return max(total, key=lambda device: total[device], default=None)
